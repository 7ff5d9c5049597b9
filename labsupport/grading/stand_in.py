"""The course, where answers are marked: every name can be imported, and every use raises one sentence."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class NotHere(Exception):
    """An answer uses a function of the course."""


class StandIn:
    """In place of a function, class or module of the course. `check` and its like do nothing, as they stand in cells of all kinds."""

    def __init__(self, name: str) -> None:
        self.__dict__["_name"] = name

    def _refuse(self, *_, **__):
        raise NotHere(
            f"{self._name} is not there where answers are marked: an answer may use its arguments, Python, torch and what its own "
            "cells define"
        )

    __call__ = __getitem__ = __setitem__ = __iter__ = __len__ = __bool__ = __enter__ = __exit__ = __setattr__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __float__ = __index__ = _refuse

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self._name}.{name}")


def check(id, answer):
    """Says nothing: what counts is found elsewhere."""
    return answer


def _nothing(*_, **__):
    return None


OURS = {"check": check, "score": lambda id: 0.0, "tally": _nothing, "revisit": _nothing}


def stand_in_for(module: str):
    """`__getattr__` of a module that has nothing of its own."""

    def find(name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if PathFinder.find_spec(f"{module}.{name}", sys.modules[module].__path__) is not None:  # a module that is here
            return import_module(f"{module}.{name}")
        return OURS[name] if name in OURS and module.startswith("labsupport.exercises") else StandIn(f"{module}.{name}")

    return find


class _Finder:
    """Makes each module of the course that is not in this folder."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        return ModuleSpec(name, _Finder, is_package=True) if name.startswith("labsupport.") else None

    @staticmethod
    def create_module(spec):
        return ModuleType(spec.name)

    @staticmethod
    def exec_module(module):
        module.__path__ = []
        module.__getattr__ = stand_in_for(module.__name__)


sys.meta_path.append(_Finder)
_find = stand_in_for(__name__)


def __getattr__(name: str):
    return _find(name)
