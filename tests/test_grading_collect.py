"""What was handed in finds its learner however a system names it, and nothing in a folder or a zip does harm."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path, PurePosixPath

import pytest

from labsupport.course import workbook
from labsupport.grading import archive, naming
from labsupport.grading.classroom import Classroom, Learner
from labsupport.grading.collect import Collection, collect
from labsupport.grading.naming import Claim, Roster
from labsupport.grading.records import GradingError, Release
from labsupport.model import files

ROSTER = """\
learner,name,email
jsmith,"Smith, John",john.smith@x.org
mueller,Jörg Müller,jm@x.org
oneill,Máire O'Neill-Byrne,mb@x.org
wei1,Wei Zhang,wei1@x.org
wei2,Zhang Wei,wei2@x.org
li,李 明,li@x.org
vdberg,Anna van den Berg,avdb@x.org
"""
NOW = datetime(2027, 3, 10, 12, tzinfo=UTC)
WHEN = (2027, 3, 9, 10, 30, 0)
FIVE = workbook.chapter("05").read_bytes()
Files = Mapping[str, bytes | str]


@pytest.fixture
def classroom(tmp_path: Path) -> Classroom:
    folder = tmp_path / "class"
    Classroom.create(folder)
    (folder / "roster.csv").write_text(ROSTER)
    (folder / "release/05").mkdir()
    Release(lab=5, points={"5.1": 3.0}, notebook="05_nf4.ipynb", released=datetime(2021, 1, 1, tzinfo=UTC)).write(
        folder / "release/05/release.json"
    )
    return Classroom.open(folder)


def notebook(mark: str = "") -> bytes:
    """A copy of the lab that is like no other."""
    whole = json.loads(FIVE)
    whole["metadata"]["mark"] = mark
    return json.dumps(whole).encode()


def zipped(path: Path, content: Files) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in content.items():
            info = zipfile.ZipInfo(name, WHEN)
            info.compress_type = zipfile.ZIP_DEFLATED
            made.writestr(info, data)
    return path


def laid_out(folder: Path, content: Files) -> Path:
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def learners(found: Collection) -> list[str]:
    return sorted(one.learner for one in found.taken)


def whole_class(classroom: Classroom) -> None:
    """Every file of a collected notebook is there, under its hash, and nothing else is."""
    import hashlib

    stored = [path for path in (classroom.folder / "collected").rglob("*") if path.is_file()]
    for one in classroom.collected(5):
        path = classroom.notebook_path(one)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == one.sha256 == path.stem
        assert path.parent.name == one.learner
        stored = [other for other in stored if other not in (path, path.with_suffix(".json"))]
    assert stored == []


# The systems ----------------------------------------------------------------------------------------------------------
MOODLE = {
    "John Smith_1234_assignsubmission_file/05_nf4.ipynb": notebook("a"),
    "Jörg Müller_99_assignsubmission_file_/my work.ipynb": notebook("b"),
    "vdberg Anna van den Berg_77_assignsubmission_file/sub/05_nf4.ipynb": notebook("c"),
    "李 明_5_assignsubmission_file_05_nf4.ipynb": notebook("d"),
    "Wei Zhang_6_assignsubmission_file_05_nf4.ipynb": notebook("e"),
    "Participant_11_assignsubmission_file/05_nf4.ipynb": notebook("f"),
    "Nobody Here_12_assignsubmission_file/05_nf4.ipynb": notebook("g"),
    "John Smith_1234_assignsubmission_onlinetext/onlinetext.html": "hello",
}


def test_moodle(classroom: Classroom, tmp_path: Path) -> None:
    found = collect(classroom, 5, zipped(tmp_path / "m.zip", MOODLE), now=NOW)
    assert learners(found) == ["jsmith", "li", "mueller", "vdberg"]
    lines = "\n".join(found.lines)
    assert "Wei Zhang_6_assignsubmission_file_05_nf4.ipynb: 'Wei Zhang' fits wei1 and wei2: not taken" in lines
    assert "Nobody Here_12_assignsubmission_file/05_nf4.ipynb: 'Nobody Here' is not on the roster: not taken" in lines
    assert "'Participant' is not on the roster" in lines
    assert "onlinetext.html: not a notebook" in lines
    assert "a zip has times without a zone" in lines
    by = {one.learner: one for one in found.taken}
    assert by["jsmith"].handed_in == datetime(*WHEN).astimezone()
    assert "handed in as Jörg Müller_99_assignsubmission_file_/my work.ipynb" not in by["mueller"].remarks
    assert "handed in as my work.ipynb, wanted 05_nf4.ipynb" in by["mueller"].remarks
    assert by["li"].remarks == ()
    whole_class(classroom)


CANVAS = {
    "smithjohn_LATE_101_5001_05_nf4-1.ipynb": notebook("a"),
    "müllerjörg_102_5002_05_nf4.ipynb": notebook("b"),
    "oneillbyrnemáire_103_5003_nb.ipynb": notebook("c"),
    "vandenberganna_104_5004_05_nf4.ipynb": notebook("d"),
    "zhangwei_105_5005_05_nf4.ipynb": notebook("e"),
    "anon_x7kQ2_5006_05_nf4.ipynb": notebook("f"),
    "readme.ipynb": notebook("g"),
}


def test_canvas(classroom: Classroom, tmp_path: Path) -> None:
    found = collect(classroom, 5, zipped(tmp_path / "c.zip", CANVAS), now=NOW)
    assert learners(found) == ["jsmith", "mueller", "oneill", "vdberg"]
    lines = "\n".join(found.lines)
    assert "'zhangwei' fits wei1 and wei2: not taken" in lines
    assert "readme.ipynb: has no name of Canvas'" in lines
    assert "anon_x7kQ2_5006_05_nf4.ipynb: 'anon_x7kQ2' is not on the roster" in lines
    by = {one.learner: one for one in found.taken}
    assert by["jsmith"].remarks == ("Canvas says that it was late",)
    assert by["oneill"].remarks == ("handed in as oneillbyrnemáire_103_5003_nb.ipynb, wanted 05_nf4.ipynb",)


GRADESCOPE = """\
submission_1:
  :submitters:
  - :name: John Smith
    :sid: '100'
    :email: John.Smith@x.org
  :created_at: 2027-03-05 12:00:00.123456789 Z
