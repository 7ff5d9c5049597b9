"""Add the course to a Python that has most of it already and whose other programs rely on that, as on Colab.

Only what is missing or too old is added, in the versions of requirements.lock, which the course was proved with, and all else stays
at the version that is there; torch, for one, is never replaced. The set-up cell calls `install_missing`; elsewhere it is
`python -m labsupport.course.missing`, in a clone. Like install.py it needs the standard library alone.
"""

from __future__ import annotations

import re
import sys
import tempfile
import time
from pathlib import Path

from labsupport import install

KEPT = ("torch", "triton", "numpy", "ipywidgets")  # what is never replaced: other programs there are built on them


def canonical(name: str) -> str:
    """The name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parsed(requirement: str) -> tuple[str, str]:
    """Canonical name and range of a requirement: ("triton", ">=3.4"). The range is None if its marker says: not on this system."""
    found = re.match(r"(\w[\w.-]*)\s*(?:\[[^]]*\])?\s*\(?([^;)]*)\)?\s*(?:;\s*(.*))?$", requirement.strip())
    if not found:
        raise install.InstallError(f"{requirement!r} is not a requirement that the course can read")
    name, wanted, marker = found.groups()
    system = re.fullmatch(r"""sys_platform == ['"](\w+)['"]""", marker or "")
    return canonical(name), None if system and system.group(1) != sys.platform else wanted.replace(" ", "")


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version lies in a range like ">=7.7,<9". Only the numbers of the release count, not what follows, as +cu128."""

    def numbers(text: str) -> list[int]:
        release = [int(n) for n in re.match(r"\d*(?:\.\d+)*", text).group().split(".") if n]
        return release + [0] * (8 - len(release))

    compare = {"<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b, ">=": lambda a, b: a >= b}
    compare.update({"==": lambda a, b: a == b, "!=": lambda a, b: a != b})
    for part in filter(None, wanted.split(",")):
        found = re.fullmatch(r"(<=|>=|==|!=|<|>)(\d[\w.]*)", part)
        if not found:
            raise install.InstallError(f"{part!r} is not a range that the course can read: it knows < <= > >= == and !=")
        if not compare[found.group(1)](numbers(version), numbers(found.group(2))):
            return False
    return True


def stays(installed: dict[str, str], wanted: list[str], asks: dict[str, list[str]]) -> dict[str, str]:
    """Which of the `installed` distributions, name to version, must stay as they are so that `wanted` can be added.

    All but those out of range, and what those ask for, by `asks`, and so on: pip may move that to where the new versions want it.
    Of these, KEPT stay nevertheless. Raises install.InstallError if one of KEPT is out of range.
    """
    free = set()
    for requirement in wanted:
        name, needed = parsed(requirement)
        if needed is None or name not in installed or satisfies(installed[name], needed):
            continue
        if name in KEPT:
            raise install.InstallError(
                f"{name} {installed[name]} is installed here, the course needs {requirement.split(';')[0].strip()}, and it is not "
                "replaced, since other programs here rely on it: choose a newer runtime (Colab: Runtime, Change runtime type)"
            )
        free.add(name)
    waiting = list(free)
    while waiting:
        found = {parsed(requirement)[0] for requirement in asks.get(waiting.pop(), []) if "extra ==" not in requirement}
        waiting += found - free
        free |= found
    return {name: version for name, version in installed.items() if name in KEPT or name not in free}


def locked(installed: dict[str, str], wanted: list[str], lock: str) -> dict[str, str]:
    """The versions, of the text of a lock file, in which pip is to add those of `wanted` that are not installed or are too old.

    Where one of KEPT is missing, the others of them decide.
    """
    pins = {}
    for name, needed in map(parsed, wanted):
        there = name in installed and satisfies(installed[name], needed or "")
        if needed is not None and not there and name not in KEPT:
            pins[name] = install.pinned(lock, name)
    return pins


def install_missing() -> None:
    """Install the course from this clone into the Python that runs this, with what it needs and that is missing or too old.

    pip must keep everything else at the version that is there. Afterwards `import labsupport` works, in the running process too.
    Raises install.InstallError.
    """
    from importlib import invalidate_caches

    install.check_python()
    start, log = time.monotonic(), Path(tempfile.mkdtemp(prefix="labs-")) / install.LOG
    before, asks = _installed()
    constraints = log.with_name("labs-constraints.txt")
    wanted = _core(install.ROOT / "pyproject.toml")
    kept = stays(before, wanted, asks)
    pins = kept | locked(before, wanted, (install.ROOT / "requirements.lock").read_text(encoding="utf-8"))
    constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()), encoding="utf-8")
    install.say("installing the course and what is missing here: about a minute")
    try:
        install.pip(Path(sys.executable), log, "--constraint", str(constraints), "-e", str(install.ROOT), "--compile")
    except install.InstallError as error:
        raise _conflict(log.read_text(encoding="utf-8")) or error from None
    invalidate_caches()
    if str(install.ROOT) not in sys.path:
        sys.path.insert(0, str(install.ROOT))  # a running Python does not look for what pip adds to its path
    after, _ = _installed()
    moved = {name: version for name, version in after.items() if before.get(name) not in (None, version)}
    added = [f"{name} {version}" for name, version in after.items() if name not in before]
    install.say(f"ready after {time.monotonic() - start:.0f} s; added {', '.join(added) or 'nothing'}")
    if moved:
        install.say(f"replaced, as too old: {', '.join(f'{name} {before[name]} by {version}' for name, version in moved.items())}")
    loaded = [name for name, _ in map(parsed, wanted) if name in moved and name.replace("-", "_") in sys.modules]
    if loaded:
        raise install.InstallError(
            f"{', '.join(loaded)} had been imported before: restart the runtime, then run the notebook from the top"
        )


def _installed() -> tuple[dict[str, str], dict[str, list[str]]]:
    """The distributions that this Python finds: name to version, and name to what it asks for."""
    from importlib import metadata

    versions, asks = {}, {}
    for found in metadata.distributions():
        name, version = canonical(found.metadata["Name"] or ""), found.metadata["Version"] or ""
        # Where two folders hold one, the first is imported. What pip cannot read as a version it cannot keep either.
        if name not in versions and re.fullmatch(r"\d[\w.!]*(\+[\w.]+)?", version):
            versions[name], asks[name] = version, found.requires or []
    return versions, asks


def _core(pyproject: Path) -> list[str]:
    import tomllib

    return tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]


def _conflict(text: str) -> install.InstallError | None:
    """What pip says of packages that do not go together, without the advice that follows it."""
    found = re.search(r"The conflict is caused by:\n(.*?)\n\s*\n", text, re.DOTALL)
    if not found:
        return None
    causes = "; ".join(" ".join(line.split()) for line in found.group(1).splitlines())
    return install.InstallError(f"what is installed here and what the course needs do not go together: {causes}")


if __name__ == "__main__":
    try:
        install_missing()
    except (install.InstallError, OSError) as problem:
        sys.exit(f"labs: {problem}")
