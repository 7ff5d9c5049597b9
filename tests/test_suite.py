"""`labs test`: what it runs, what it shows meanwhile, and how it ends."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output

from labsupport.course import kernels, suite, warm
from labsupport.course.execute import execute, source_sha256

ROOT = Path(__file__).resolve().parents[1]


def part(name: str, prints: str, code: int = 0) -> suite.Part:
    return suite.Part(name, (sys.executable, "-c", f"print({prints!r}); raise SystemExit({code})"))


def run_parts(monkeypatch: pytest.MonkeyPatch, tests: suite.Part, *notebooks: suite.Part) -> tuple[int, list[str]]:
    """The suite with other parts in place of its own: exit code, lines that it writes."""
    waiting = {Path(str(i)): notebook for i, notebook in enumerate(notebooks)}
    monkeypatch.setattr(suite, "lint", lambda: [part("lint", "fine")])
    monkeypatch.setattr(suite, "types", lambda: part("types", "fine"))
    monkeypatch.setattr(suite, "tests", lambda count, quick: tests)
    monkeypatch.setattr(suite, "notebooks", lambda root, numbers: list(waiting))
    monkeypatch.setattr(suite, "notebook", lambda root, path: waiting[path])
    written: list[str] = []
    return suite.run_all(ROOT, written.append), "".join(written).splitlines()


def test_it_ends_with_one_closing_line_over_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = part("b", "..\n=== 2 passed in 63.1s (0:01:03) ===")
    code, lines = run_parts(monkeypatch, part("a", "....\n4 passed, 1 warning in 1.0s"), notebook)
    assert code == 0
    assert re.fullmatch(r"=+ 6 passed, 1 warnings in [\d.]+s =+", lines[-1])
    assert any(re.fullmatch(r"\[ 1/1\] b: ok, 2 passed after \d+ s", line) for line in lines)
    assert any(re.fullmatch(r"--- types: ok after \d+ s", line) for line in lines)


@pytest.mark.parametrize("place", ["tests", "notebook"])
@pytest.mark.parametrize(
    ("prints", "wanted"),
    [
        ("FAILED tests/x.py::y - no\n1 failed, 3 passed in 1.0s", "FAILED tests/x.py::y - no"),
        ("ERROR tests/x.py\n1 error in 1.0s", "ERROR tests/x.py"),
        ("segmentation fault", "FAILED bad (exit code 1)"),
    ],
)
def test_any_part_that_fails_fails_it_and_is_named_at_the_end(
    prints: str, wanted: str, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, good = part("bad", prints, 1), part("good", "4 passed in 1.0s")
    code, lines = run_parts(monkeypatch, *((bad, good) if place == "tests" else (good, good, bad, good)))
    assert code == 1
    assert prints.splitlines()[0] in lines
    assert lines[-2] == wanted
    assert re.search(r"1 (failed|error)", lines[-1])


def test_what_a_part_prints_is_shown_while_it_runs(tmp_path: Path) -> None:
    """The process goes on when what it printed has been shown."""
    seen = tmp_path / "seen"
    waits = f"import pathlib, time; print('now', flush=True)\nwhile not pathlib.Path({str(seen)!r}).exists(): time.sleep(0.01)"
    done = suite.run(suite.Part("waits", (sys.executable, "-c", waits)), ROOT, lambda text: seen.touch())
    assert (done.code, done.output) == (0, "now\n")


@pytest.mark.slow
def test_a_part_sees_no_setting_of_the_users_and_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABS_MODEL", "mine")
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    code = "import os, torch; print(os.environ.get('LABS_MODEL'), os.environ.get('LABS_STRICT'), torch.get_num_threads())"
    assert suite.run(suite.Part("x", (sys.executable, "-c", code), {"LABS_STRICT": "1"}), ROOT).output == "None 1 1\n"


def test_tests_keep_to_one_thread() -> None:
    assert torch.get_num_threads() == 1


def test_what_a_module_makes_once_is_made_once_by_workers_beside_each_other(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text(
            "import os, pathlib, pytest, time\n"
            '@pytest.fixture(scope="module")\n'
            "def made(): (pathlib.Path(__file__).parent / f'{__name__}-{os.getpid()}').touch()\n"
            '@pytest.mark.parametrize("number", range(8))\n'
            "def test_it(number, made): time.sleep(0.05)\n"
        )
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "xdist", "-p", "scheduling", "--rootdir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "16 passed" in done.stdout, done.stdout + done.stderr
    assert [len(list(tmp_path.glob(f"test_{name}-*"))) for name in ("one", "two")] == [1, 1]


def test_it_runs_lint_types_and_every_notebook_in_both_forms() -> None:
    commands = [" ".join(part.command) for part in (*suite.lint(), suite.types())]
    for tool in ("ruff check", "ruff format --check", "lint-imports", "mypy"):
        assert any(tool in command for command in commands)
    found = {path: suite.notebook(ROOT, path) for path in suite.notebooks(ROOT)}
    assert found.keys() == {*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "notebooks" / "solutions").glob("*.ipynb")}
    for path, notebook in found.items():
        assert str(path.relative_to(ROOT)) in notebook.command
        assert "--nbval-lax" in notebook.command


def test_quick_leaves_out_slow_tests_and_notebooks_that_have_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not slow" in suite.tests(2, quick=True).command
    assert "not slow" not in suite.tests(2).command
    ran = []
    monkeypatch.setattr(suite, "changed", lambda root, paths: paths[:1])
    monkeypatch.setattr(suite, "run", lambda part, root, write=None: ran.append(part) or suite.Result(part, 0, "", 0.0))
    suite.run_all(ROOT, lambda text: None, quick=True)
    first = suite.notebooks(ROOT)[0]
    assert [part.name for part in ran if part.name.endswith(".ipynb")] == [str(first.relative_to(ROOT))]
    assert "not slow" in next(part for part in ran if part.name == "tests").command


def test_with_numbers_it_runs_these_notebooks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    monkeypatch.setattr(suite, "run", lambda part, root, write=None: ran.append(part.name) or suite.Result(part, 0, "", 0.0))
    suite.run_all(ROOT, lambda text: None, ["2"])
    assert sorted(ran) == ["notebooks/02_rounding.ipynb", "notebooks/solutions/02_rounding.ipynb"]


@pytest.mark.parametrize("committed", [True, False], ids=["git", "no git"])
def test_a_notebook_has_changed_when_its_cells_have(committed: bool, tmp_path: Path) -> None:
    def save(path: Path, source: str, output: str = "") -> None:
        """With the hash of "x = 1" as what was executed: so `labs build` leaves it."""
        notebook = new_notebook(cells=[new_code_cell("x = 1", id="one")])
        notebook.metadata["labs"] = {"executed_source_sha256": source_sha256(notebook)}
        notebook.cells[0].update(source=source, outputs=[new_output("stream", text=output)])
        nbformat.write(notebook, path)

    paths = [tmp_path / f"{name}.ipynb" for name in ("same", "run", "edited")]
    for path in paths:
        save(path, "x = 1")
    if committed:
        git = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
            subprocess.run([*git, *command], cwd=tmp_path, check=True)
    save(paths[1], "x = 1", "run again")
    save(paths[2], "x = 2")
    assert suite.changed(tmp_path, paths) == paths[2:]
    if committed:
        save(tmp_path / "new.ipynb", "x = 1")
        assert suite.changed(tmp_path, [tmp_path / "new.ipynb"]) == [tmp_path / "new.ipynb"]


TRANSPORT = "import json, ipykernel\nassert json.load(open(ipykernel.get_connection_file()))['transport'] == 'ipc'"


HOLDS = """\
import os, sys
assert sorted(k for k in os.environ if k.startswith("LABS_")) == ["LABS_CACHE", "LABS_STRICT"], sorted(os.environ)
assert os.environ["MPLBACKEND"].endswith("backend_inline") and "matplotlib" not in sys.modules
assert not any(name.startswith("labsupport.exercises") for name in sys.modules)
assert os.getcwd() == os.path.realpath("{folder}")
print("shown"); print("not an error", file=sys.stderr)
import torch
assert torch.get_num_threads() == 1 and torch.ones(3, 3).mm(torch.ones(3, 3)).sum() == 27
get_ipython().events  # a kernel"""
FORKED = [False, pytest.param(True, marks=pytest.mark.skipif(not warm.is_possible(), reason="Linux and PyTorch for CPUs only"))]


