"""A class's folder: made whole or not at all, and every broken file of it named with its line and what is wanted."""

from __future__ import annotations

import json
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest

from labsupport.grading.classroom import Classroom, Learner, read_roster
from labsupport.grading.records import Collected, GradingError, Override, Release, Result
from labsupport.model import files

NOW = datetime(2027, 3, 1, 12, tzinfo=UTC)


def test_a_new_class(tmp_path: Path) -> None:
    made = Classroom.create(tmp_path / "a" / "class", "Spring")
    assert stat.S_IMODE((made.folder / ".secret").stat().st_mode) == 0o600
    opened = Classroom.open(tmp_path / "a" / "class")
    assert opened == made
    assert opened.settings.name == "Spring"
    assert opened.roster == {}
    names = sorted(path.name for path in opened.folder.iterdir())
    assert names == [".secret", "class.json", "collected", "feedback", "overrides", "release", "reports", "results", "roster.csv"]
    assert stat.S_IMODE(opened.folder.stat().st_mode) == 0o700
    assert len(opened.key) == 32
    assert Classroom.create(tmp_path / "b").key != opened.key
    assert Classroom.open(tmp_path / "b").settings.name == "b"


def test_an_empty_folder_becomes_a_class(tmp_path: Path) -> None:
    Classroom.create(tmp_path)
    assert Classroom.open(tmp_path).folder == tmp_path


