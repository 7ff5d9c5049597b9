"""Nobody hands in for somebody else: what a learner can name or add in a bulk download does not decide whose a notebook is."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from labsupport.course import workbook
from labsupport.grading import collect, own, policy, release, report
from labsupport.grading.archive import MOST_BYTES
from labsupport.grading.classroom import ROSTER, Classroom
from labsupport.grading.records import Collected, Result

LAB = 2
NAME = "02_rounding.ipynb"
CLAIMS_ADA = "sub:\n  :submitters:\n  - :name: Ada Byron\n    :sid: ada\n    :email: ada@example.org\n"


@pytest.fixture
def classroom(tmp_path: Path) -> Classroom:
    made = Classroom.create(tmp_path / "class")
    (made.folder / ROSTER).write_text(
        "learner,name,email\nada,Ada Byron,ada@example.org\nben,Ben Bell,ben@example.org\nzoe,Zoe Ada,\nay,Ada Yonath,\n"
    )
    release.release(made, LAB)
    return Classroom.open(made.folder)


def owners(classroom: Classroom, folder: Path, files: dict[str, str | None], kind: str = "auto") -> set[tuple[str, str]]:
    """Learner and name of what is taken from a folder of these files. None: a notebook, each one different."""
    original = workbook.read(workbook.chapter(str(LAB)))
    for number, (name, text) in enumerate(files.items()):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None:
            original.cells[0].source = f"copy {number}"
            workbook.write(original, path)
        else:
            path.write_text(text)
    return {(one.learner, one.name) for one in collect.collect(classroom, LAB, folder, kind).taken}


@pytest.mark.parametrize("others", [("Ada Byron_1_assignsubmission_file",), ()], ids=["among others", "alone"])
def test_a_table_of_gradescope_in_a_folder_of_moodle_is_a_learners_file(classroom: Classroom, tmp_path: Path, others):
    mine = "Ben Bell_2_assignsubmission_file"
    files = {f"{other}/{NAME}": None for other in others}
    files |= {f"{mine}/sub/{NAME}": None, f"{mine}/submission_metadata.yml": CLAIMS_ADA}
    wanted = {("ada", f"{other}/{NAME}") for other in others} | {("ben", f"{mine}/sub/{NAME}")}
    assert owners(classroom, tmp_path / "in", files) == wanted


@pytest.mark.parametrize("kind", ["auto", "gradescope"])
def test_in_gradescopes_export_its_own_table_counts(classroom: Classroom, tmp_path: Path, kind: str):
    table = CLAIMS_ADA.replace("sub:", "submission_1:") + "submission_2:\n  :submitters:\n  - :sid: ben\n"
    files = {
        f"export/submission_1/{NAME}": None,
        f"export/submission_2/sub/{NAME}": None,
        "export/submission_2/submission_metadata.yml": CLAIMS_ADA,
        "export/submission_metadata.yml": table,
    }
    found = owners(classroom, tmp_path / "in", files, kind)
    assert found == {("ada", f"export/submission_1/{NAME}"), ("ben", f"export/submission_2/sub/{NAME}")}


@pytest.mark.parametrize("above", ["", "submitted/"])
def test_folders_of_a_learners_own_do_not_count_in_nbgraders_layout(classroom: Classroom, tmp_path: Path, above: str):
    files: dict[str, str | None] = {
        f"{above}ada/lab02/{NAME}": None,
        f"{above}ada/lab02/timestamp.txt": "2027-03-01 10:00:00 UTC",
        f"{above}ben/lab02/ada/lab02/{NAME}": None,
        f"{above}ben/lab02/ada/lab02/timestamp.txt": "2001-01-01 10:00:00 UTC",
        f"{above}ben/lab02/timestamp.txt": "2027-03-02 10:00:00 UTC",
    }
    found = owners(classroom, tmp_path / "in", files, "nbgrader")
    assert found == {("ada", f"{above}ada/lab02/{NAME}"), ("ben", f"{above}ben/lab02/ada/lab02/{NAME}")}
    times = {one.learner: one.handed_in.year for one in classroom.collected(LAB)}
    assert times == {"ada": 2027, "ben": 2027}


def test_a_first_name_is_no_id_of_somebody_else(classroom: Classroom, tmp_path: Path):
    """Ada Yonath's id is not ada, which is another learner's."""
    files = {f"Ada Yonath_1_assignsubmission_file/{NAME}": None, f"ben Benjamin Bell_2_assignsubmission_file/{NAME}": None}
    assert {learner for learner, _ in owners(classroom, tmp_path / "in", files)} == {"ay", "ben"}


def test_a_huge_file_takes_nobodys_place(classroom: Classroom, tmp_path: Path):
    """Its name comes first. It has no blocks on the disk, and is not read."""
    huge = tmp_path / "in" / "Ada Byron_1_assignsubmission_file" / "large.ipynb"
    huge.parent.mkdir(parents=True)
    with huge.open("wb") as stream:
        stream.truncate(2 * MOST_BYTES)
    assert owners(classroom, tmp_path / "in", {f"Ben Bell_2_assignsubmission_file/{NAME}": None}) == {
        ("ben", f"Ben Bell_2_assignsubmission_file/{NAME}")
    }


def test_what_is_handed_out_holds_nobodys_numbers(classroom: Classroom):
    """Whoever uploads the folder of a release gives away notebooks, and nothing that says what is right."""
    done = release.release(classroom, LAB, own_numbers=True, again=True, only=["2.1", "2.3"])
    drawn = own.load(classroom, LAB)
    assert set(drawn.items) == set(classroom.roster)
    handed_out = "".join(path.read_text("utf-8") for path in classroom.folder_of("release", LAB).rglob("*.*"))
    assert all(path.parent.name in classroom.roster for path in done.notebooks)
    for items in drawn.items.values():
        for item in items.values():
            assert repr(item.number) not in handed_out


def test_the_report_says_whose_number_was_written_down(classroom: Classroom):
    about = {"lab": LAB, "learner": "ben", "sha256": "0", "handed_in": datetime(2027, 3, 1, tzinfo=UTC), "marks": {}}
    collected = Collected(**{key: about[key] for key in ("lab", "learner", "sha256", "handed_in")}, file="x.ipynb")
    found = Result(**about, own={"2.1": "as ada", "2.3": "right", "prediction": "blank"})
    entry = policy.entry("ben", classroom.release(LAB), classroom.settings.policy, [collected], {"0": found}, [])
    (line,) = report.borrowed([entry])
    assert line.startswith("ben: the number written down for 2.1 is not theirs but ada's")
