"""The course, where answers are marked: every name can be imported, and every use raises one sentence."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class NotHere(Exception):
    """An answer uses a function of the course."""


class StandIn:
    """In place of a function, class or module of the course."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise NotHere(
            f"{self._name} is not there where answers are marked: an answer may use its arguments, Python, torch and what its own "
            "cells define"
        )

    __call__ = __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = __enter__ = __exit__ = __setattr__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __float__ = __index__ = _refuse

    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self._name}.{name}")


def check(id: str, answer: Any) -> Any:
    """Says nothing: what counts is found elsewhere."""
    return answer


def _nothing(*_: Any, **__: Any) -> None:
    """In place of what only prints."""


OURS: dict[str, Any] = {"check": check, "score": lambda id: 0.0, "tally": _nothing, "revisit": _nothing}


def stand_in_for(module: str) -> Callable[[str], Any]:
    """`__getattr__` of a module that has nothing of its own."""

    def find(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if PathFinder.find_spec(f"{module}.{name}", sys.modules[module].__path__) is not None:  # a module that is here
            return import_module(f"{module}.{name}")
        return OURS[name] if name in OURS and module.startswith("labsupport.exercises") else StandIn(f"{module}.{name}")

    return find


class _Finder(MetaPathFinder, Loader):
    """Makes each module of the course that is not in this folder."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith("labsupport.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = stand_in_for(module.__name__)


sys.meta_path.append(_Finder())
_find = stand_in_for(__name__)


def __getattr__(name: str) -> Any:
    return _find(name)
