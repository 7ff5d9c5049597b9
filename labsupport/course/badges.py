"""The public address of the repository, written where it is needed: badges in README.md, the set-up cells of the notebooks."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from nbformat import NotebookNode

from labsupport import __version__
from labsupport.course.build import BuildError, read, renewed, sources, student_path, write
from labsupport.course.setup_cell import ADDRESS, setup
from labsupport.model import files

BEGIN, END = "<!-- badges -->", "<!-- /badges -->"
TAG = f"v{__version__}"  # what a badge opens and what the set-up cell of the opened notebook clones are one version


def repository(root: Path) -> str:
    """`repository` of [tool.labs] in pyproject.toml, "" when unset. Raises BuildError if Colab and Binder cannot open it."""
    with (root / "pyproject.toml").open("rb") as file:
        address = tomllib.load(file).get("tool", {}).get("labs", {}).get("repository", "")
    address = address.strip().rstrip("/").removesuffix(".git")
    if address and not re.fullmatch(ADDRESS, address):
        raise BuildError(f"repository in [tool.labs] is {address!r}, wanted https://github.com/OWNER/NAME")
    return address


def badge_block(address: str, notebooks: list[Path]) -> str:
    """A table with a row for each notebook; nothing without an address."""
    if not address:
        return ""
    slug = address.removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{slug}/blob/{TAG}/notebooks"
    binder = f"https://mybinder.org/v2/gh/{slug}/{TAG}?urlpath=lab/tree/notebooks"
    rows = ["| notebook | Colab | Binder |", "|---|---|---|"]
    for path in notebooks:
        title = path.stem.replace("_", " ")
        rows.append(
            f"| {title} "
            f"| [![Open {title} in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}/{path.name}) "
            f"| [![Open {title} in Binder](https://mybinder.org/badge_logo.svg)]({binder}/{path.name}) |"
        )
    return "\n".join(rows) + "\n"


def _set_up_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if "setup" in cell.metadata.get("tags", [])]


def write_badges(root: Path) -> list[str]:
    """Bring README.md and the set-up cells of both forms in line with address and version. Returns what was done, a line each.

    Nothing is executed and no output becomes old: what changes in a set-up cell does nothing where the course is installed.
    Raises BuildError when README.md has no place for the badges, or a notebook no set-up cell.
    """
    address, notebooks = repository(root), sources(root)
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise BuildError(f"README.md needs one {BEGIN} and after it one {END}")
    changed: dict[Path, NotebookNode] = {}
    for path in notebooks:
        notebook, student = read(path), student_path(path)
        cells = _set_up_cells(notebook)
        if len(cells) != 1:
            raise BuildError(f"solutions/{path.name}: {len(cells)} cells have the tag setup, wanted one")
        blank = _set_up_cells(read(student)) if student.is_file() else []
        if {cell.source for cell in (*cells, *blank)} != {setup(address)}:
            cells[0].source = setup(address)
            changed |= {path: notebook, student: renewed(notebook, student)}
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    files.write_text(readme, f"{before}{BEGIN}\n{badge_block(address, notebooks)}{END}{after}")
    write(changed)

    lines = [f"badges of {len(notebooks)} notebooks point to {address}, version {TAG}: they work once a commit has that tag"]
    if not address:
        lines = ["the address is not set ([tool.labs] repository in pyproject.toml): no badges"]
    if changed:
        lines.append(f"set-up cell changed, in both forms, in {', '.join(p.name for p in notebooks if p in changed)}")
    return lines
