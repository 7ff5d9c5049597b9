"""requirements.lock: what the running environment holds of all that pyproject.toml asks for, exactly.

No CUDA library is named: torch's build for CUDA asks for its own, and the other builds need none. Only what the project's
requirements lead to is written; whatever else happens to be installed stays out. Each version comes with the SHA-256 of
all its files in the package index, those for other systems and Pythons too, and pip installs no other file from the lock.

What learners need stands first; the rest follows a line that install.py knows.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from labsupport.install import LEARNERS, NEWEST, OLDEST, REST
from labsupport.model import files

PYTHONS = tuple(f"3.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1))
LINUX = "sys_platform == 'linux'"  # the one marker that the lock knows: on what has no wheels for other systems
PIN = re.compile(rf"([^=\s]+)==([^\s;]+)(?: ; {re.escape(LINUX)})?((?: --hash=sha256:[0-9a-f]{{64}})+)")
CUDA = re.compile("(cuda|nvidia)-.+")  # canonical names of the libraries that torch's build for CUDA brings
NEXT_LINE = " \\\n    "  # how pip writes that a requirement goes on


class LockError(ValueError):
    """The environment does not hold what pyproject.toml asks for, so it cannot be frozen."""


class Lock(NamedTuple):
    """digest: of the lists it was written for. pins: name to version. hashes: name to the SHA-256 of the version's files."""

    digest: str
    pins: dict[str, str]
    hashes: dict[str, list[str]]


def for_learners(pyproject: Path) -> set[str]:
    """The names of all that a learner's environment holds, with what the package itself is built with."""
    asked = [line for name, lines in lists_of(pyproject).items() if name in ("core", *LEARNERS.split(",")) for line in lines]
    built = tomllib.loads(pyproject.read_text("utf-8"))["build-system"]["requires"]
    return set(closure(map(Requirement, asked + built)))


def lists_of(pyproject: Path) -> dict[str, list[str]]:
    """The lists of dependencies by name: "core" and every extra."""
    project = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    return {"core": project["dependencies"], **project["optional-dependencies"]}


def digest(lists: dict[str, list[str]]) -> str:
    """SHA-256 of the lists; comments, order and layout of pyproject.toml do not matter."""
    return hashlib.sha256(json.dumps({k: sorted(v) for k, v in sorted(lists.items())}).encode()).hexdigest()


def applies(requirement: Requirement, extras: Iterable[str] = (), system: str = "Linux") -> bool:
    """Whether the requirement's marker holds on a system, as platform.system() names it, on any Python that the course runs on."""
    if requirement.marker is None:
        return True
    here = {"sys_platform": system.lower(), "platform_system": system}
    versions = [{**here, "python_version": v, "python_full_version": f"{v}.0"} for v in PYTHONS]
    return any(requirement.marker.evaluate({**v, "extra": extra}) for v in versions for extra in ("", *extras))


def needs(name: str, extras: Iterable[str] = (), system: str = "Linux") -> list[Requirement]:
    """What an installed distribution needs, beside CUDA's libraries. Raises importlib.metadata.PackageNotFoundError."""
    requirements = map(Requirement, importlib.metadata.requires(name) or [])
    return [r for r in requirements if applies(r, extras, system) and not CUDA.fullmatch(canonicalize_name(r.name))]


def closure(roots: Iterable[Requirement], system: str = "Linux") -> dict[str, str]:
    """Name to version of all that `roots` lead to on Linux, or of that what another system needs as well, where pip adds the rest.

    Raises LockError naming what is not installed or out of range.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, frozenset[str]]] = set()
    waiting = [(r, "pyproject.toml") for r in roots if applies(r, system=system)]
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
            waiting += [(r, name) for r in needs(name, extras, system)]
    return found


def index_options() -> list[str]:
    """What tells uv of the package index that pip is configured for; nothing where that is pip's own."""
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True)
    lines = (line.partition("=") for line in done.stdout.splitlines())
    configured = {name: value.strip("'\"") for name, _, value in lines if name.endswith(".index-url")}
    order = (":env:.index-url", "install.index-url", "global.index-url")  # pip's own, the strongest first
    return next((["--default-index", configured[name]] for name in order if name in configured), [])


def hashes_of(pins: Mapping[str, str]) -> dict[str, list[str]]:
    """The SHA-256 of every file that the configured package index has of each version. Raises LockError where it has none.

    No file is downloaded: an index says the hashes.
    """
    asked = "".join(f"{name}=={version}\n" for name, version in pins.items())
    options = ["--no-config", "--no-deps", "--universal", "--generate-hashes", "--no-annotate", "--no-header", "--quiet"]
    command = [sys.executable, "-m", "uv", "pip", "compile", *options, "--python-version", PYTHONS[-1], *index_options(), "-"]
    done = subprocess.run(command, input=asked, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise LockError(f"the package index does not give the hashes: {' '.join(done.stderr.split())[:300]}")
    found: dict[str, list[str]] = {}
    for line in done.stdout.replace(NEXT_LINE, " ").splitlines():
        requirement, *hashes = line.split(" --hash=sha256:")
        found[requirement.partition("==")[0]] = sorted(hashes)
    if lacking := [f"{name}=={version}" for name, version in pins.items() if not found.get(name)]:
        raise LockError(f"the package index has no hashes for {', '.join(lacking)}")
    return found


def write(pyproject: Path, lock: Path) -> int:
    """Freeze the running environment into `lock` and return the number of packages. Raises LockError."""
    lists = lists_of(pyproject)
    roots = [Requirement(line) for each in lists.values() for line in each]
    packages, learners = closure(roots), for_learners(pyproject)
    only_linux = packages.keys() - closure(roots, system="Other").keys()
    lines = [
        "# Written by `labs lock` from an environment that passes the tests; not edited by hand.",
        f"# pyproject.toml: sha256 {digest(lists)}",
        f"# frozen with Python {platform.python_version()}",
    ]
    hashes = hashes_of(packages)
    for name, version in sorted(packages.items(), key=lambda item: (item[0] not in learners, item[0])):
        if name not in learners and REST not in lines:
            lines.append(REST)
        pin = f"{name}=={version}" + f" ; {LINUX}" * (name in only_linux)
        lines.append(NEXT_LINE.join([pin, *(f"--hash=sha256:{value}" for value in hashes[name])]))
    files.write_text(lock, "\n".join(lines) + "\n")
    return len(packages)


def read(lock: Path) -> Lock:
    """What `write` wrote. Raises LockError for a line that is not a pin with its hashes."""
    recorded, pins, hashes = "", {}, {}
    for line in lock.read_text("utf-8").replace(NEXT_LINE, " ").splitlines():
        if line.startswith("# pyproject.toml: sha256 "):
            recorded = line.rsplit(" ", 1)[1]
        elif line and not line.startswith("#"):
            pin = PIN.fullmatch(line)
            if pin is None or pin[1] != canonicalize_name(pin[1]):
                raise LockError(f"{lock.name} holds {line[:200]!r}, wanted only lines like name==1.2.3 --hash=sha256:...")
            pins[pin[1]], hashes[pin[1]] = pin[2], pin[3].replace("--hash=sha256:", "").split()
    return Lock(recorded, pins, hashes)


def faults(lists: dict[str, list[str]], recorded: str, pins: dict[str, str]) -> list[str]:
    """Where a lock's digest and pins are not what pyproject.toml and this environment would give. Empty when all is well."""
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
