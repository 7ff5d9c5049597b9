"""The texts of the capstone: held-out modules in which names have been changed, and code that is no part of the course.

What is scored is held-out code in which every name that a module defines is another one, so that nobody has it by name. A key
decides the new names. Modules of installed packages are drawn afresh in every run: a model that has learned the held-out code, with
its own names or with those of the competition, is better there than on other code.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.util
import keyword
import random
import re
from collections.abc import Iterator
from pathlib import Path

from labsupport.model import text
from labsupport.model.text import SKIPPED_PARTS, Document, TextError, TokenStream

KEY = "capstone"
SHORTEST = 3  # letters of a name that is changed: "i" and "fd" stay
KEPT = frozenset(keyword.kwlist) | frozenset(keyword.softkwlist) | frozenset(dir(builtins)) | {"self", "cls", "args", "kwargs"}
PACKAGES = ("torch", "transformers", "numpy")  # needed by the course, and never learned from
MODULES, CHARACTERS = 48, (4_000, 8_000)  # that are drawn; the least that one has, and the most that is taken of it
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def names_defined(source: str) -> set[str]:
    """Names of functions, classes, arguments, variables and attributes that a module itself sets. Empty for what is no Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return set()
    return {name for name in _bound(tree) if len(name) >= SHORTEST and name not in KEPT and not name.startswith("__")}


def _bound(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg):
            yield node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def style(name: str) -> str:
    """Names are exchanged with names of the same style: "NAME", "Name", "_name" or "name"."""
    bare = name.lstrip("_")
    kind = "NAME" if bare.isupper() else "Name" if bare[:1].isupper() else "name"
    return "_" * (name != bare) + kind


def renamed(documents: list[Document], key: str) -> list[Document]:
    """The documents with the names that each defines changed throughout, comments and docstrings included.

    The new names are some that other documents define, of the same style; which, the key, the document and the name decide.
    """
    defined = {document.name: names_defined(document.text) for document in documents}
    choices: dict[str, list[str]] = {}
    for name in sorted(set().union(*defined.values())):
        choices.setdefault(style(name), []).append(name)

    def change(document: Document) -> Document:
        new: dict[str, str] = {}
        taken = set(WORD.findall(document.text))  # two names must not become one
        for name in sorted(defined[document.name]):
            among = choices.get(style(name), [])
            for attempt in range(20):
                digest = hashlib.sha256(f"{key}\0{document.name}\0{name}\0{attempt}".encode()).digest()
                if among and (other := among[int.from_bytes(digest[:8], "big") % len(among)]) not in taken:
                    new[name] = other
                    taken.add(other)
                    break
        return Document(document.name, WORD.sub(lambda match: new.get(match[0], match[0]), document.text))

    return [change(document) for document in documents]


def held_out(tokenizer, key: str | None) -> TokenStream:
    """Tokens of the held-out code with the names of a key; with its own names for None. Documents come in the same order."""
    documents = text.documents("code", "heldout")
    if key is not None:
        documents = renamed(documents, key)
    return text.tokenize(tokenizer, documents, "code/heldout" if key is None else "code/heldout with changed names")


def other_code(tokenizer, seed: str) -> TokenStream:
    """Tokens of modules of PACKAGES, drawn by `seed`. Raises TextError where the packages hold no such modules."""
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            root = Path(spec.origin).parent
            found += [p for p in root.rglob("*.py") if SKIPPED_PARTS.isdisjoint(p.relative_to(root).parts)]
    least, most = CHARACTERS
    found = [path for path in sorted(found) if path.stat().st_size >= least]
    if len(found) < MODULES:
        raise TextError(f"{', '.join(PACKAGES)} hold {len(found)} modules of {least} characters, wanted {MODULES}")
    drawn = random.Random(seed).sample(found, MODULES)
    documents = [Document("/".join(path.parts[-3:]), path.read_text("utf-8", errors="replace")[:most]) for path in drawn]
    return text.tokenize(tokenizer, documents, "code of installed packages")
