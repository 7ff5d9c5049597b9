"""Triton, where it is installed: kernels are plain functions, compiled for a GPU or run by Triton's interpreter on a CPU.

There are Triton wheels for Linux only. Elsewhere `tl` is a stand-in that is enough to *define* a kernel; launching one raises
RuntimeError. A kernel is not decorated: the same function can then be compiled, interpreted, and handed to a learner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=int)

__all__ = ["MISSING", "assembly", "available", "interpret", "launch", "tl"]

MISSING = "Triton is not installed here (there are wheels for Linux only): pip install triton"


def available() -> bool:
    return triton is not None


@cache
def _compiled(kernel: Callable) -> Any:
    return triton.jit(kernel)


def launch(kernel: Callable, programs: tuple[int, ...], *tensors_and_sizes: Any, **settings: Any) -> None:
    """Run `programs` instances of a kernel: compiled where its tensors are on a GPU, otherwise in the interpreter.

    settings: the kernel's constexpr arguments by name, and on a GPU num_warps and num_stages.
    Raises RuntimeError without Triton; what a kernel raises in the interpreter is raised unchanged.
    """
    if triton is None:
        raise RuntimeError(MISSING)
    if any(isinstance(value, torch.Tensor) and value.is_cuda for value in tensors_and_sizes):
        _compiled(kernel)[programs](*tensors_and_sizes, **settings)
    else:
        interpret(kernel, programs, *tensors_and_sizes, **settings)


def interpret(kernel: Callable, programs: tuple[int, ...], *tensors_and_sizes: Any, **settings: Any) -> None:
    """Run a kernel with NumPy in place of a GPU, one program after the other. Arguments as in `launch`.

    Raises IndexError where it loads or stores outside of the tensors that it was given, which on a GPU may go unnoticed.
    """
    if triton is None:
        raise RuntimeError(MISSING)
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import InterpretedFunction

    settings = {name: value for name, value in settings.items() if name not in ("num_warps", "num_stages")}
    with _interpreted_helpers():
        tensors = [value for value in tensors_and_sizes if isinstance(value, torch.Tensor)]
        if not any(t.is_cuda for t in tensors):
            _watch_addresses([(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors])
        try:
            InterpretedFunction(kernel)[programs](*tensors_and_sizes, **settings)
        except InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None


@contextmanager
def _interpreted_helpers() -> Iterator[None]:
    """Let functions like tl.sum, which are compiled functions themselves, run in the interpreter; afterwards undo that.

    Triton has an environment variable for it, TRITON_INTERPRET, but that has to be set before Triton is imported and then holds
    for the whole process, in which a GPU could no longer be used.
    """
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, interpreter_semantic
    from triton.runtime.jit import JITFunction

    def as_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()  # before Triton 3.7 it is int() of an array: an error in NumPy 2.4

    patch_tensor, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, as_index
    options = interpreter_semantic.builder.options
    places = [JITFunction, tl, tl.core, tl.math, tl.tensor, tl.dtype]
    places += [getattr(tl.core, name) for name in ("tensor_descriptor_base",) if hasattr(tl.core, name)]
    before = [dict(vars(place)) for place in places]
    rewritten: dict[Callable, Callable] = {}

    def call(self: Any, *values: Any, **named: Any) -> Any:
        if self.fn in rewritten:
            return rewritten[self.fn](*values, **named)
        helper = InterpretedFunction(self.fn)
        result = helper(*values, **named)  # patches what it refers to, which takes milliseconds and lasts
        rewritten[self.fn] = helper.rewrite()
        return result

    JITFunction.__call__ = call
    # A third of the time goes into looking for integer overflow, which the interpreter reports only with its `debug`.
    interpreter_semantic.builder.options = replace(options, sanitize_overflow=options.sanitize_overflow and options.debug)
    try:
        yield
    finally:
        interpreter_semantic.builder.options = options
        interpreter._patch_lang_tensor = patch_tensor
        for place, names in zip(places, before, strict=True):
            now = dict(vars(place))
            for name in now.keys() - names.keys():
                delattr(place, name)
            for name, value in names.items():
                if now.get(name) is not value:
                    setattr(place, name, value)


def _watch_addresses(spans: list[tuple[int, int]]) -> None:
    """Have tl.load and tl.store check their addresses, until `_interpreted_helpers` puts the plain ones back."""
    import numpy as np
    from triton.runtime.interpreter import interpreter_semantic

    def outside(pointer: Any, mask: Any) -> bool:
        first = pointer.handle.data.astype(np.int64)
        last = first + pointer.dtype.scalar.element_ty.primitive_bitwidth // 8
        inside = np.zeros(first.shape, bool)
        for start, end in spans:
            inside |= (first >= start) & (last <= end)
        accessed = True if mask is None else getattr(getattr(mask, "handle", None), "data", mask)
        return bool((~inside & np.asarray(accessed, bool)).any())

    plain_load, plain_store = tl.load, tl.store

    def load(pointer: Any, mask: Any = None, other: Any = None, **named: Any) -> Any:
        if outside(pointer, mask):
            raise IndexError("tl.load reads outside of the tensors. Is a mask missing, or a stride wrong?")
        return plain_load(pointer, mask, other, **named, _semantic=interpreter_semantic)

    def store(pointer: Any, value: Any, mask: Any = None, **named: Any) -> Any:
        if outside(pointer, mask):
            raise IndexError("tl.store writes outside of the tensors. Is a mask missing, or a stride wrong?")
        return plain_store(pointer, value, mask, **named, _semantic=interpreter_semantic)

    tl.load, tl.store = load, store


def assembly(kernel: Callable, signature: dict[str, str], settings: dict[str, int], capability: int = 90, warps: int = 4) -> str:
    """A kernel compiled for an NVIDIA GPU of that compute capability (90: 9.0), as PTX text. No GPU is needed to compile.

    signature: Triton's type of every argument, such as "*fp16" or "i32"; "constexpr" for those in settings. Pointers and sizes
    are taken to be multiples of 16, as those of real layers are. Raises RuntimeError without Triton.
    """
    if triton is None:
        raise RuntimeError(MISSING)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = list(signature)
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if kind != "constexpr"}
    source = ASTSource(_compiled(kernel), signature, {(order.index(name),): v for name, v in settings.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm["ptx"]
