"""The commands: what a learner types."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import nbformat
import pytest
import torch
import typer
from nbformat.v4 import new_code_cell, new_notebook
from typer.testing import CliRunner

from labsupport.cli import app
from labsupport.cli.lab import jupyter_command
from labsupport.course import doctor, workbook
from labsupport.evidence import machine
from labsupport.model import files, memory

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "only-for-this-test"
LABS = [sys.executable, "-m", "labsupport.cli"]


def labs(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    code = "import sys; from labsupport.cli import app; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "nbgrader", "nbclient", "nbformat", "matplotlib", "numpy", "jupyterlab"}
    assert heavy.isdisjoint(done.stdout.split())


def test_every_command_is_listed_and_has_help() -> None:
    for listing in (labs("--help"), labs()):
        assert listing.exit_code == 0
        for command in typer.main.get_command(app).commands:
            assert re.search(rf"\b{command}\b", listing.output), command
    for command in typer.main.get_command(app).commands:
        assert labs(command, "--help").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["lab", "--port", "80000"], "labs lab: Invalid value for '--port': "),
        (["lab", "--port", "0"], "labs lab: Invalid value for '--port': "),
        (["lab", "--port", "http"], "labs lab: Invalid value for '--port': "),
        (["train", "--seed", "-1"], "labs train: Invalid value for '--seed': "),
        (["train", "--tokens", "0"], "labs train: Invalid value for '--tokens': "),
        (["sweep", "--windows", "0"], "labs sweep: Invalid value for '--windows': "),
        (["bench", "--budget", "nan"], "labs bench: Invalid value for '--budget': "),
        (["bench", "--budget", "inf"], "labs bench: Invalid value for '--budget': "),
        (["bench", "--threads", "-2"], "labs bench: Invalid value for '--threads': "),
        (["reset"], "labs reset: Missing argument 'NN'"),
        (["no-such-command"], "labs: No such command 'no-such-command'"),
        (["check", "2", "--no-such-option"], "labs check: No such option: --no-such-option"),
    ],
    ids=str,
)
def test_what_is_refused_is_refused_in_one_line(arguments: list[str], wanted: str) -> None:
    done = labs(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith(wanted)
    assert done.stderr.count("\n") == 1


def test_every_number_that_a_command_takes_has_a_limit() -> None:
    """`labs quantize` has its own, which depend on the model and the method: tests/test_checkpoint_refused.py."""
    found = []
    for group in app.registered_groups:
        for command in group.typer_instance.registered_commands:
            for name, hint in get_type_hints(command.callback, include_extras=True).items():
                kind, *about = get_args(hint) if get_origin(hint) is Annotated else (hint,)
                if command.callback.__name__ != "quantize" and {int, float} & {kind, *get_args(kind)}:
                    found.append((f"{command.callback.__name__} --{name}", about[0].min))
    assert len(found) >= 7
    assert [option for option, least in found if least is None] == []


@pytest.fixture
def lessons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two chapters in place of the course's own."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    for name in ("00_start_here", "02_rounding"):
        nbformat.write(new_notebook(cells=[new_code_cell("x = 1", id="one")]), folder / f"{name}.ipynb")
    monkeypatch.setattr(workbook, "notebooks_dir", lambda: folder)
    return folder


@pytest.mark.parametrize("command", ["reset", "check"])
def test_an_unknown_chapter_is_one_line_that_lists_them(command: str, lessons: Path, tmp_path: Path) -> None:
    done = labs(command, "17", "--dir", str(tmp_path / "book"))
    assert done.exit_code == 1
    assert done.stderr == f"labs {command}: there is no chapter '17'; the chapters are 00_start_here, 02_rounding\n"


def test_check_before_anything_is_laid_out_says_what_to_do(lessons: Path, tmp_path: Path) -> None:
    done = labs("check", "2", "--dir", str(tmp_path / "book"))
    assert done.exit_code == 1
    assert "`labs lab` lays it out" in done.stderr


def test_check_on_a_damaged_notebook_is_one_line(lessons: Path, tmp_path: Path) -> None:
    book = tmp_path / "book"
    book.mkdir()
    (book / "02_rounding.ipynb").write_text("{")
    done = labs("check", "2", "--dir", str(book))
    assert done.exit_code == 1
    assert "cannot be read as a notebook" in done.stderr
    assert done.stderr.count("\n") == 1


BLANK = "def answer(*a):\n    raise NotImplementedError"
ANSWERS = {
    "blank": (BLANK, 0, "not attempted"),
    "right": ("import torch\n{solution}\nanswer = {name}", 0, "pass"),
    "wrong": ("def answer(*a):\n    return None", 1, "not yet"),
    "raises": (f"{BLANK}\nundefined", 1, "NameError: name 'undefined' is not defined"),
}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.slow
def test_check_runs_the_learners_notebook_and_counts_only_wrong_answers_against_it(
    kind: str, lessons: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from labsupport.exercises.registry import exercises_of

    monkeypatch.setenv("LABS_STRICT", "1")  # a setting for testing solutions, which must not reach the learner's kernel
    exercise = exercises_of(2)[0]
    solved = nbformat.read(ROOT / "notebooks" / "solutions" / "02_rounding.ipynb", as_version=4)
    solution = dict(workbook.answers(solved))[f"answer-{exercise.id.replace('.', '-')}"].source
    source, code, words = ANSWERS[kind]
    answer = source.format(solution=solution, name=exercise.name)
    cells = ["from labsupport.exercises import check", answer, f"answer = check({exercise.id!r}, answer)"]
    mine = tmp_path / "book" / "02_rounding.ipynb"
    workbook.write(new_notebook(cells=[new_code_cell(c) for c in cells]), mine)
    before = mine.read_bytes()
    done = labs("check", "2", "--dir", str(mine.parent))
    assert done.exit_code == code, done.output
    assert words in done.stdout
    assert f"{int(kind == 'right')} of {len(exercises_of(2))} pass" in done.stdout
    assert mine.read_bytes() == before


@pytest.mark.slow
def test_check_cuts_a_flood_interrupts_a_cell_that_hangs_and_goes_on(lessons: Path, tmp_path: Path) -> None:
    """A line of a million characters: nbclient's own joining of output is quadratic in it, which would take about an hour."""
    mine = tmp_path / "book" / "02_rounding.ipynb"
    flood = "# check(\nprint('begin' + 'x' * 1_000_000 + 'end')"
    cells = [flood, "import time\nwhile True: time.sleep(0.1)", "# check(\nprint('reached')"]
    workbook.write(new_notebook(cells=[new_code_cell(c) for c in cells]), mine)
    done = labs("check", "2", "--timeout", "8", "--dir", str(mine.parent))
    assert done.exit_code == 1, done.output
    assert len(done.stdout) < 10_000
    for text in ("begin", "characters are left out", "xend", "reached", "cell 2 raised KeyboardInterrupt", "0 of "):
        assert text in done.stdout


