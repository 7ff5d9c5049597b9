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
    )
    (root / "pyproject.toml").write_text("[project]\n")
    monkeypatch.setattr(install, "ROOT", root)
    monkeypatch.setattr(install, "fingerprint", lambda real=install.fingerprint: real(root))
    monkeypatch.setattr(install, "has_nvidia_driver", lambda: False)
    monkeypatch.setattr(install.sys, "platform", "linux")
    monkeypatch.setattr(install.wants_cpu_build, "__defaults__", ("linux",))
    return root


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """What pip would have been asked for, in order."""
    made: list[tuple[str, ...]] = []
    monkeypatch.setattr(install, "pip", lambda python, log, *arguments: made.append(arguments))
    return made


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
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
    assert lock == ("--no-deps", "--require-hashes", "-r", str(clone / "requirements.lock"))
    constraints = package[package.index("--constraint") + 1]
    assert package == ("--no-build-isolation", "--constraint", constraints, "-e", f"{clone}[{install.EXTRAS}]")
    assert Path(constraints).read_text() == "numpy==2.0\ntorch==2.13.0 ; sys_platform == 'linux'\n"


def test_where_there_is_a_driver_no_cpu_build_is_asked_for(clone: Path, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "has_nvidia_driver", lambda: True)
    install.install(Path("python"), clone)
    assert len(calls) == 2
    assert not any("--extra-index-url" in call for call in calls)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_than_on_linux_the_plain_build_is_the_small_one(platform: str) -> None:
    assert not install.wants_cpu_build(platform)


def test_a_cpu_index_that_does_not_serve_is_not_the_end(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def pip(python: Path, log: Path, *arguments: str) -> None:
        made.append(arguments)
        if install.CPU_INDEX in arguments:
            raise install.InstallError("no")

    monkeypatch.setattr(install, "pip", pip)
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
        ("ERROR: No space left on device", "pip failed: ERROR: No space left on device"),
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