def test_what_is_there_is_not_touched(tmp_path: Path) -> None:
    Classroom.create(tmp_path / "class")
    with pytest.raises(GradingError, match="is a class already"):
        Classroom.create(tmp_path / "class")
    with pytest.raises(GradingError, match="is not empty"):
        Classroom.create(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(GradingError, match="is a file"):
        Classroom.create(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    folder = tmp_path / "class"
    if there:
        folder.mkdir()

    def full(writes: object, sync: bool = False) -> None:
        (folder / ".secret").write_text("half")
        raise files.WriteError(folder / "class.json", "No space left on device", True)

    monkeypatch.setattr(files, "replace_all", full)
    with pytest.raises(files.WriteError, match=r"the disk is full: class\.json"):
        Classroom.create(folder)
    assert folder.exists() == there
    assert not there or list(folder.iterdir()) == []


def test_secrets_depend_on_every_part(tmp_path: Path) -> None:
    made = Classroom.create(tmp_path)
    drawn = [made.secret("a", "b"), made.secret("a", "c"), made.secret("b", "a"), made.secret("a"), made.secret("ab")]
    assert len(set(drawn)) == len(drawn)
    assert Classroom.open(tmp_path).secret("a", "b") == drawn[0]
    with pytest.raises(ValueError, match="no part may hold"):
        made.secret("a/b")


def test_an_open_secret_is_closed_again(tmp_path: Path) -> None:
    Classroom.create(tmp_path)
    (tmp_path / ".secret").chmod(0o644)
    Classroom.open(tmp_path)
    assert stat.S_IMODE((tmp_path / ".secret").stat().st_mode) == 0o600


BROKEN = {
    "no class": ("class.json", None, "is not a class's folder"),
    "no JSON": ("class.json", b"{", "class.json: the file: Invalid JSON"),
    "an unknown setting": ("class.json", b'{"name": "a", "colour": "red"}', "class.json: colour: Extra inputs are not permitted"),
    "a wrong policy": ("class.json", b'{"name": "a", "policy": {"late": 2}}', "class.json: policy.late: Input should be less than"),
    "a wrong limit": ("class.json", b'{"name": "a", "limits": {"processes": 0}}', "class.json: limits.processes: Input should be"),
    "an unknown sandbox": ("class.json", b'{"name": "a", "sandbox": "none"}', "class.json: sandbox: Input should be 'auto'"),
    "no secret": (".secret", None, ".secret is missing"),
    "half a secret": (".secret", b"00ff", ".secret is damaged, wanted 64 hexadecimal digits"),
    "a secret of letters": (".secret", b"x" * 64, ".secret is damaged"),
    "no roster": ("roster.csv", None, "roster.csv is missing"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named(kind: str, tmp_path: Path) -> None:
    name, content, says = BROKEN[kind]
    Classroom.create(tmp_path)
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(GradingError) as refused:
        Classroom.open(tmp_path)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


ANNA = {"anna": Learner("anna", "Anna Å. Berg", "anna@x.org"), "bo": Learner("bo", "", "")}
ROSTERS = {
    "plain": "learner,name,email\nanna,Anna Å. Berg,anna@x.org\nbo,,\n".encode(),
    "a byte-order mark": "learner,name,email\nanna,Anna Å. Berg,anna@x.org\nbo,,".encode("utf-8-sig"),
    "semicolons and quotes": '"Learner";"Name";"Email"\r\n"anna";"Anna Å. Berg";"anna@x.org"\r\n"bo";"";""\r\n'.encode(),
    "tabs, UTF-16": "learner\tname\temail\r\nanna\tAnna Å. Berg\tanna@x.org\r\nbo\t\t\r\n".encode("utf-16"),
    "more columns, another order": "nr;email;learner;group;name\n1;anna@x.org;anna;A;Anna Å. Berg\n2;;bo;A;\n".encode(),
    "blank lines, blanks, short rows": "\n learner , name,email\n\n anna ,Anna  Å. Berg, anna@x.org\n,,\nbo\n".encode(),
    "old Mac line ends": "learner,name,email\ranna,Anna Å. Berg,anna@x.org\rbo,,\r".encode(),
}


@pytest.mark.parametrize("kind", ROSTERS)
def test_a_roster_as_spreadsheets_write_it(kind: str, tmp_path: Path) -> None:
    (tmp_path / "roster.csv").write_bytes(ROSTERS[kind])
    assert read_roster(tmp_path / "roster.csv") == ANNA


HEAD = b"learner,name,email\n"
BAD_ROSTERS = {
    "nothing": (b"", "is empty, wanted a first line with the columns learner,name,email"),
    "no header": (b"anna,Anna,a@x.org\n", "line 1: wanted the columns learner,name,email, got 'anna,anna,a@x.org'"),
    "a column twice": (b"learner,name,learner\n", "line 1: the column learner is there twice"),
    "an id twice": (HEAD + b"anna,,\nbo,,\nAnna,,\n", "line 4: learner 'Anna' is in line 2 already"),
    "an address twice": (HEAD + b"anna,,a@x.org\nbo,,A@x.org\n", "line 3: email 'A@x.org' is in line 2 already"),
    "no id": (HEAD + b",Anna,\n", "line 2: learner is '', wanted up to 64 letters"),
    "a path": (HEAD + b"../anna,,\n", "line 2: learner is '../anna'"),
    "a hidden file": (HEAD + b".anna,,\n", "line 2: learner is '.anna'"),
    "an option": (HEAD + b"-anna,,\n", "line 2: learner is '-anna'"),
    "a formula": (HEAD + b"=1+1,,\n", "line 2: learner is '=1+1'"),
    "a name of Windows": (HEAD + b"con,,\n", "line 2: learner is 'con'"),
    "a dot at the end": (HEAD + b"anna.,,\n", "line 2: learner is 'anna.'"),
    "letters with accents": (HEAD + "änna,,\n".encode(), "line 2: learner is 'änna'"),
    "too long": (HEAD + b"a" * 65 + b",,\n", "line 2: learner is 'aaa"),
    "no address": (HEAD + b"anna,Anna,anna\n", "line 2: email is 'anna', wanted an address such as a@b.org"),
    "control characters": (HEAD + b"anna,A\x1b[2J,\n", "line 2: a control character in the name or email of anna"),
    "a quote that does not end": (HEAD + b'anna,"Anna\n', "line 2: unexpected end of data"),
    "another encoding": (HEAD + "anna,Åsa,\n".encode("latin-1"), "line 2: it is not UTF-8. Save it as CSV"),
}


@pytest.mark.parametrize("kind", BAD_ROSTERS)
def test_a_broken_roster_is_named_with_its_line(kind: str, tmp_path: Path) -> None:
    content, says = BAD_ROSTERS[kind]
    (tmp_path / "roster.csv").write_bytes(content)
    with pytest.raises(GradingError) as refused:
        read_roster(tmp_path / "roster.csv")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_records_lie_where_the_class_looks(tmp_path: Path) -> None:
    made = Classroom.create(tmp_path)
    with pytest.raises(GradingError, match="lab 05 has not been released in this class: `labs release 05` does it"):
        made.release(5)
    assert made.collected(5) == []
    assert list(made.results(5)) == []
    assert made.overrides(5) == []
    release = Release(lab=5, points={"5.1": 3.0}, notebook="05_nf4.ipynb")
    collected = Collected(lab=5, learner="anna", sha256="ab", file="collected/05/anna/ab.ipynb", handed_in=NOW)
    result = Result(lab=5, learner="anna", sha256="ab", handed_in=NOW, marks={})
    override = Override(lab=5, learner="anna", exercise="5.1", points=2, reason="a typo", when=NOW)
    records = {
        tmp_path / "release/05/release.json": release,
        tmp_path / "collected/05/anna/ab.json": collected,
        made.result_path(collected): result,
        made.override_path(override): override,
    }
    for path, record in records.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        record.write(path)
        path.with_name(f".{path.name}.0.tmp").write_text("half")  # what a killed process leaves
    opened = Classroom.open(tmp_path)
    assert opened.release(5) == release
    assert opened.released_labs() == [5]
    assert opened.collected(5) == [collected]
    assert list(opened.results(5)) == [result]
    assert opened.overrides(5) == [override]
    assert opened.notebook_path(collected) == tmp_path / "collected/05/anna/ab.ipynb"


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    made = Classroom.create(tmp_path)
    (tmp_path / "release/05").mkdir()
    (tmp_path / "release/05/release.json").write_text(json.dumps({"lab": "five"}))
    with pytest.raises(GradingError, match=r"release\.json: lab: Input should be a valid integer"):
        made.release(5)