def test_the_server_is_told_where_to_start() -> None:
    command = jupyter_command(Path("/w"), "00_start_here.ipynb", browser=False, port=8899)
    assert "--ServerApp.root_dir=/w" in command
    assert "--LabApp.default_url=/lab/tree/00_start_here.ipynb" in command
    assert {"--no-browser", "--port=8899"} <= set(command)
    assert "--no-browser" not in jupyter_command(Path("/w"), "x")


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"{url}?token={TOKEN}", timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """`labs lab` as a learner starts it, but for the browser and the place of the workbook."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*LABS, "lab", "--no-browser", "--port", str(port), "--dir", str(tmp_path / "book")]
    env = os.environ | {"JUPYTER_TOKEN": TOKEN, "JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "IPYTHONDIR": str(tmp_path)}
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                get(f"{url}/api/status")
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        log.close()


@pytest.mark.slow
def test_lab_serves_the_workbook_and_only_what_a_learner_needs(server: str, tmp_path: Path) -> None:
    status, listing = get(f"{server}/api/contents")
    assert status == 200
    served = {item["name"] for item in json.loads(listing)["content"]}
    assert served == {p.name for p in workbook.notebooks_dir().glob("*.ipynb")}
    status, page = get(f"{server}/lab/tree/{workbook.chapter('0').name}")
    assert status == 200
    config = json.loads(re.search(r'<script id="jupyter-config-data" type="application/json">(.*?)</script>', page, re.S)[1])
    assert "@jupyter/nbgrader" in config["disabledExtensions"]
    for place in ("formgrader", "assignments", "courses"):
        assert get(f"{server}/{place}")[0] == 404, f"nbgrader answers at /{place}"
    assert "nbgrader" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_doctor_finds_the_course_model_and_its_text() -> None:
    found = {f.what: f for f in doctor.findings()}
    assert {
        "python",
        "torch",
        "transformers",
        "bitsandbytes",
        "device",
        "memory",
        "disk",
        "sandbox",
        "model",
        "text",
    } <= found.keys()
    for what in ("torch", "transformers", "bitsandbytes", "model", "text"):
        assert found[what].todo == "", found[what]


@pytest.mark.parametrize(
    ("cuda", "driver", "wanted"),
    [
        ("13.0", 470, "NVIDIA 470, too old: CUDA 13.0, which this PyTorch is built with, needs 580; the course runs on the CPU"),
        ("12.8", 470, "NVIDIA 470, too old: CUDA 12.8, which this PyTorch is built with, needs 525; the course runs on the CPU"),
        ("13.0", 580, "NVIDIA 580, and PyTorch finds no GPU that it can use; the course runs on the CPU"),
        ("13.0", 0, "NVIDIA of unknown version, and PyTorch finds no GPU that it can use; the course runs on the CPU"),
        (None, 580, "NVIDIA 580, not used: this PyTorch is the build for CPUs."),
        ("13.0", None, ""),
    ],
)
@pytest.mark.filterwarnings("error")
def test_doctor_names_a_driver_that_pytorch_does_not_use(
    cuda: str | None, driver: int | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor, "nvidia_driver", lambda: driver)
    device, *more = doctor._device()
    assert device.found.endswith("(no GPU is needed)")
    assert bool(more) == bool(wanted)
    for finding in more:
        assert finding.found.startswith(wanted)
        # What is wrong with the GPU is a problem only where the build for GPUs was installed.
        assert ("--torch cpu" in finding.todo) == (cuda is not None)
        assert ("update the driver" in finding.todo) == ("too old" in wanted)


def test_doctor_tries_the_gpu_that_pytorch_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    about = machine.Machine("cuda", "GeForce GTX 1080", 8, 8 * 2**30, None, {})
    monkeypatch.setattr(machine, "describe", lambda: about)

    def ones(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might ...")

    monkeypatch.setattr(torch, "ones", ones)
    (device,) = doctor._device()
    assert device.found == "GeForce GTX 1080, 8.0 GiB"
    assert device.todo.startswith("it does not compute (CUDA error: no kernel image is available for execution on the device): ")
    assert "--torch cpu" in device.todo


@pytest.mark.parametrize("command", [["lab", "--no-browser"], ["reset", "00"]], ids=["lab", "reset"])
def test_where_no_copies_can_be_laid_out_another_folder_is_named(command: list[str], tmp_path: Path) -> None:
    """A file stands where the folder should be: the one obstacle that also stops root."""
    (tmp_path / "clone").write_text("", encoding="utf-8")
    done = labs(*command, "--dir", str(tmp_path / "clone" / "workbook"))
    assert done.exit_code == 1
    said = (
        rf"labs {command[0]}: \S+00_start_here\.ipynb cannot be written: .*; `--dir FOLDER` keeps your notebooks in another folder"
    )
    assert re.fullmatch(said, done.stderr.strip())


def test_a_terminal_without_the_letters_of_a_folder_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where what is not shown in a window is written in the alphabet of the country."""
    monkeypatch.setattr("os.execve", lambda *_: None)
    monkeypatch.setattr("subprocess.call", lambda *_, **__: 0)
    folder = tmp_path / "Máy tính của tôi" / "khóa học"
    done = CliRunner(charset="cp1252").invoke(app, ["lab", "--no-browser", "--dir", str(folder)])
    assert done.exit_code == 0, done.exception
    assert "Your notebooks are in" in done.output
    assert r"kh\xf3a h\u1ecdc".replace(r"\xf3", "ó") in done.output
    assert (folder / "00_start_here.ipynb").is_file()


def test_a_file_that_cannot_be_written_is_one_line_in_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise files.WriteError(Path("README.md"), "No space left on device", disk_full=True)

    monkeypatch.setattr("labsupport.course.badges.write_badges", full)
    done = labs("badges")
    assert (done.exit_code, done.stderr) == (1, "labs: the disk is full: README.md could not be written\n")


def test_a_package_that_learners_lack_is_one_line_about_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbval", None)
    done = labs("test", "--quick")
    assert done.exit_code == 1
    assert re.fullmatch(
        r"labs: nbval is not installed, and this needs it: `\S+ labsupport/install\.py.* --all` in .*\n", done.stderr
    )


def test_doctor_says_what_to_do_about_each_problem_and_exits_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABS_MODEL", str(tmp_path))
    monkeypatch.setattr(memory, "A_NOTEBOOK", 2**60)
    done = labs("doctor")
    assert done.exit_code == 1
    assert "to do: LABS_MODEL names it: correct or unset it" in done.output
    assert re.search(r"memory +\S+ GiB free of the \S+ [^\n]*\n +to do: a notebook takes up to", done.output)
    assert done.output.rstrip().endswith("2 problems")