@pytest.mark.skipif(os.name != "posix", reason="Windows has no socket files")
@pytest.mark.slow
@pytest.mark.parametrize("forked", FORKED, ids=["new", "forked"])
def test_a_notebook_runs_in_a_clean_kernel_whose_failures_are_reported(forked: bool, tmp_path: Path) -> None:
    """Kernels share no ports."""
    folder = tmp_path / "solutions"
    folder.mkdir()
    for name, cells in {"good": [HOLDS.format(folder=folder), TRANSPORT], "bad": ["1 / 0", "x = 2"]}.items():
        notebook = new_notebook(cells=[new_code_cell(source, id=f"cell-{number}") for number, source in enumerate(cells)])
        nbformat.write(notebook, folder / f"{name}.ipynb")
    parts = [suite.notebook(tmp_path, path) for path in sorted(folder.glob("*.ipynb"))]
    bad, good = (suite.run(dataclasses.replace(part, forked=forked), tmp_path) for part in parts)
    assert good.code == 0, good.output
    assert good.counts["passed"] == 2
    assert (bad.counts["failed"], bad.counts["passed"]) == (1, 1)
    assert "ZeroDivisionError" in bad.output
    assert bad.failures[0].startswith("FAILED solutions/bad.ipynb::Cell 0")


@pytest.mark.skipif(os.name != "posix", reason="Windows has no socket files")
@pytest.mark.slow
def test_kernels_of_labs_build_share_no_ports() -> None:
    notebook = new_notebook(cells=[new_code_cell(TRANSPORT, id="one")])
    execute(notebook, "one", strict=False)
    first, second = kernels.ThisInterpreter(), kernels.ThisInterpreter()
    assert Path(first.ip).parent != Path(second.ip).parent