submission_2:
  :submitters:
  - :name: Somebody Else
    :sid: mueller
    :email:
  - :name: Wei Zhang
    :sid:
    :email: wei2@x.org
  - :name: Not There
    :sid: x
    :email: n@x.org
  :created_at: '2027-03-06T12:00:00+02:00'
submission_3:
  :submitters:
  - :name: A
    :sid: li
    :email: jm@x.org
"""


def test_gradescope(classroom: Classroom, tmp_path: Path) -> None:
    root = "assignment_77_export"
    content: dict[str, bytes | str] = {
        f"{root}/submission_metadata.yml": GRADESCOPE,
        f"{root}/submission_1/05_nf4.ipynb": notebook("a"),
        f"{root}/submission_2/05_nf4.ipynb": notebook("b"),
        f"{root}/submission_3/05_nf4.ipynb": notebook("c"),
        f"{root}/submission_4/05_nf4.ipynb": notebook("d"),
    }
    found = collect(classroom, 5, zipped(tmp_path / "g.zip", content), now=NOW)
    assert learners(found) == ["jsmith", "mueller", "wei2"]
    by = {one.learner: one for one in found.taken}
    assert by["jsmith"].handed_in == datetime(2027, 3, 5, 12, 0, 0, 123456, tzinfo=UTC)
    assert by["wei2"].handed_in == by["mueller"].handed_in == datetime(2027, 3, 6, 10, tzinfo=UTC)
    lines = "\n".join(found.lines)
    assert "'Not There' is not on the roster" in lines
    assert "its id and address are of different learners, li and mueller: not taken" in lines
    assert "submission_4/05_nf4.ipynb: submission_metadata.yml says nothing about it: not taken" in lines


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a", "holds no table of submissions"),
        ("a: [", "cannot be read: while parsing"),
        ("a: !!python/object/apply:os.system ['touch /tmp/never']", "cannot be read: could not determine a constructor"),
    ],
)
def test_broken_metadata(classroom: Classroom, tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(GradingError, match=says):
        collect(classroom, 5, laid_out(tmp_path / "g", {"submission_metadata.yml": text, "submission_1/a.ipynb": FIVE}))
    with pytest.raises(GradingError, match=r"there is no submission_metadata\.yml"):
        collect(classroom, 5, laid_out(tmp_path / "h", {"submission_1/a.ipynb": FIVE}), "gradescope")


def test_nbgrader_s_exchange(classroom: Classroom, tmp_path: Path) -> None:
    content = {
        "inbound/jsmith+lab05+2027-03-02 15:58:23.948203 UTC+Ab-_c1/05_nf4.ipynb": notebook("a"),
        "inbound/jsmith+lab05+2027-03-02 15:58:23.948203 UTC+Ab-_c1/timestamp.txt": "2027-03-02 15:58:23.948203 UTC",
        "inbound/mueller+lab05+2027-03-03 15:58:23.948203 UTC/05_nf4.ipynb": notebook("b"),
        "inbound/ghost+lab05+2027-03-03 15:58:23.948203 UTC/05_nf4.ipynb": notebook("c"),
    }
    found = collect(classroom, 5, laid_out(tmp_path / "exchange", content), now=NOW)
    assert [(one.learner, one.handed_in) for one in found.taken] == [
        ("jsmith", datetime(2027, 3, 2, 15, 58, 23, 948203, tzinfo=UTC)),
        ("mueller", datetime(2027, 3, 3, 15, 58, 23, 948203, tzinfo=UTC)),
    ]
    assert any("'ghost' is not on the roster" in line for line in found.lines)


@pytest.mark.parametrize("stamped", [False, True])
def test_nbgrader_s_folder(classroom: Classroom, tmp_path: Path, stamped: bool) -> None:
    content: dict[str, bytes | str] = {"submitted/jsmith/lab05/05_nf4.ipynb": notebook("a")}
    if stamped:
        content["submitted/jsmith/lab05/timestamp.txt"] = "2027-03-02 15:58:23 UTC"
    found = collect(classroom, 5, laid_out(tmp_path / "course", content), now=datetime.now(UTC))
    assert learners(found) == ["jsmith"]
    assert (found.taken[0].handed_in == datetime(2027, 3, 2, 15, 58, 23, tzinfo=UTC)) == stamped


FOLDER = {
    "jsmith.ipynb": notebook("a"),
    "05_nf4_mueller.ipynb": notebook("b"),
    "oneill_05_nf4 (1).ipynb": notebook("c"),
    "Anna van den Berg/05_nf4.ipynb": notebook("d"),
    "wei1@x.org/anything.ipynb": notebook("e"),
    "who.ipynb": notebook("f"),
    "li/wei2.ipynb": notebook("g"),
    "Wei Zhang.ipynb": notebook("h"),
    "notes.txt": "hello",
    "jsmith/.ipynb_checkpoints/05_nf4-checkpoint.ipynb": notebook("i"),
    "__MACOSX/._jsmith.ipynb": b"x",
}


@pytest.mark.parametrize("packed", [False, True])
def test_a_plain_folder(classroom: Classroom, tmp_path: Path, packed: bool) -> None:
    source = zipped(tmp_path / "f.zip", FOLDER) if packed else laid_out(tmp_path / "in", FOLDER)
    found = collect(classroom, 5, source, now=NOW + timedelta(days=10_000))
    assert learners(found) == ["jsmith", "mueller", "oneill", "vdberg", "wei1"]
    rest = [line for line in found.lines if "zone" not in line]
    assert rest == [
        "notes.txt: not a notebook (.ipynb), not taken",
        "Wei Zhang.ipynb: 'Wei Zhang' fits wei1 and wei2: not taken",
        "li/wei2.ipynb: its name fits li and wei2: not taken",
        "who.ipynb: no learner of the roster is named by its folder or its name: not taken",
    ]
    whole_class(classroom)


def test_a_single_notebook(classroom: Classroom, tmp_path: Path) -> None:
    (tmp_path / "jsmith.ipynb").write_bytes(FIVE)
    assert learners(collect(classroom, 5, tmp_path / "jsmith.ipynb")) == ["jsmith"]


def test_names_on_the_roster() -> None:
    roster = Roster(
        {one.id: one for one in (Learner("a1", "Åsa Öberg"), Learner("b2", "Jean-Luc d'Arc", "jl@x.org"), Learner("c3"))}
    )
    for claim in (Claim(name="OBERG ASA"), Claim(joined="obergasa"), Claim(ids=("A1",)), Claim(name="Öberg, Åsa")):
        assert roster.find(claim) == "a1"
    for claim in (Claim(name="Luc Jean DArc"), Claim(joined="darcjeanluc"), Claim(email="JL@X.ORG"), Claim(ids=("jl@x.org",))):
        assert roster.find(claim) == "b2"
    for claim in (Claim(), Claim(name="Åsa"), Claim(name="3"), Claim(joined="oberg"), Claim(ids=("",))):
        with pytest.raises(archive.Unreadable, match="is not on the roster"):
            roster.find(claim)


# What is odd in what was handed in ------------------------------------------------------------------------------------
def test_taking_twice_adds_nothing(classroom: Classroom, tmp_path: Path) -> None:
    source = zipped(tmp_path / "m.zip", MOODLE)
    first = collect(classroom, 5, source, now=NOW)
    before = {path: path.stat().st_mtime_ns for path in classroom.folder.rglob("*")}
    second = collect(classroom, 5, source, now=NOW)
    assert second.taken == []
    assert second.known == len(first.taken) == 4
    assert {path: path.stat().st_mtime_ns for path in classroom.folder.rglob("*")} == before


def test_two_files_of_one_learner_are_both_kept(classroom: Classroom, tmp_path: Path) -> None:
    content = {"jsmith/05_nf4.ipynb": notebook("a"), "JSMITH/05_nf4.ipynb": notebook("b")}
    found = collect(classroom, 5, zipped(tmp_path / "a.zip", content), now=NOW)
    assert learners(found) == ["jsmith", "jsmith"]
    assert "jsmith has 2 different files for this lab; by the class's policy the last counts" in found.lines


def test_the_same_file_of_two_learners_is_said(classroom: Classroom, tmp_path: Path) -> None:
    found = collect(classroom, 5, laid_out(tmp_path / "in", {"li.ipynb": FIVE, "jsmith.ipynb": FIVE}))
    assert learners(found) == ["jsmith", "li"]
    assert "li.ipynb: byte for byte the file of jsmith" in found.lines


def test_broken_notebooks_are_taken_and_said(classroom: Classroom, tmp_path: Path) -> None:
    content: Files = {"jsmith.ipynb": b"", "li.ipynb": FIVE[:5000], "mueller.ipynb": b"[" * 300_000}
    found = collect(classroom, 5, laid_out(tmp_path / "in", content))
    assert learners(found) == ["jsmith", "li", "mueller"]
    assert "jsmith.ipynb: jsmith.ipynb is empty; taken, so that jsmith hears of it" in found.lines
    assert any(line.startswith("li.ipynb: li.ipynb is not a notebook, or cut off") for line in found.lines)
    assert all(one.remarks for one in found.taken)
    whole_class(classroom)


def test_the_notebooks_of_other_labs_stay_behind(classroom: Classroom, tmp_path: Path) -> None:
    content: Files = {
        "jsmith/02_rounding.ipynb": workbook.chapter("02").read_bytes(),
        "jsmith/03_group_size.ipynb": b"broken",
        "jsmith/work.ipynb": workbook.chapter("04").read_bytes(),
        "jsmith/05_nf4.ipynb": FIVE,
    }
    found = collect(classroom, 5, laid_out(tmp_path / "in", content))
    assert [one.name for one in found.taken] == ["jsmith/05_nf4.ipynb"]
    assert found.lines == [
        "jsmith/02_rounding.ipynb: lab 02 by its name, wanted lab 05: not taken",
        "jsmith/03_group_size.ipynb: lab 03 by its name, wanted lab 05: not taken",
        "jsmith/work.ipynb: is lab 04, wanted lab 05: not taken",
    ]


def test_clocks_that_are_wrong(classroom: Classroom, tmp_path: Path) -> None:
    source = laid_out(tmp_path / "in", {"jsmith.ipynb": notebook("a"), "li.ipynb": notebook("b"), "wei1.ipynb": notebook("c")})
    for name, when in (("jsmith", NOW + timedelta(days=3)), ("li", datetime(2020, 1, 1, tzinfo=UTC)), ("wei1", NOW)):
        os.utime(source / f"{name}.ipynb", (when.timestamp(),) * 2)
    found = collect(classroom, 5, source, now=NOW)
    by = {one.learner: one for one in found.taken}
    assert "which is in the future: a clock is wrong" in by["jsmith"].remarks[0]
    assert "before the lab was released: a clock is wrong" in by["li"].remarks[0]
    assert not any("clock" in remark for remark in by["wei1"].remarks)
    assert sum("clock is wrong" in line for line in found.lines) == 2


def test_a_zip_without_times(classroom: Classroom, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        made.writestr(zipfile.ZipInfo("jsmith.ipynb"), FIVE)
    found = collect(classroom, 5, tmp_path / "a.zip")
    assert any("no time of its own is known" in remark for remark in found.taken[0].remarks)


def test_a_full_disk_leaves_nothing_half(classroom: Classroom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = laid_out(tmp_path / "in", {"jsmith.ipynb": notebook("a"), "li.ipynb": notebook("b")})
    original, count = Path.write_bytes, []

    def full(self: Path, data: bytes) -> int:
        count.append(self)
        if len(count) > 1:
            original(self, data[:100])
            raise OSError(28, "No space left on device")
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(files.WriteError, match="the disk is full"):
        collect(classroom, 5, source)
    monkeypatch.undo()
    whole_class(classroom)
    assert [one.learner for one in classroom.collected(5)] == ["jsmith"]
    assert learners(collect(classroom, 5, source)) == ["li"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("no.zip", None, "cannot be read: No such file"),
        ("a.zip", b"", "is neither a folder, a notebook nor a zip file"),
        ("a.zip", b"PK\x03\x04 half", "is neither a folder, a notebook nor a zip file"),
        ("a.zip", b"PK\x05\x06" + bytes(8) + struct.pack("<LLH", 500, 10**6, 0), "is not a zip file, or damaged"),
        ("a.txt", b"hello", "is neither a folder, a notebook nor a zip file"),
    ],
)
def test_sources_that_are_none(classroom: Classroom, tmp_path: Path, name: str, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(GradingError, match=says):
        collect(classroom, 5, tmp_path / name)


def test_what_collect_needs(classroom: Classroom, tmp_path: Path) -> None:
    with pytest.raises(GradingError, match="lab 06 has not been released"):
        collect(classroom, 6, tmp_path)
    with pytest.raises(GradingError, match="--from is 'blackboard', wanted auto, folder, moodle"):
        collect(classroom, 5, laid_out(tmp_path / "in", {"a.txt": "x"}), "blackboard")
    assert "in holds no notebooks (.ipynb)" in collect(classroom, 5, tmp_path / "in").lines


# What means harm ------------------------------------------------------------------------------------------------------
def everything_outside(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_size) for path in folder.rglob("*") if "class" not in path.relative_to(folder).parts}


NAMES = [
    "../jsmith.ipynb", "../../class/.secret.ipynb", "/etc/jsmith.ipynb", "C:/jsmith.ipynb", "C:\\jsmith.ipynb",
    "..\\..\\jsmith.ipynb", "jsmith/../../x.ipynb", "jsmith/\x1b[2J.ipynb", "jsmith/a\nb.ipynb",
]  # fmt: skip


def test_names_that_point_outside_are_not_taken(classroom: Classroom, tmp_path: Path) -> None:
    source = zipped(tmp_path / "a.zip", {name: notebook(name) for name in NAMES} | {"jsmith.ipynb": notebook("good")})
    before = everything_outside(tmp_path)
    found = collect(classroom, 5, source, now=NOW)
    assert [one.name for one in found.taken] == ["jsmith.ipynb"]
    assert sum("its name points out of the zip, not taken" in line for line in found.lines) == 7
    assert sum("its name holds control characters, not taken" in line for line in found.lines) == 2
    assert all(line.isprintable() for line in found.lines)
    assert everything_outside(tmp_path) == before
    whole_class(classroom)


def test_links_pipes_and_devices_in_a_folder_are_left_alone(classroom: Classroom, tmp_path: Path) -> None:
    source = laid_out(tmp_path / "in", {"li.ipynb": notebook("a")})
    secret = laid_out(tmp_path / "private", {"05_nf4.ipynb": FIVE})
    (source / "jsmith.ipynb").symlink_to(secret / "05_nf4.ipynb")
    (source / "wei1").symlink_to(secret)
    (source / "loop").symlink_to(source)
    os.mkfifo(source / "mueller.ipynb")
    found = collect(classroom, 5, source)
    assert learners(found) == ["li"]
    assert sorted(found.lines) == [
        "jsmith.ipynb: a link, not followed", "loop: a link, not followed", "mueller.ipynb: not a file",
        "wei1: a link, not followed",
    ]  # fmt: skip


def test_a_file_that_becomes_a_link_is_not_followed(tmp_path: Path) -> None:
    source = laid_out(tmp_path / "in", {"li.ipynb": FIVE, "secret": b"x"})
    entry = next(one for one in archive.contents(source).entries if one.path.name == "li.ipynb")
    (source / "li.ipynb").unlink()
    (source / "li.ipynb").symlink_to(source / "secret")
    with pytest.raises(archive.Unreadable, match="cannot be read"):
        entry.read(10)


def odd_zip(path: Path) -> Path:
    """A link, a pipe, an encrypted file, a method that is not deflate, a bomb, a file too large, a zip, a double name."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        for name, kind in (("jsmith.ipynb", stat.S_IFLNK), ("mueller.ipynb", stat.S_IFIFO)):
            info = zipfile.ZipInfo(name, WHEN)
            info.external_attr = (kind | 0o777) << 16
            made.writestr(info, "/etc/passwd")
        made.writestr("oneill.ipynb", FIVE, zipfile.ZIP_BZIP2)
        made.writestr("wei1.ipynb", bytes(15_000_000))
        with made.open(zipfile.ZipInfo("wei2.ipynb", WHEN), "w") as stream:
            stream.write(os.urandom(1) * 21_000_000)
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as nested:
            nested.writestr("li.ipynb", FIVE)
        made.writestr("li.zip", inner.getvalue())
        made.writestr("vdberg.ipynb", notebook("good"))
    return path


