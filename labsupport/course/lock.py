"""requirements.lock: what the running environment holds of all that pyproject.toml asks for, exactly.

Frozen from a CPU environment, so that no CUDA library is named: where there is a GPU, torch brings its own. Only what the
project's requirements lead to is written; whatever else happens to be installed stays out.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from labsupport.install import NEWEST, OLDEST
from labsupport.model import files

PYTHONS = tuple(f"3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1))
LINUX = "sys_platform == 'linux'"  # the one marker that the lock knows: on what has no wheels for other systems
PIN = re.compile(rf"([^=\s]+)==([^\s;]+)(?: ; {re.escape(LINUX)})?")


class LockError(ValueError):
    """The environment does not hold what pyproject.toml asks for, so it cannot be frozen."""


def lists_of(pyproject: Path) -> dict[str, list[str]]:
    """The lists of dependencies by name: "core" and every extra."""
    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    return {"core": project["dependencies"], **project["optional-dependencies"]}


def digest(lists: dict[str, list[str]]) -> str:
    """SHA-256 of the lists; comments, order and layout of pyproject.toml do not matter."""
    return hashlib.sha256(json.dumps({k: sorted(v) for k, v in sorted(lists.items())}).encode()).hexdigest()


def applies(requirement: Requirement, extras: Iterable[str] = ()) -> bool:
    """Whether the requirement's marker holds on Linux, on any Python that the course runs on. Elsewhere pip adds the rest."""
    if requirement.marker is None:
        return True
    linux = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix"}
    versions = [{**linux, "python_version": v, "python_full_version": f"{v}.0"} for v in PYTHONS]
    return any(requirement.marker.evaluate({**v, "extra": extra}) for v in versions for extra in ("", *extras))


def needs(name: str, extras: Iterable[str] = ()) -> list[Requirement]:
    """What an installed distribution needs here. Raises importlib.metadata.PackageNotFoundError."""
    requirements = map(Requirement, importlib.metadata.requires(name) or [])
    return [r for r in requirements if applies(r, extras)]


def closure(roots: Iterable[Requirement]) -> dict[str, str]:
    """Name to version of all that `roots` lead to. Raises LockError naming what is not installed or out of range."""
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(r, "pyproject.toml") for r in roots if applies(r)]
    while waiting:
        requirement, asker = waiting.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # Needed only by another Python than this one: left to pip there.
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            raise LockError(f"{requirement} is not installed, and {asker} asks for it") from None
        if not requirement.specifier.contains(version, prereleases=True):
            raise LockError(f"{name} {version} is installed, but {asker} asks for {requirement}")
        found[name] = Version(version).public  # torch's CPU build calls itself 2.x.y+cpu; the lock holds for every build
        if (name, extras) not in seen:
            seen.add((name, extras))
            waiting += [(r, name) for r in needs(name, extras)]
    return found


def _only_linux(requirement: Requirement) -> bool:
    return requirement.marker is not None and not requirement.marker.evaluate({"sys_platform": "other"})


def write(pyproject: Path, lock: Path) -> int:
    """Freeze the running environment into `lock` and return the number of packages. Raises LockError."""
    lists = lists_of(pyproject)
    roots = [Requirement(line) for each in lists.values() for line in each]
    packages = closure(roots)
    only_linux = packages.keys() - closure(r for r in roots if not _only_linux(r)).keys()
    header = [
        "# Written by `labs lock` from an environment that passes the tests; not edited by hand.",
        f"# pyproject.toml: sha256 {digest(lists)}",
        f"# frozen with Python {platform.python_version()}",
    ]
    pins = (f"{name}=={version}" + f" ; {LINUX}" * (name in only_linux) for name, version in sorted(packages.items()))
    files.write_text(lock, "\n".join([*header, *pins]) + "\n")
    return len(packages)


def read(lock: Path) -> tuple[str, dict[str, str]]:
    """The digest in the lock's header and its pins, name to version. Raises LockError for a line that is not a pin."""
    recorded, pins = "", {}
    for line in lock.read_text("utf-8").splitlines():
        if line.startswith("# pyproject.toml: sha256 "):
            recorded = line.rsplit(" ", 1)[1]
        elif line and not line.startswith("#"):
            pin = PIN.fullmatch(line)
            if pin is None or pin[1] != canonicalize_name(pin[1]):
                raise LockError(f"{lock.name} holds {line!r}, wanted only lines like name==1.2.3")
            pins[pin[1]] = pin[2]
    return recorded, pins


def faults(lists: dict[str, list[str]], recorded: str, pins: dict[str, str]) -> list[str]:
    """Where a lock, as `read` gives it, is not what pyproject.toml and this environment would give. Empty when all is well."""
    found = [] if recorded == digest(lists) else ["pyproject.toml's dependencies have changed since: `labs lock` freezes them anew"]
    roots = [Requirement(line) for each in lists.values() for line in each]
    for root in roots:
        pin = pins.get(canonicalize_name(root.name))
        if pin is None or not root.specifier.contains(pin, prereleases=True):
            found.append(f"pyproject.toml asks for {root}, the lock has {pin}")
    for name, pin in pins.items():
        try:
            installed = Version(importlib.metadata.version(name)).public
        except importlib.metadata.PackageNotFoundError:
            installed = "nothing"
        if installed != pin:
            found.append(f"the lock has {name}=={pin}, the environment {installed}")
    wanted = closure(roots)
    found += [f"{name} is needed, and the lock lacks it" for name in sorted(wanted.keys() - pins.keys())]
    return found + [f"{name} is in the lock, and nothing needs it" for name in sorted(pins.keys() - wanted.keys())]
