"""Wherever the course is opened (Binder, conda, a container, Windows, a workflow), the same commands install the same list."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import links
import pytest
import typer
import yaml
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from labsupport import install
from labsupport.cli import app
from labsupport.cli.lab import jupyter_command
from labsupport.course import lock

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = lock.read(ROOT / "requirements.lock").pins
CONTAINER = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text("utf-8"))
CONDA = (ROOT / "environment.yml").read_text("utf-8")
POST_BUILD = (ROOT / "binder" / "postBuild").read_text("utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def commands(script: str) -> list[list[str]]:
    """The simple commands of a shell script, each as its words; without comments, and without what a variable is set to."""
    lines = [part for line in script.replace("\\\n", " ").splitlines() for part in re.split(r"&&|\|\||;|(?<!&)&(?!&)", line)]
    words = [shlex.split(line, comments=True) for line in lines]
    return [[w for w in each if not re.match(r"\w+=", w) or each[0] == "export"] for each in words if each]


def written(name: str, pattern: str) -> str:
    """What a pattern finds in a file, as lines."""
    return "\n".join(re.findall(pattern, (ROOT / name).read_text("utf-8"), re.MULTILINE))


def run_by(workflow: Path) -> str:
    jobs = yaml.safe_load(workflow.read_text("utf-8"))["jobs"].values()
    return "\n".join(step.get("run", "") for job in jobs for step in job["steps"])


# What stands in each place, as a shell would run it.
SCRIPTS = {
    "environment.yml": written("environment.yml", r"^# (conda .*)$"),
    "binder/postBuild": POST_BUILD,
    "devcontainer.json": CONTAINER["postCreateCommand"],
    "Makefile": written("Makefile", r"@\$\(PYTHON\) (labsupport.*)$"),
    "README.md": written("README.md", r"`([^`\n]*install\.py[^`\n]*)`").replace("\\", "/"),
    "INSTRUCTORS.md": written("INSTRUCTORS.md", r"(?:`|RUN )([^`\n]*install\.py[^`\n]*)"),
    **{path.name: run_by(path) for path in WORKFLOWS},
}
INSTALLING = {
    "environment.yml",
    "binder/postBuild",
    "devcontainer.json",
    "Makefile",
    "README.md",
    "INSTRUCTORS.md",
    "elsewhere.yml",
}


@pytest.mark.parametrize("place", sorted(SCRIPTS))
def test_every_place_calls_the_installer_with_options_that_it_has(place: str) -> None:
    found = [words for words in commands(SCRIPTS[place]) if any(word.endswith("labsupport/install.py") for word in words)]
    assert found or place not in INSTALLING
    for words in found:
        at = next(i for i, word in enumerate(words) if word.endswith("labsupport/install.py"))
        options = install.options_of(words[at + 1 :])  # leaves with an error for what it does not know
        # Where there is no .venv, the Python that runs is the environment.
        assert (
            options.here == (place in {"environment.yml", "binder/postBuild", "devcontainer.json", "elsewhere.yml"})
            or "md" in place
        )


def test_one_python_for_conda_binder_and_the_container() -> None:
    (conda,) = re.findall(r"python=([\d.]+)", CONDA)
    binder = (ROOT / "binder" / "runtime.txt").read_text("utf-8").strip().removeprefix("python-")
    assert conda == binder == CONTAINER["image"].rpartition(":")[2]
    assert conda in lock.PYTHONS


def test_the_pythons_are_those_of_the_package() -> None:
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3" in line]
    assert tuple(named) == lock.PYTHONS
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert [f"3.{minor}" for minor in range(8, install.NEWEST[1] + 1) if f"3.{minor}" in allowed] == named


def test_conda_gets_a_python_and_pip_and_nothing_that_the_lock_has() -> None:
    assert {re.split(r"[=<>]", item)[0] for item in yaml.safe_load(CONDA)["dependencies"]} == {"python", "pip"}


def test_binder_installs_by_the_installer_keeps_nothing_of_pip_and_warms_what_the_first_cell_needs() -> None:
    assert {p.name for p in (ROOT / "binder").iterdir()} == {"runtime.txt", "postBuild"}
    assert os.access(ROOT / "binder" / "postBuild", os.X_OK)
    assert commands(POST_BUILD) == [
        ["set", "-e"],
        ["export", "PIP_NO_CACHE_DIR=1"],
        # A builder may show a driver, and never shows the GPU that a reader will have: the build is chosen here.
        ["python", "labsupport/install.py", "--here", "--torch", "cpu"],
        ["jupyter", "execute", "notebooks/00_start_here.ipynb"],
    ]
    assert (ROOT / "notebooks" / "00_start_here.ipynb").is_file()


@pytest.mark.skipif(shutil.which("repo2docker") is None, reason="repo2docker is not on the PATH: pipx install jupyter-repo2docker")
@pytest.mark.parametrize(
    "appendix", [(), ("--appendix", "RUN python labsupport/install.py --here --torch cuda")], ids=["CPU", "GPU"]
)
def test_repo2docker_plans_what_binder_says_and_nothing_else(appendix: tuple[str, ...]) -> None:
    asked = ["repo2docker", "--no-build", "--debug", *appendix, str(ROOT)]
    done = subprocess.run(asked, capture_output=True, text=True, encoding="utf-8", env={**os.environ, "PYTHONPATH": ""})
    plan = done.stdout + done.stderr
    assert done.returncode == 0, plan
    python = (ROOT / "binder" / "runtime.txt").read_text("utf-8").strip().removeprefix("python-")
    assert f"Building conda environment for python={python}" in plan
    # From where the repository is copied: what is run, as whom, in order.
    steps = re.findall(r"^(RUN|USER|COPY --chown=0:0 src/) ?(.*)$", plan[plan.index("COPY --chown=0:0 src/") :], re.MULTILINE)
    wanted = ["chmod +x binder/postBuild", "./binder/postBuild", *(line.removeprefix("RUN ") for line in appendix[1:])]
    assert [what for kind, what in steps if kind == "RUN"] == wanted
    assert [what for kind, what in steps if kind == "USER"] == ["${NB_USER}"]
    before = plan[: plan.index("COPY --chown=0:0 src/")]
    assert not re.search(r"requirements\.(txt|lock)|environment\.yml|pip install", before)  # only repo2docker's own list


def test_the_container_has_the_course_on_its_path_and_a_gpu_where_there_is_one() -> None:
    (_, *venv, folder), (python, *installs) = commands(CONTAINER["postCreateCommand"])
    assert venv == ["-m", "venv"]
    assert [python, *installs] == [f"{folder}/bin/python", "labsupport/install.py", "--here"]
    assert (
        not {"features", "build", "dockerFile", "onCreateCommand", "postStartCommand"} & CONTAINER.keys()
    )  # nothing else installs
    home = f"/home/{CONTAINER['remoteUser']}"
    assert CONTAINER["remoteEnv"]["PATH"] == f"{folder.replace('~', home)}/bin:${{containerEnv:PATH}}"
    editor = CONTAINER["customizations"]["vscode"]
    assert editor["settings"]["python.defaultInterpreterPath"] == python.replace("~", home)
    assert set(editor["extensions"]) == {"ms-python.python", "ms-toolsai.jupyter"}
    assert CONTAINER["hostRequirements"]["gpu"] == "optional"
    assert CONTAINER["forwardPorts"] == [8888]  # JupyterLab's own


def test_in_a_codespace_the_forwarded_address_may_reach_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODESPACES", "true")
    monkeypatch.setenv("CODESPACE_NAME", "upgraded-bassoon-7x")
    monkeypatch.setenv("GITHUB_CODESPACES_PORT_FORWARDING_DOMAIN", "app.github.dev")
    (option,) = (word for word in jupyter_command(ROOT, "00.ipynb") if word.startswith("--ServerApp.allow_origin_pat="))
    pattern = option.partition("=")[2]
    assert re.match(pattern, "https://upgraded-bassoon-7x-8888.app.github.dev")
    assert not re.match(pattern, "https://another-name-8888.app.github.dev")
    assert not re.match(pattern, "https://upgraded-bassoon-7x-8888.appxgithub.dev")


# Workflows.


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_commands_that_are_there_on_pythons_of_the_course(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert "permissions" in workflow or all("permissions" in job for job in workflow["jobs"].values())
    known = typer.main.get_command(app).commands
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 120
        versions = job.get("strategy", {}).get("matrix", {}).get("python-version", [])
        versions += [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
        assert {v for v in versions if not v.startswith("$")} <= set(lock.PYTHONS)
        for words in commands("\n".join(step.get("run", "") for step in job["steps"])):
            if words[0] == "labs":
                options = {option for parameter in known[words[1]].params for option in parameter.opts}
                assert {word for word in words[2:] if word.startswith("--")} <= options, words
            elif words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= TARGETS, words
            for word in words:
                if word.endswith(".py") or word.startswith((".ci/", "./")):
                    assert (ROOT / word).exists(), word


def test_the_newest_versions_are_tried_of_every_list_and_on_every_notebook() -> None:
    ran = commands(SCRIPTS["newest.yml"])
    (asked,) = (word for words in ran for word in words if word.startswith(".["))
    assert sorted(asked[2:-1].split(",")) == sorted(f"{install.LEARNERS},{install.OTHERS}".split(","))
    assert not any("requirements.lock" in word for words in ran for word in words)
    (tested,) = (words[2:] for words in ran if words[:2] == ["labs", "test"])
    assert tested == sorted(path.name[:2] for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", ["newest.yml", "links.yml"])
def test_what_depends_on_others_is_run_weekly_and_never_on_a_push(name: str) -> None:
    when = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text("utf-8"))[True]  # YAML 1.1 reads `on` as true
    assert when.keys() == {"schedule", "workflow_dispatch"}
    assert re.fullmatch(r"\d+ \d+ \* \* \d", when["schedule"][0]["cron"])


def test_links_are_read_as_a_reader_reads_them() -> None:
    text = "See (https://a.org/b_(c)), [x](https://d.org/e#f) and `http://127.0.0.1:8000/v1`. https://g.org/h. https://{owner}.org"
    assert links.links_of(text) == {"https://a.org/b_(c)", "https://d.org/e", "https://g.org/h"}
    assert links.links_of("arXiv:2210.17323, github.com/a/b.") == {"https://arxiv.org/abs/2210.17323", "https://github.com/a/b"}
    found = links.all_links()
    assert any("README.md" in files for files in found.values())
    assert any("notebooks/15_choose_and_ship.ipynb" in files for files in found.values())


def test_a_page_that_is_gone_is_broken_and_a_site_that_does_not_answer_is_not(capsys: pytest.CaptureFixture) -> None:
    places = {"https://a.org": ["x.md"], "https://b.org": ["y.md", "x.md"], "https://c.org": ["z.md"]}
    assert links.report(places, ["", "broken: 404 Not Found", "unknown: timed out"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "broken: 404 Not Found: https://b.org in x.md, y.md",
        "unknown: timed out: https://c.org in z.md",
        "3 links, 1 broken",
    ]


# Other systems.


def repository_files() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8")
    if listed.returncode:
        pytest.skip("this is no clone: git does not list its files")
    return listed.stdout.splitlines()


def test_file_names_can_be_checked_out_on_windows_and_macos() -> None:
    names = repository_files()
    assert len({name.casefold() for name in names}) == len(names), "two names differ in case alone"
    reserved = {"con", "prn", "aux", "nul", *(f"{device}{n}" for device in ("com", "lpt") for n in range(10))}
    for name in names:
        assert len(name) < 200
        for part in name.split("/"):
            assert not re.search(r'[<>:"|?*\\\x00-\x1f]', part), name
            assert not part.endswith((".", " ")), name
            assert part.casefold().partition(".")[0] not in reserved, name


def top_level(tree: ast.Module, late: bool = False) -> set[str]:
    """The first names of what a module imports from others. late: also what it imports inside functions."""
    nodes = list(ast.walk(tree) if late else ast.iter_child_nodes(tree))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in named}


IMPORTED = {path: top_level(ast.parse(path.read_text("utf-8"))) for path in (ROOT / "labsupport").rglob("*.py")}


def test_modules_that_windows_lacks_are_imported_by_the_grader_alone() -> None:
    """Its sandbox is Linux's own."""
    for path, names in IMPORTED.items():
        assert not names & {"fcntl", "grp", "pty", "pwd", "resource", "termios"} or path.parent.name == "grading", path