def test_what_a_zip_may_hold(classroom: Classroom, tmp_path: Path) -> None:
    found = collect(classroom, 5, odd_zip(tmp_path / "a.zip"), now=datetime.now(UTC))
    assert learners(found) == ["vdberg"]
    assert [line for line in found.lines if "zone" not in line] == [
        "jsmith.ipynb: a link, not followed",
        "mueller.ipynb: not a file",
        "oneill.ipynb: packed by a method other than deflate, not taken",
        "wei1.ipynb: unpacks to 200 times its size and more, not taken",
        "li.zip: a zip in it is not opened; unpack it, and collect again",
        "wei2.ipynb: has 21 MB, more than 20 MB",
    ]


def patched(path: Path, offset: int, value: bytes, at: bytes = b"PK\x01\x02") -> Path:
    """Change a field of the only file's entry in a zip's list."""
    raw = bytearray(path.read_bytes())
    start = raw.index(at) + offset
    raw[start : start + len(value)] = value
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize(
    ("offset", "value", "says"),
    [
        (8, b"\x01\x00", "encrypted, not taken"),
        (16, b"\x00\x00\x00\x00", "is damaged in the zip"),
        (24, struct.pack("<L", 400_000_000), "unpacks to 200 times its size"),
        (42, struct.pack("<L", 7), "is damaged in the zip"),
    ],
    ids=["encrypted", "wrong sum", "a size that is not so", "a place that is not so"],
)
def test_what_a_zip_says_about_its_files_may_be_wrong(
    classroom: Classroom, tmp_path: Path, offset: int, value: bytes, says: str
) -> None:
    source = patched(zipped(tmp_path / "a.zip", {"jsmith.ipynb": FIVE}), offset, value)
    found = collect(classroom, 5, source, now=NOW)
    assert found.taken == []
    assert any(says in line for line in found.lines)


