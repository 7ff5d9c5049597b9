"""One list of dependencies, in pyproject.toml: the lock follows it, and the lists of the installer do."""

from __future__ import annotations

import re
import subprocess
from copy import deepcopy
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from labsupport import install
from labsupport.course import lock

ROOT = Path(__file__).resolve().parents[1]
LISTS = lock.lists_of(ROOT / "pyproject.toml")
RECORDED, PINS, HASHES = lock.read(ROOT / "requirements.lock")
HASH = f"--hash=sha256:{'a' * 64}"


def test_the_lock_is_what_pyproject_and_this_environment_give() -> None:
    assert lock.faults(LISTS, RECORDED, PINS) == []


@pytest.mark.slow
def test_a_list_that_changed_without_relocking_is_noticed() -> None:
    lists = deepcopy(LISTS)
    lists["hub"].append("xxhash>=3")
    assert any("have changed since" in fault for fault in lock.faults(lists, RECORDED, PINS))


@pytest.mark.slow
def test_a_pin_out_of_range_is_noticed() -> None:
    faults = lock.faults(LISTS, RECORDED, PINS | {"numpy": "1.0"})
    assert "pyproject.toml asks for numpy>=1.26, the lock has 1.0" in faults


def test_an_environment_that_differs_is_noticed() -> None:
    assert "the lock has markupsafe==0.1, the environment " in "\n".join(lock.faults(LISTS, RECORDED, PINS | {"markupsafe": "0.1"}))


@pytest.mark.parametrize("name", ["markupsafe", "torch", "jupyterlab", "pytest"])
@pytest.mark.slow
def test_a_missing_requirement_of_a_locked_package_is_noticed(name: str) -> None:
    pins = {k: v for k, v in PINS.items() if k != name}
    assert f"{name} is needed, and the lock lacks it" in lock.faults(LISTS, RECORDED, pins)


def test_a_stray_package_is_noticed() -> None:
    assert "pip is in the lock, and nothing needs it" in lock.faults(LISTS, RECORDED, PINS | {"pip": "0"})


def test_the_lock_names_no_build_of_torch_no_cuda_and_no_place() -> None:
    assert not [name for name in PINS if re.match(r"nvidia|cuda|labsupport", name)]
    assert not [version for version in PINS.values() if "+" in version]
    pins = install.without_hashes((ROOT / "requirements.lock").read_text())
    body = pins.splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*( ; sys_platform == 'linux')?", line) for line in body)
    assert [line.split("==")[0] for line in body] == list(PINS)
    assert [line.split("==")[0] for line in body if ";" in line] == ["triton"]  # it has no wheels for other systems


def test_what_learners_need_stands_first_and_is_what_pip_is_given_for_them() -> None:
    text = (ROOT / "requirements.lock").read_text("utf-8")
    for_them, all_of_it = (install.without_hashes(install.part_of(text, everything)) for everything in (False, True))
    wanted = lock.for_learners(ROOT / "pyproject.toml")
    learners = [line.split("==")[0] for line in for_them.splitlines()]
    assert set(learners) == wanted
    assert learners == sorted(learners)
    rest = [line.split("==")[0] for line in all_of_it.removeprefix(for_them).splitlines()]
    assert rest == sorted(PINS.keys() - wanted)
    assert {"torch", "jupyterlab", "peft", "gguf", "hatchling"} <= wanted
    assert {"pytest", "nbgrader", "sphinx", "playwright", "dask"} <= set(rest)


def test_every_version_has_the_hashes_of_its_files_for_all_systems() -> None:
    assert HASHES.keys() == PINS.keys()
    assert all(re.fullmatch("[0-9a-f]{64}", value) for values in HASHES.values() for value in values)
    assert all(len(set(values)) == len(values) > 0 for values in HASHES.values())
    # torch has files for three Pythons and more, on Linux (two processors), macOS and Windows; tqdm has a wheel and a source.
    assert len(HASHES["torch"]) >= 12
    assert len(HASHES["tqdm"]) <= 2


