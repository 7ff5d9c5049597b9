"""Triton, where it is installed: kernels are plain functions, compiled for a GPU or run by Triton's interpreter on a CPU.

There are Triton wheels for Linux only. Elsewhere `tl` is a stand-in that is enough to *define* a kernel; launching one raises
RuntimeError. A kernel is not decorated: the same function can then be compiled, interpreted, and handed to a learner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=int)

MISSING = "Triton is not installed here (there are wheels for Linux only): pip install triton"


def available() -> bool:
    return triton is not None


@cache
def _compiled(kernel: Callable):
    return triton.jit(kernel)


def launch(kernel: Callable, programs: tuple[int, ...], *tensors_and_sizes: Any, **settings: Any) -> None:
    """Run `programs` instances of a kernel: compiled where its tensors are on a GPU, otherwise in the interpreter.

    settings: the kernel's constexpr arguments by name, and on a GPU num_warps and num_stages.
    Raises RuntimeError without Triton; what a kernel raises in the interpreter comes out as it was raised.
    """
    if triton is None:
        raise RuntimeError(MISSING)
    if any(isinstance(value, torch.Tensor) and value.is_cuda for value in tensors_and_sizes):
        _compiled(kernel)[programs](*tensors_and_sizes, **settings)
    else:
        interpret(kernel, programs, *tensors_and_sizes, **settings)


def interpret(kernel: Callable, programs: tuple[int, ...], *tensors_and_sizes: Any, **settings: Any) -> None:
    """Run a kernel with NumPy in place of a GPU, one program after the other. Arguments as in `launch`."""
    if triton is None:
        raise RuntimeError(MISSING)
    from triton.runtime.errors import InterpreterError
    from triton.runtime.interpreter import InterpretedFunction

    settings = {name: value for name, value in settings.items() if name not in ("num_warps", "num_stages")}
    with _interpreted_helpers():
        try:
            InterpretedFunction(kernel)[programs](*tensors_and_sizes, **settings)
        except InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None


@contextmanager
def _interpreted_helpers() -> Iterator[None]:
    """Let tl.sum and its like, which are compiled functions themselves, run in the interpreter; afterwards all is as before.

    Triton has an environment variable for it, TRITON_INTERPRET, but that has to be set before Triton is imported and then holds
    for the whole process, in which a GPU could no longer be used.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    places = [JITFunction, tl, tl.core, tl.math, tl.tensor, tl.dtype]
    places += [getattr(tl.core, name) for name in ("tensor_descriptor_base",) if hasattr(tl.core, name)]
    before = [dict(vars(place)) for place in places]
    JITFunction.__call__ = lambda self, *values, **named: InterpretedFunction(self.fn)(*values, **named)
    try:
        yield
    finally:
        for place, names in zip(places, before, strict=True):
            now = dict(vars(place))
            for name in now.keys() - names.keys():
                delattr(place, name)
            for name, value in names.items():
                if now.get(name) is not value:
                    setattr(place, name, value)


def assembly(kernel: Callable, signature: dict[str, str], settings: dict[str, int], capability: int = 90, warps: int = 4) -> str:
    """What a kernel becomes on an NVIDIA GPU of compute capability 9.0, as PTX text. No GPU is needed to compile.

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
