"""What a notebook needs is on Colab or is added there, and what Colab has stays: its list against ours, without a network.

`make colab` runs the notebooks in an environment of these versions. Here only lists are compared.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata, util
from pathlib import Path

import nbformat
import pytest
from colab import environment
from packaging.requirements import Requirement

import labsupport
from labsupport import __version__, install
from labsupport.course import lock, missing, setup_cell
from labsupport.evidence import measurements

ROOT = Path(__file__).resolve().parents[1]
COLAB = environment.published()
LISTS = lock.lists_of(ROOT / "pyproject.toml")
ASKED_FOR_BY_NAME = {"cyllama", "dask_gateway"}  # `labs` says what they are for and how they are installed
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRIES = re.compile(r"find_spec\([\"'](\w+)[\"']\)")  # a cell that goes on without a module if it is not there
ADDRESS = "https://github.com/some/course"


# Packages. -------------------------------------------------------------------------------------------------------------


@cache
def core() -> dict[str, str]:
    """All that the course's own requirements lead to, in this environment."""
    return lock.closure(map(Requirement, LISTS["core"]))


def staying(wanted: list[str]) -> dict[str, str]:
    """What would stay on Colab. What Colab's packages ask for is taken to be what the same ones ask for here."""
    asks = {name: metadata.requires(name) or [] for name in core()}
    return missing.stays({name: version for name, version in COLAB.items() if version}, wanted, asks)


def clashes(wanted: list[str]) -> Iterator[str]:
    """Where what is added on Colab does not go together with what stays there."""
    stays = staying(wanted)
    for name in core().keys() - stays.keys():
        for need in lock.needs(name):
            version = stays.get(missing.canonical(need.name))
            if version and not need.specifier.contains(version, prereleases=True):
                yield f"{name} needs {need}, and Colab keeps {version}"


def test_the_list_is_whole_and_says_where_it_is_from() -> None:
    assert len(COLAB) > 600
    assert set(missing.KEPT) <= {name for name, version in COLAB.items() if version}
    assert "googlecolab/backend-info" in environment.origin()["source"]
    assert re.match(r"20\d\d-\d\d", environment.origin()["date"])
    # A version stands wherever the course may use the package: what Colab lacks of it is what the set-up cell adds.
    unknown = {name for name in core() if name in COLAB and not COLAB[name]}
    assert not unknown, f"packages.txt has no version of {sorted(unknown)}"


def test_colab_keeps_what_the_course_does_not_need_newer() -> None:
    stays = staying(LISTS["core"])
    assert {name: stays[name] for name in missing.KEPT} == {name: COLAB[name] for name in missing.KEPT}
    for requirement in map(Requirement, LISTS["core"]):
        name = missing.canonical(requirement.name)
        kept = stays.get(name)
        assert kept is None or requirement.specifier.contains(kept, prereleases=True), requirement


def test_what_is_added_goes_together_with_what_stays() -> None:
    assert list(clashes(LISTS["core"])) == []


@pytest.mark.parametrize("requirement", ["numpy>=2.3", "torch>=2.12", "ipywidgets>=8", "triton<3.6; sys_platform == 'linux'"])
def test_a_range_that_would_replace_what_must_stay_is_refused(requirement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.sys, "platform", "linux")
    name = Requirement(requirement).name
    with pytest.raises(install.InstallError, match=rf"^{name} {re.escape(COLAB[name])} is installed here, the course needs"):
        staying([requirement])


def test_an_addition_that_needs_something_newer_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = lock.needs
    added = {"bitsandbytes": [Requirement("numpy>=2.3")]}
    monkeypatch.setattr(lock, "needs", lambda name: added.get(name, []) + needs(name))
    assert list(clashes(LISTS["core"])) == ["bitsandbytes needs numpy>=2.3, and Colab keeps 2.0.2"]


# Imports. --------------------------------------------------------------------------------------------------------------


def imported(tree: ast.AST, late: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules that code imports and the names it takes from each. late: inside functions as well."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield ("." * node.level + (node.module or ""), tuple(alias.name for alias in node.names))
        elif (late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)) and not for_types_alone(node):
            yield from imported(node, late)


