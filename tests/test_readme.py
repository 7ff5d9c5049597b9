"""README.md and CONTRIBUTING.md promise nothing that is not there: commands, files, chapters, the map. One version, one licence."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
import test_notebooks
import test_structure
import typer
import yaml

import labsupport
from labsupport.cli import app
from labsupport.course import build, lock, pictures
from labsupport.course.badges import BEGIN, END
from labsupport.exercises import registry
from labsupport.figures import course

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
# Folders that a command makes.
MADE = {"workbook/", "workbook/backups", ".venv", ".venv/bin", ".venv/bin/labs", ".venv/bin/activate", "source/lab02/"}
CHAPTERS = {number: name for row in course.LANES.values() for number, name, _ in row}
REAL = {int(path.name[:2]): path.stem[3:] for path in build.sources(ROOT)}


def rounded(svg: str) -> str:
    """Last digits of coordinates may differ between processors."""
    return re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.1f}", svg)


def test_leads_with_the_two_commands():
    first = re.search(r"```\n(.*?)```", README, re.DOTALL)[1]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make lab", "make test"]
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"lab", "test"} <= set(targets)
    assert README.index("make lab") < README.index("![") < README.index("\n## ")


def test_every_command_is_named_and_exists():
    exist = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"`labs (\w+)", README)) == exist


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_options_exist(text):
    commands = typer.main.get_command(app).commands
    used = re.findall(r"`labs (\w+)[^`]* (--[\w-]+)`", text)
    assert used
    for command, option in used:
        assert any(option in parameter.opts for parameter in commands[command].params), f"labs {command} {option}"


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_named_files_exist(text):
    linked = re.findall(r"\]\((?!http|#)([^)]+)\)", text)
    quoted = [p for p in re.findall(r"`([\w./-]+)`", text) if "/" in p or p.endswith((".yml", ".lock", ".toml", ".md", ".cff"))]
    run = re.findall(r"(?:pytest|nbval-current-env) ((?:[\w/]+\.(?:py|ipynb) ?)+)", text)
    assert run
    for name in {*linked, *quoted, *" ".join(run).split()} - MADE:
        if not re.search(r"NN|NAME|CHAPTER", name):
            assert (ROOT / name).exists(), name


def test_every_folder_of_the_package_has_a_line():
    tree = re.search(r"^labsupport/ .*?^data/", CONTRIBUTING, re.DOTALL | re.MULTILINE)[0]
    listed = re.findall(r"^  ([\w./]+) ", tree, re.MULTILINE)
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "labsupport").iterdir()} - {"__init__.py", "__pycache__/"}
    assert set(listed) == there


def test_the_sizes_it_names_are_those_that_are_kept():
    assert (
        f"at most {test_structure.LINES_AT_MOST} lines, a chapter of exercises at most {test_structure.CHAPTER_AT_MOST}"
        in CONTRIBUTING
    )
    (least, most), words = test_notebooks.CELLS, test_notebooks.WORDS
    assert f"{least} to {most} cells and at most {words:,} words" in CONTRIBUTING
    assert f"at most {test_notebooks.MEDIAN_LINES} lines, and none has more than {test_notebooks.MOST_LINES}" in CONTRIBUTING


def test_one_version_and_one_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert citation["version"] == labsupport.__version__
    assert f"## {labsupport.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert project["license"] == " AND ".join(citation["license"])
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert (ROOT / "LICENSE").read_text("utf-8").startswith("MIT License\n")


def test_github_runs_what_ci_runs_on_every_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text("utf-8"))
    job = workflow["jobs"]["test"]
    assert job["strategy"]["matrix"]["python-version"] == list(lock.PYTHONS)
    assert [step["run"] for step in job["steps"] if "run" in step] == ["pipx install jupyter-repo2docker", ".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_anchors_exist():
    headings = {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= headings


def test_badges_have_their_place():
    assert README.count(BEGIN) == README.count(END) == 1
    assert README.index(BEGIN) < README.index(END)


def test_the_table_lists_all_chapters_and_says_which_are_planned():
    rows = re.findall(r"^\| (\d\d) \| (\w+) \| .* \| (planned|\d+ minutes) \|$", README, re.MULTILINE)
    assert {int(number): name for number, name, _ in rows} == CHAPTERS
    assert {int(number) for number, _, state in rows if state != "planned"} == REAL.keys()


@pytest.mark.parametrize("number", sorted(REAL))
def test_minutes_are_those_of_the_notebook(number):
    notebook = build.read(build.sources(ROOT, [str(number)])[0])
    stated = re.search(r"About (\d+) minutes", "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown"))
    assert stated, "the notebook does not say how long it takes"
    assert re.search(rf"^\| {number:02} \|.*\| {stated[1]} minutes \|$", README, re.MULTILINE), f"it says {stated[1]} minutes"


def test_the_map_is_of_this_course():
    assert REAL.keys() == registry.CHAPTERS.keys()
    assert {n: name for n, name in CHAPTERS.items() if n in REAL} == REAL


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_the_stored_pictures_are_those_that_are_drawn(name):
    stored = (ROOT / "data" / name).read_text("utf-8")
    assert rounded(stored) == rounded(pictures.PICTURES[name]().svg()), "labs pictures"


def test_every_picture_is_shown_and_said_in_words():
    shown = dict((target, alt) for alt, target in re.findall(r"!\[(.+?)\]\((data/.+?)\)", README))
    assert shown.keys() == {f"data/{name}" for name in pictures.PICTURES}
    who_pays = pictures.who_pays()
    for number in re.findall(r"\d+\.\d+", shown["data/who-pays.svg"]):
        assert number in who_pays.alt, f"{number} is in README's words for the picture, and not in the picture"
