"""One list of dependencies, in pyproject.toml: the lock, conda's file and Binder's folder follow it."""

from __future__ import annotations

import os
import re
from copy import deepcopy
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from labsupport.course import lock

ROOT = Path(__file__).resolve().parents[1]
LISTS = lock.lists_of(ROOT / "pyproject.toml")
RECORDED, PINS = lock.read(ROOT / "requirements.lock")


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
    body = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][A-Za-z0-9.]*( ; sys_platform == 'linux')?", line) for line in body)
    assert [line.split("==")[0] for line in body if ";" in line] == ["triton"]  # it has no wheels for other systems
    assert list(PINS) == sorted(PINS)


@pytest.mark.parametrize("line", ["-e .", "numpy>=1", "Numpy==1.0", "torch @ file:///x.whl", "--index-url x", "a==1 ; x"])
def test_a_line_that_is_not_a_pin_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "x.lock").write_text(f"{line}\n")
    with pytest.raises(lock.LockError, match="wanted only lines like"):
        lock.read(tmp_path / "x.lock")


def test_locking_what_is_not_installed_is_refused() -> None:
    with pytest.raises(lock.LockError, match=r"no-such-package>=1 is not installed, and pyproject.toml asks for it"):
        lock.closure([Requirement("no-such-package>=1")])
    with pytest.raises(lock.LockError, match=r"numpy .* is installed, but pyproject.toml asks for numpy<1"):
        lock.closure([Requirement("numpy<1")])


@pytest.mark.slow
def test_writing_the_lock_again_changes_nothing(tmp_path: Path) -> None:
    lock.write(ROOT / "pyproject.toml", tmp_path / "requirements.lock")
    assert lock.read(tmp_path / "requirements.lock") == (RECORDED, PINS)


def test_conda_lists_nothing_itself() -> None:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    named = [item for item in listed if isinstance(item, str)]
    assert {re.split(r"[=<>]", item)[0] for item in named} == {"python", "pip"}
    assert [item for item in listed if not isinstance(item, str)] == [{"pip": ["-r requirements.lock", "-e ."]}]
    (python,) = (item for item in named if item.startswith("python"))
    assert python.split("=")[-1] in lock.PYTHONS


def test_binder_lists_nothing_itself() -> None:
    folder = ROOT / "binder"
    assert {p.name for p in folder.iterdir()} == {"runtime.txt", "postBuild"}
    assert (folder / "runtime.txt").read_text().strip().removeprefix("python-") in lock.PYTHONS
    commands = [line for line in (folder / "postBuild").read_text().splitlines() if line and not line.startswith("#")]
    assert commands == ["set -e", "python labsupport/install.py --here"]
    assert os.access(folder / "postBuild", os.X_OK)