def for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@cache
def of_module(path: Path, late: bool) -> list[tuple[str, tuple[str, ...]]]:
    return list(imported(ast.parse(path.read_text("utf-8")), late))


def file_of(module: str) -> Path | None:
    """The file of a module of labsupport, None where it is none."""
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)


def reached(start: Iterable[tuple[str, tuple[str, ...]]]) -> Iterator[tuple[str, str]]:
    """Modules from elsewhere that importing `start` imports, through labsupport's own modules: the module, and who imports it."""
    waiting, seen = [(found, "the notebook") for found in start], set()
    while waiting:
        (module, names), by = waiting.pop()
        if not module.startswith("labsupport"):
            yield module.split(".")[0], by
            continue
        parents = [module.rsplit(".", n)[0] for n in range(module.count("."), -1, -1)]
        lazy = labsupport._PACKAGE_OF | {}
        inside = [f"{module}.{name}" if module != "labsupport" else f"labsupport.{lazy.get(name, '')}.{name}" for name in names]
        if module == "labsupport":
            inside += [labsupport._FUNCTIONS[name] for name in names if name in labsupport._FUNCTIONS]
        for each in {*parents, *inside} - seen:
            seen.add(each)
            if path := file_of(each):
                waiting += [(found, str(path.relative_to(ROOT))) for found in of_module(path, False)]


@cache
def distributions() -> dict[str, list[str]]:
    return {module: list(map(missing.canonical, names)) for module, names in metadata.packages_distributions().items()}


def lacking(modules: Iterable[tuple[str, str]], extras: Iterable[str] = ()) -> list[str]:
    """Which modules no package provides that Colab has, that the course's requirements lead to, or that `extras` name."""
    provided = COLAB.keys() | core().keys() | set(extras)
    known = {name for name in distributions() if provided & set(distributions()[name])} | sys.stdlib_module_names
    return sorted({f"{module}, imported by {by}" for module, by in modules if module not in known})


def cells(notebook: nbformat.NotebookNode) -> Iterator[ast.AST]:
    for cell in notebook.cells:
        if cell.cell_type == "code":
            source = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!")))
            yield ast.parse(source)


def asked(notebook: nbformat.NotebookNode) -> list[tuple[str, tuple[str, ...]]]:
    """What the cells import, wherever it stands, but for modules that the notebook tries and can do without."""
    tried = {name for cell in notebook.cells for name in TRIES.findall(cell.source)}
    found = [pair for tree in cells(notebook) for pair in imported(tree, late=True)]
    return [(module, names) for module, names in found if module.split(".")[0] not in tried]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_needs_only_what_colab_has_or_is_given(path: Path) -> None:
    assert lacking(reached(asked(nbformat.read(path, as_version=4)))) == []


def test_what_a_notebook_reaches_is_not_little() -> None:
    """The way from a notebook through labsupport is followed: what stands below is imported by its modules alone."""
    modules = {module for module, _ in reached(asked(nbformat.read(NOTEBOOKS[-1], as_version=4)))}
    assert {"torch", "matplotlib", "ipywidgets", "tqdm", "safetensors", "psutil"} <= modules


@pytest.mark.parametrize(
    ("cell", "lacks"),
    [
        ("import gguf", "gguf, imported by the notebook"),
        ("def f():\n    from hypothesis import given", "hypothesis, imported by the notebook"),
        ("import no_such_module", "no_such_module, imported by the notebook"),
    ],
)
def test_a_notebook_that_needs_more_is_noticed(cell: str, lacks: str) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
    assert lacks in lacking(reached(asked(notebook)))
    notebook.cells.append(nbformat.v4.new_code_cell(f'find_spec("{lacks.partition(",")[0]}")'))
    assert lacking(reached(asked(notebook))) == []  # it goes on without


