"""install.py makes the environment once, says what is wrong in one line, and removes nothing; a wheel finds what it needs."""

from __future__ import annotations

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from labsupport import __version__, install
from labsupport.course import lock

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with only what install.py reads, and no driver."""
    root = tmp_path / "clone"
    root.mkdir()
    (root / "requirements.lock").write_text(
        "# header\nnumpy==2.0 \\\n    --hash=sha256:0 \\\n    --hash=sha256:1\n"
        "torch==2.13.0 ; sys_platform == 'linux' \\\n    --hash=sha256:2\n"
        f"{install.REST}\npytest==9.0 \\\n    --hash=sha256:3\n"
    )
    (root / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(install, "ROOT", root)
    monkeypatch.setattr(install, "fingerprint", lambda real=install.fingerprint: real(root))
    monkeypatch.setattr(install, "nvidia_driver", lambda: None)
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.setattr(install.which_torch, "__defaults__", (None, "linux"))
    return root


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What pip would have been asked for, in order."""
    made: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "pip", lambda python, log, *arguments: made.append(arguments))
    monkeypatch.setattr(install, "compile_all", lambda python, log: None)
    return made


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_it_runs_before_anything_is_installed_and_on_an_old_python_far_enough_to_say_so() -> None:
    tree = ast.parse((ROOT / "labsupport" / "install.py").read_text(), feature_version=(3, 7))
    named = {a.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    named |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert named <= sys.stdlib_module_names


def test_torch_comes_first_from_the_cpu_index_then_the_lock_then_the_package(clone: Path, calls: list) -> None:
    assert install.install(Path("python"), clone)
    torch, lock, package = calls
    assert "torch==2.13.0" in torch
    assert torch[torch.index("--extra-index-url") + 1] == "https://download.pytorch.org/whl/cpu"
    assert int(torch[torch.index("--retries") + 1]) <= 1
    assert lock == ("--no-deps", "--require-hashes", "-r", str(clone / "labs-requirements.txt"))
    assert Path(lock[-1]).read_text(encoding="utf-8") == (clone / "requirements.lock").read_text().partition(install.REST)[0]
    constraints = package[package.index("--constraint") + 1]
    assert package == ("--no-build-isolation", "--constraint", constraints, "-e", f"{clone}[{install.LEARNERS}]")
    assert Path(constraints).read_text(encoding="utf-8") == "numpy==2.0\ntorch==2.13.0 ; sys_platform == 'linux'\npytest==9.0\n"


def test_all_of_it_is_the_whole_lock_and_stays_so(clone: Path, calls: list) -> None:
    assert install.install(Path("python"), clone)
    assert install.install(Path("python"), clone, everything=True)
    *_, lock, package = calls
    assert Path(lock[-1]).read_text(encoding="utf-8") == (clone / "requirements.lock").read_text()
    assert package[-1] == f"{clone}[{install.LEARNERS},{install.OTHERS}]"
    calls.clear()
    assert not install.install(Path("python"), clone)  # `make lab` after `make test`
    with (clone / "requirements.lock").open("a") as file:
        file.write("# changed\n")
    assert install.install(Path("python"), clone)
    assert package[-1] == calls[-1][-1]


def test_where_there_is_a_driver_no_cpu_build_is_asked_for(clone: Path, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "nvidia_driver", lambda: 999)
    install.install(Path("python"), clone)
    assert len(calls) == 2
    assert not any("--extra-index-url" in call for call in calls)


def test_an_old_driver_gets_the_cpu_build_and_is_named(
    clone: Path, calls: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(install, "nvidia_driver", lambda: 470)
    install.install(Path("python"), clone)
    assert install.CPU_INDEX in calls[0]
    assert "the NVIDIA driver here is 470, and CUDA 13 needs 580: update it for the GPU" in capsys.readouterr().out


def test_the_build_can_be_chosen_where_no_driver_is_seen_and_the_choice_stays(clone: Path, calls: list) -> None:
    """An image for a GPU is built on a machine without one."""
    assert install.install(Path("python"), clone, "cuda")
    torch, lock, _ = calls
    assert torch == ("--no-deps", "--require-hashes", "--force-reinstall", "-r", str(clone / "labs-torch.txt"))
    assert Path(torch[-1]).read_text(encoding="utf-8") == "torch==2.13.0 ; sys_platform == 'linux' \\\n    --hash=sha256:2\n"
    assert "--require-hashes" in lock
    assert not install.install(Path("python"), clone)
    assert not install.install(Path("python"), clone, "cuda")
    calls.clear()
    assert install.install(Path("python"), clone, "cpu")
    # pip takes torch 2.13.0 of one build for torch 2.13.0 of another.
    assert {"--force-reinstall", install.CPU_INDEX, "torch==2.13.0"} <= set(calls[0])


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_than_on_linux_the_plain_build_is_the_small_one(platform: str) -> None:
    assert install.which_torch(platform=platform)[0] == "cpu"
    with pytest.raises(install.InstallError, match="--torch cuda is for Linux"):
        install.which_torch("cuda", platform)


PROC = "NVRM version: NVIDIA UNIX {}  {}  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc version 12.3.0\n"


@pytest.mark.parametrize(
    ("proc", "smi", "wanted"),
    [
        (PROC.format("x86_64 Kernel Module", "535.104.05"), "", 535),
        (PROC.format("Open Kernel Module for x86_64", "580.65.06"), "", 580),
        ("", "echo 470.256.02", 470),
        ("", "echo NVIDIA-SMI has failed because it could not communicate with the driver; exit 9", 0),
        ("what is this", "", 0),
        ("", "", None),
    ],
)
def test_the_driver_is_asked_for_its_version(
    proc: str, smi: str, wanted: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if proc:
        (tmp_path / "version").write_text(proc)
    if smi:
        script(tmp_path / "bin" / "nvidia-smi", smi)
    monkeypatch.setattr(install, "PROC_DRIVER", str(tmp_path / "version"))
    monkeypatch.setattr(install, "WSL", str(tmp_path / "wsl"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    assert install.nvidia_driver() == wanted


def test_what_was_installed_is_compiled_and_a_file_that_cannot_be_is_no_error(
    tmp_path: Path, clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, log = tmp_path / "site packages", tmp_path / "log"
    (clone / "labsupport").mkdir()
    site.mkdir()
    for path, text in {site / "good.py": "x = 1\n", site / "old.py": "print 1\n", clone / "labsupport" / "ours.py": ""}.items():
        path.write_text(text, "utf-8")
    real, asked = install.run_quietly, SimpleNamespace(stdout=f"{site}\n")
    monkeypatch.setattr(install, "run_quietly", lambda command: asked if "-c" in command else real(command))
    install.compile_all(Path(sys.executable), log)
    assert {path.name.partition(".")[0] for path in tmp_path.rglob("*.pyc")} == {"good", "ours"}
    assert "old.py" in log.read_text("utf-8")


def test_a_disk_without_room_is_said_before_anything_is_downloaded(
    clone: Path, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(install.InstallError, match=r"has 1\.0 GiB free, and the environment takes up to 3: make room"):
        install.install(Path("python"), clone)
    assert calls == []


def test_a_read_only_folder_is_told_where_else_the_environment_can_be(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(install.InstallError, match=r"cannot be written to, so no \.venv .*venv ~/labs; .*--here; .*labs lab --dir"):
        install.make_venv(clone / ".venv")
    with pytest.raises(install.InstallError, match="without --here, an environment of its own is made"):
        install.install(Path("python"), clone)


def test_a_terminal_without_the_letters_of_a_folder_is_no_reason_to_fail(tmp_path: Path) -> None:
    folder = tmp_path / "Máy tính của tôi" / "khóa học"
    (folder / "labsupport").mkdir(parents=True)
    shutil.copy(ROOT / "labsupport" / "install.py", folder / "labsupport")
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, str(folder / "labsupport" / "install.py")], env=env, capture_output=True)
    assert done.returncode == 1
    assert b"kh\\xf3a h\\u1ecdc has no requirements.lock" in done.stderr


def test_a_cpu_index_that_does_not_serve_is_not_the_end(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def pip(python: Path, log: Path, *arguments: str) -> None:
        made.append(arguments)
        if install.CPU_INDEX in arguments:
            raise install.InstallError("no")

    monkeypatch.setattr(install, "pip", pip)
    monkeypatch.setattr(install, "compile_all", lambda python, log: None)
    assert install.install(Path("python"), clone)
    assert made[1] == ("--no-deps", "torch==2.13.0")
    assert len(made) == 4


def test_a_second_run_does_nothing_until_the_lock_or_pyproject_changes(clone: Path, calls: list) -> None:
    assert install.install(Path("python"), clone)
    calls.clear()
    assert not install.install(Path("python"), clone)
    assert calls == []
    for name in ("requirements.lock", "pyproject.toml"):
        with (clone / name).open("a") as file:
            file.write("# changed\n")
        assert install.install(Path("python"), clone)
        assert not install.install(Path("python"), clone)


def test_an_installation_that_failed_leaves_no_stamp(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(python: Path, log: Path, *arguments: str) -> None:
        if "-r" in arguments:
            raise install.InstallError("no space left on device")

    monkeypatch.setattr(install, "pip", pip)
    with pytest.raises(install.InstallError):
        install.install(Path("python"), clone)
    assert not (clone / install.STAMP).exists()


@pytest.mark.parametrize(
    ("printed", "wanted"),
    [
        ("WARNING: x\nERROR: Could not find a version that satisfies the requirement torch", "pip found no package index"),
        ("ERROR: [Errno 28] No space left on device", "the disk is full: "),
        ("error: externally-managed-environment", "pip failed: error: externally-managed-environment"),
    ],
)
def test_what_pip_failed_at_becomes_one_line_and_the_rest_is_in_the_log(
    clone: Path, tmp_path: Path, printed: str, wanted: str
) -> None:
    python, log = script(tmp_path / "python", f"cat <<'END'\n{printed}\nEND\nexit 1"), tmp_path / "log"
    with pytest.raises(install.InstallError) as caught:
        install.pip(python, log, "x")
    assert str(caught.value).startswith(wanted)
    assert "\n" not in str(caught.value)
    assert log.read_text().strip() == printed


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_the_pythons_of_the_lock_are_taken(version: tuple[int, int]) -> None:
    install.check_python(version)
    assert f"3.{version[1]}" in lock.PYTHONS
    assert len(lock.PYTHONS) == 3


@pytest.mark.parametrize("version", [(2, 7), (3, 10), (3, 14), (4, 0)])
@pytest.mark.parametrize("arguments", [[], ["--here"]], ids=["venv", "here"])
def test_another_python_is_refused_in_one_line_before_pip_is_asked(
    version: tuple[int, int], arguments: list[str], clone: Path, calls: list, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(install.check_python, "__defaults__", (version, *install.check_python.__defaults__[1:]))
    assert install.main(arguments) == 1
    assert calls == []
    wanted = (
        rf"labs: this is Python {version[0]}\.{version[1]}, the course runs on Python 3\.11 to 3\.13: make lab PYTHON=\S+, or .*\n"
    )
    assert re.fullmatch(wanted, capsys.readouterr().err)


def test_an_environment_of_a_supported_python_is_used_whatever_python_runs_this(
    clone: Path, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install.check_python, "__defaults__", ((3, 14), *install.check_python.__defaults__[1:]))
    script(install.venv_python(clone / ".venv"), "echo 3 12")
    assert install.main([]) == 0
    assert len(calls) == 3


def test_a_python_without_venv_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(install.InstallError, match="sudo apt install python3"):
        install.make_venv(tmp_path / ".venv")


def test_an_environment_that_is_there_is_used_and_not_removed(tmp_path: Path) -> None:
    python = script(install.venv_python(tmp_path / ".venv"), "echo 3 12")
    (tmp_path / ".venv" / "mine.txt").write_text("mine")
    assert install.make_venv(tmp_path / ".venv") == python
    assert (tmp_path / ".venv" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("says", "wanted"),
    [
        ("exit 1", "holds no working Python"),
        ("echo 3 9", r"is Python 3\.9, .*: move it away, then make lab"),
        ("echo 3 14", r"is Python 3\.14, "),
    ],
)
def test_an_environment_that_cannot_be_used_is_named_and_not_removed(tmp_path: Path, says: str, wanted: str) -> None:
    script(install.venv_python(tmp_path / ".venv"), says)
    with pytest.raises(install.InstallError, match=wanted):
        install.make_venv(tmp_path / ".venv")
    assert install.venv_python(tmp_path / ".venv").exists()


def test_a_folder_called_venv_without_python_is_named_and_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".venv").mkdir()
    with pytest.raises(install.InstallError, match="move it away"):
        install.make_venv(tmp_path / ".venv")
    assert (tmp_path / ".venv").is_dir()


def test_outside_a_clone_it_says_so(tmp_path: Path) -> None:
    shutil.copy(ROOT / "labsupport" / "install.py", tmp_path)
    done = subprocess.run([sys.executable, str(tmp_path / "install.py")], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "has no requirements.lock" in done.stderr


FROM_A_WHEEL = """
import os, pathlib, labsupport
from labsupport import models
from labsupport.course import workbook
here = pathlib.Path(os.environ["WHEEL"]).resolve() / "labsupport"
assert pathlib.Path(labsupport.__file__).resolve().is_relative_to(here), labsupport.__file__
model = models.course_model_dir()
assert model.resolve().is_relative_to(here), model
loaded, tokenizer = models.load_model()
assert tokenizer.decode(tokenizer("x = 1")["input_ids"]) == "x = 1"
notebooks = workbook.chapters()
assert all(p.resolve().is_relative_to(here) for p in notebooks.values())
folder = workbook.default_dir()
assert folder == pathlib.Path.cwd() / "workbook", folder
assert workbook.lay_out(folder) == []
print(*sorted(p.name for p in folder.glob("*.ipynb")))
"""


@pytest.mark.slow
def test_installed_as_a_wheel_it_finds_its_model_and_its_notebooks(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert not [name for name in names if "/solutions/" in name or "/." in name]
    about = f"labsupport-{__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"labsupport", about}  # nothing else in site-packages
    assert f"{about}/licenses/LICENSE" in names
    (tmp_path / "elsewhere").mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"PYTHONPATH": str(tmp_path / "site"), "WHEEL": str(tmp_path / "site")}
    done = subprocess.run([sys.executable, "-c", FROM_A_WHEEL], cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(p.name for p in (ROOT / "notebooks").glob("*.ipynb"))