def fake_uv(monkeypatch: pytest.MonkeyPatch, printed: str, code: int = 0, errors: str = "", pip: str = "") -> list[list[str]]:
    """In place of pip's configuration and of uv. Returns the commands that were run."""
    ran: list[list[str]] = []

    def run(command: list[str], **_) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return (
            subprocess.CompletedProcess(command, 0, pip)
            if "config" in command
            else subprocess.CompletedProcess(command, code, printed, errors)
        )

    monkeypatch.setattr(lock.subprocess, "run", run)
    return ran


@pytest.mark.parametrize(
    ("pip", "asked"),
    [
        ("", None),
        ("global.extra-index-url='https://more'", None),
        ("global.index-url='https://one/simple'", "https://one/simple"),
        ("global.index-url='https://one'\n:env:.index-url='https://two'\ninstall.index-url='https://three'", "https://two"),
    ],
)
def test_hashes_come_from_the_index_that_pip_is_configured_for(
    pip: str, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [character * 64 for character in "ba"]
    printed = "".join(f"{name}==1.0 \\\n    --hash=sha256:{two[0]} \\\n    --hash=sha256:{two[1]}\n" for name in ("one", "two"))
    ran = fake_uv(monkeypatch, printed, pip=pip)
    assert lock.hashes_of({"one": "1.0", "two": "1.0"}) == {"one": two[::-1], "two": two[::-1]}
    given = ran[-1]
    assert (given[given.index("--default-index") + 1] if "--default-index" in given else None) == asked


def test_an_index_without_hashes_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_uv(monkeypatch, "one==1.0\n")
    with pytest.raises(lock.LockError, match=r"the package index has no hashes for one==1.0"):
        lock.hashes_of({"one": "1.0"})
    fake_uv(monkeypatch, "", 1, "error: no such\n  version\n")
    with pytest.raises(lock.LockError, match="the package index does not give the hashes: error: no such version"):
        lock.hashes_of({"one": "1.0"})


@pytest.mark.parametrize(
    "line",
    [
        "-e .",
        f"numpy>=1 {HASH}",
        f"Numpy==1.0 {HASH}",
        "torch @ file:///x.whl",
        "--index-url x",
        f"a==1 ; x {HASH}",
        "a==1",
        f"a==1 {HASH}0",
    ],
)
def test_a_line_that_is_not_a_pin_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "x.lock").write_text(f"{line}\n")
    with pytest.raises(lock.LockError, match="wanted only lines like"):
        lock.read(tmp_path / "x.lock")


def test_locking_what_is_not_installed_is_refused() -> None:
    with pytest.raises(lock.LockError, match=r"no-such-package>=1 is not installed, and pyproject.toml asks for it"):
        lock.closure([Requirement("no-such-package>=1")])
    with pytest.raises(lock.LockError, match=r"numpy .* is installed, but pyproject.toml asks for numpy<1"):
        lock.closure([Requirement("numpy<1")])


def test_the_libraries_of_the_build_for_cuda_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["sympy>=1.13.3", "cuda-toolkit[cublas]==13.0.3", "cuda_bindings>=13", 'nvidia-cudnn-cu13==9; sys_platform == "linux"']
    monkeypatch.setattr(lock.importlib.metadata, "requires", lambda name: asked)
    assert [need.name for need in lock.needs("torch")] == ["sympy"]


@pytest.mark.slow
def test_writing_the_lock_again_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        lock, "hashes_of", lambda pins: HASHES
    )  # of a version an index may get more files, and a test has no network
    lock.write(ROOT / "pyproject.toml", tmp_path / "requirements.lock")
    written, kept = ((folder / "requirements.lock").read_text().splitlines() for folder in (tmp_path, ROOT))
    differing = [line for line in {*written} ^ {*kept} if not line.startswith("# frozen with Python")]
    assert differing == []


def test_the_installer_names_every_list_of_pyproject() -> None:
    learners, others = (names.split(",") for names in (install.LEARNERS, install.OTHERS))
    assert sorted([*learners, *others]) == sorted(LISTS.keys() - {"core"})