def test_what_a_module_needs_that_a_module_of_a_notebook_imports_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "labsupport" / "quant"
    package.mkdir(parents=True)
    for path, source in {
        package
        / "first.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nbgrader\nfrom labsupport.quant import last",
        package / "last.py": "import gguf\ndef late():\n    import hypothesis",
        package / "__init__.py": "",
        package.parent / "__init__.py": "",
    }.items():
        path.write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    tree = ast.parse("from labsupport.quant.first import anything")
    assert lacking(reached(imported(tree, True))) == ["gguf, imported by labsupport/quant/last.py"]


def test_what_labsupport_may_import_is_in_a_list_or_on_colab() -> None:
    """Late imports as well, each of which is for one of the lists of pyproject.toml."""
    extras = [missing.canonical(Requirement(requirement).name) for listed in LISTS.values() for requirement in listed]
    found = []
    for path in (ROOT / "labsupport").rglob("*.py"):
        modules = {module.split(".")[0] for module, _ in of_module(path, True)} - {"labsupport", "", *ASKED_FOR_BY_NAME}
        found += [(module, str(path.relative_to(ROOT))) for module in modules]
    assert lacking(found, extras) == ["transport, imported by labsupport/grading/runner.py"]  # a file beside it, in the sandbox


# What `make colab ARGS=--write` has stored. ----------------------------------------------------------------------------


@pytest.mark.parametrize("python", ["3.11", "3.13"])
def test_every_notebook_ran_on_the_oldest_and_the_newest_python(python: str) -> None:
    about, rows = measurements.read(ROOT / "data" / "measurements" / "colab.json")
    assert about["packages"] == environment.origin()  # a newer list, and the notebooks are run again
    mine = [row for row in rows if row["versions"]["Python"].startswith(f"{python}.") and row["device"] == "cpu"]
    assert [row["notebook"] for row in mine] == [path.stem for path in NOTEBOOKS]
    for row in mine:
        assert row["faults"] == [], row["notebook"]
        assert 0 < row["peak"] <= 1.5e9, row["notebook"]
        assert row["versions"]["ipywidgets"] == COLAB["ipywidgets"]


# The set-up cell. ------------------------------------------------------------------------------------------------------


def cell_with(source: str, tags: tuple[str, ...] = ("setup",)) -> nbformat.NotebookNode:
    return nbformat.v4.new_code_cell(source, metadata={"tags": list(tags)})


def test_the_set_up_cell_clones_the_tag_of_this_version_and_makes_one_call() -> None:
    source = setup_cell.setup(ADDRESS)
    assert len(source.splitlines()) == 6
    assert f"-b v{__version__} {ADDRESS} course" in source
    assert source.count(ADDRESS) == 1
    (tried, *_) = ast.parse(source).body
    assert isinstance(tried, ast.Try)
    assert ast.unparse(tried.body) == "import labsupport"  # where it is installed nothing else happens
    assert "".join(source.splitlines(keepends=True)[2:]) == setup_cell.SETUP == setup_cell.setup()


@pytest.mark.parametrize("version", ["0.1.0", "1.12", "2.0.0rc1"])
def test_address_and_version_are_no_part_of_what_is_executed(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_cell, "__version__", version)
    for address in (ADDRESS, "https://github.com/o.t-her/na_me"):
        assert setup_cell.executed(cell_with(setup_cell.setup(address))) == setup_cell.SETUP


@pytest.mark.parametrize(
    "source",
    [
        setup_cell.SETUP,
        setup_cell.setup(ADDRESS).replace("import sys;", "import sys, os;"),
        setup_cell.setup(ADDRESS).replace("github.com", "example.org"),
        setup_cell.setup(ADDRESS).replace("-b v", "-b main v"),
        "x = 1\n" + setup_cell.setup(ADDRESS),
    ],
)
def test_anything_else_before_it_is(source: str) -> None:
    assert setup_cell.executed(cell_with(source)) == source


def test_only_the_set_up_cell_has_such_a_part() -> None:
    source = setup_cell.setup(ADDRESS)
    assert setup_cell.executed(cell_with(source, tags=())) == source


def test_the_function_that_the_cell_calls_is_there() -> None:
    assert util.find_spec("labsupport.course.missing") is not None
    (name,) = re.findall(r"import (\w+); \1\(\)$", setup_cell.INSTALL)
    assert callable(getattr(missing, name))
