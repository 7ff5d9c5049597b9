"""Where things stand in labsupport: who may import whom, how many folders there are, how long a module may be."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "labsupport"
MODULES = sorted(PACKAGE.rglob("*.py"))
FOLDERS_AT_MOST = 12  # folders and modules at the top of labsupport, beside __init__.py and Jupyter's settings
LINES_AT_MOST, CHAPTER_AT_MOST = 400, 600


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contract in `folder`/pyproject.toml against the labsupport that lies in `folder`."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_the_import_contract_is_kept() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


WRONG_IMPORTS = {
    "a lower folder imports a higher one": (
        "quant/rtn.py", "from labsupport.model import models",
        "labsupport.quant is not allowed to import labsupport.model",
    ),
    "an import inside a function": (
        "model/text.py", "def late():\n    from labsupport.exercises import check",
        "labsupport.model is not allowed to import labsupport.exercises",
    ),
    "two folders of one line": (
        "figures/base.py", "from labsupport.exercises.registry import get",
        "labsupport.figures is not allowed to import labsupport.exercises",
    ),
    "install.py is imported": (
        "quant/grid.py", "from labsupport import install", "labsupport.quant is not allowed to import labsupport.install",
    ),
    "a folder that has no line": ("grades/__init__.py", "", "labsupport.grades"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_IMPORTS)
@pytest.mark.slow
def test_a_wrong_import_breaks_the_contract(kind: str, tmp_path: Path) -> None:
    name, line, message = WRONG_IMPORTS[kind]
    shutil.copytree(PACKAGE, tmp_path / "labsupport", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "labsupport" / name
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        file.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1
    assert message in done.stdout


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Every import in a module, the late ones too, as (module, name imported from it or "")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def through_the_package(source: str) -> list[str]:
    """What a module imports from labsupport itself although it lies elsewhere. The contract does not see such an import."""
    top = {path.stem for path in PACKAGE.iterdir()} | {"PACKAGE", "__version__"}
    found = list(imports(source))
    names = [name for module, name in found if module == "labsupport" and name not in top]
    return [*names, *(module for module, _ in found if module.startswith("."))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_through_the_names_for_notebooks(path: Path) -> None:
    assert through_the_package(path.read_text("utf-8")) == []


def test_an_import_through_the_names_for_notebooks_is_noticed() -> None:
    assert through_the_package("from labsupport import models, PACKAGE") == ["models"]
    assert through_the_package("def f():\n    from labsupport import quantize_model") == ["quantize_model"]
    assert through_the_package("import labsupport") == [""]
    assert through_the_package("from . import text") == ["."]
    assert through_the_package("from labsupport import kernels\nfrom labsupport.model import models") == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "quant").glob("*.py")), ids=lambda path: path.name)
def test_methods_need_torch_alone(path: Path) -> None:
    needed = {module.split(".")[0] for module, _ in imports(path.read_text("utf-8"))}
    assert needed <= sys.stdlib_module_names | {"torch", "labsupport"}


def test_the_package_has_few_folders() -> None:
    found = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "__pycache__", "jupyter", ".ipynb_checkpoints"}
    assert len(found) <= FOLDERS_AT_MOST, sorted(found)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_can_be_read_in_one_sitting(path: Path) -> None:
    name = path.relative_to(PACKAGE).as_posix()
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= (CHAPTER_AT_MOST if name.startswith("exercises/") else LINES_AT_MOST)


@pytest.mark.parametrize("folder", sorted(path.parent for path in PACKAGE.glob("*/__init__.py")), ids=lambda path: path.name)
def test_each_folder_says_what_it_is_for(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8")))
    assert text, f"labsupport/{folder.name}/__init__.py has no docstring"
    assert text.splitlines()[0].endswith("."), "its first line is one sentence"