def test_paths_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = PureWindowsPath(r"C:\Users\Trần Thị\Máy tính của tôi\khóa học")
    monkeypatch.setattr(install, "os", SimpleNamespace(name="nt"))
    assert install.venv_python(folder / ".venv") == folder / ".venv" / "Scripts" / "python.exe"
    monkeypatch.setattr(install.sys, "prefix", str(install.ROOT / ".venv"))
    assert install.get_extra("teach") == "`py labsupport/install.py --all` in the course's folder"
    command = jupyter_command(folder / "workbook", "00_start_here.ipynb")
    assert rf"--ServerApp.root_dir={folder}\workbook" in command
    assert "--LabApp.default_url=/lab/tree/00_start_here.ipynb" in command  # an address has slashes everywhere


# A learner's environment.


def test_what_learners_import_is_in_their_part_of_the_lock() -> None:
    """Notebooks with all that they import; the package with all that it imports before a command asks for more."""
    theirs, providers = lock.for_learners(ROOT / "pyproject.toml"), importlib.metadata.packages_distributions()
    imported = {path: names for path, names in IMPORTED.items() if path.name != "tables.py"}  # the grade book's
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = ("".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code")
        plain = (re.sub(r"^(\s*)[%!].*$", r"\1pass", cell, flags=re.MULTILINE) for cell in cells)
        imported[path] = top_level(ast.parse("\n".join(plain)), late=True)
    for path, names in imported.items():
        for name in names - sys.stdlib_module_names - {"labsupport"}:
            assert {canonicalize_name(each) for each in providers.get(name, [name])} & theirs, f"{path.name} imports {name}"