def test_a_bomb_that_hides_its_size_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = patched(zipped(tmp_path / "a.zip", {"jsmith.ipynb": bytes(30_000_000)}), 24, struct.pack("<L", 1000))
    entry = archive.contents(source).entries[0]
    with pytest.raises(archive.Unreadable):
        archive.read_notebook(entry)


def test_a_file_that_grows_is_cut_off() -> None:
    asked = []

    def endless(most: int) -> bytes:
        asked.append(most)
        return bytes(most)

    with pytest.raises(archive.Unreadable, match="has more than 20 MB"):
        archive.read_notebook(archive.Entry(PurePosixPath("a.ipynb"), 10, None, endless))
    assert asked == [20_000_001]


def test_too_much_in_all(classroom: Classroom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labsupport.grading.collect.MOST_BYTES", len(FIVE) + 10_000)
    source = laid_out(tmp_path / "in", {"jsmith.ipynb": notebook("a"), "li.ipynb": notebook("b")})
    found = collect(classroom, 5, source)
    assert learners(found) == ["jsmith"]
    assert any(line.startswith("li.ipynb: comes after") for line in found.lines)


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = laid_out(tmp_path / "in", {f"{number}.txt": "" for number in range(12)})
    made = zipped(tmp_path / "a.zip", {f"{number}.txt": "" for number in range(12)})
    assert len(archive.contents(folder).entries) == len(archive.contents(made).entries) == 12
    monkeypatch.setattr(archive, "MOST_FILES", 10)
    for source in (folder, made):
        with pytest.raises(GradingError, match="more than 10 files"):
            archive.contents(source)
    monkeypatch.setattr(archive, "LARGEST_DIRECTORY", 500)
    monkeypatch.setattr(zipfile, "ZipFile", None)  # refused before it is opened
    with pytest.raises(GradingError, match="more than 10 files"):
        archive.contents(made)


def test_deep_folders_end(tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "in", {"/".join("a" * 20) + "/li.ipynb": FIVE})
    found = archive.contents(folder)
    assert found.entries == []
    assert "more than 12 folders deep, not looked into" in found.lines[0]


def test_hostile_names_come_to_an_end() -> None:
    entries = [
        archive.Entry(PurePosixPath(name), 1, None, lambda most: b"")
        for name in (
            "a_" * 50_000 + ".ipynb",
            "1_" * 50_000 + "x.ipynb",
            "+a" * 50_000 + "/x.ipynb",
            "a_1_assignsubmission" * 5_000 + ".ipynb",
        )
    ]
    assert naming.recognized(entries) == "folder"


def test_a_zip_in_utf_8_that_does_not_say_so(classroom: Classroom, tmp_path: Path) -> None:
    source = zipped(tmp_path / "a.zip", {"Jörg Müller_9_assignsubmission_file/05_nf4.ipynb": FIVE})
    raw = source.read_bytes()
    assert raw.count(struct.pack("<H", 0x800)) >= 2
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        patched(source, offset, b"\0\0", mark)
    assert learners(collect(classroom, 5, source, now=NOW)) == ["mueller"]
