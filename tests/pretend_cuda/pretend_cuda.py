"""A CUDA device where there is none, so that mistakes with devices are found on a machine without a GPU.

`import pretend_cuda`, before torch, makes this process believe in one GPU, cuda:0. Its tensors have their bytes in the CPU's memory
and are computed with by the CPU's kernels, but what a GPU refuses is refused: tensors on two devices, `.numpy()`, generators of the
CPU, products of whole numbers, operators that only CPUs have, waiting for the device inside the capture of a graph. See
pretend_cuda.cpp. It shows nothing about speed or memory, nothing about what only a GPU's own kernels do, and it cannot be undone.

Raises ImportError where torch is already there or knows a real GPU, and where there is no C++ compiler.
"""

from __future__ import annotations

import builtins
import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILER = shutil.which("g++") or shutil.which("clang++")
NAME, MEMORY, CACHE = "Pretend GPU", 16 * 2**30, 4 * 2**20
PROGRAMS = 8  # of a Triton kernel that are run, along each axis: the interpreter takes tenths of a second for a long one


def missing() -> str | None:
    """Why there can be no pretend device here; None where there can."""
    if not sys.platform.startswith("linux"):
        return f"the pretend GPU is for Linux, and this is {platform.system()}"
    if COMPILER is None:
        return "the pretend GPU needs a C++ compiler, and there is none"
    if not metadata.version("torch").endswith("+cpu"):
        return f"the pretend GPU is for PyTorch's CPU build, and this is {metadata.version('torch')}"
    return None


def compiled() -> Path:
    """The library, compiled where this source and this torch were not seen before; that takes about a minute."""
    known = hashlib.sha256(SOURCE.read_bytes() + metadata.version("torch").encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"pretend-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is another user's: nothing is loaded from there")
    library = folder / f"{known}.so"
    if not library.exists():
        torch = _torch_folder()
        partial = library.with_suffix(f".{os.getpid()}")
        command = [COMPILER, "-shared", "-fPIC", "-O1", "-std=c++20", str(SOURCE), "-o", str(partial)]
        command += [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}", f"-L{torch / 'lib'}"]
        subprocess.run([*command, "-lc10", "-ltorch_cpu", "-ltorch"], check=True)
        partial.replace(library)
    return library


def _torch_folder() -> Path:
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def _loaded() -> ctypes.CDLL:
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so"):  # it is linked with them, and torch is not imported yet
        ctypes.CDLL(str(_torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(compiled()))
    library.operations.restype = ctypes.c_long
    library.start()
    return library


def operations() -> int:
    """How many operators have run on the device."""
    return _library.operations()


class Stream:
    """The only one: whatever is asked of it has already happened."""

    def __init__(self, *_, **__):
        self.device, self.cuda_stream = torch.device("cuda", 0), 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_) -> None:
        pass

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Event:
    def __init__(self, enable_timing: bool = False, **_):
        self.timed = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds. Raises RuntimeError for events that were not made to be timed."""
        if not (self.timed and end.timed):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        return 1e3 * (end.at - self.at)


class CUDAGraph:
    def replay(self) -> None:
        time.sleep(1e-5)  # nothing is computed again; a time of 0 could not be divided by


@contextmanager
def graph(of: CUDAGraph) -> Iterator[None]:
    """Work inside runs once, and may not wait for the device."""
    _library.capture(1)
    try:
        yield
    finally:
        _library.capture(0)


def _returns(value: object = None) -> Callable:
    return lambda *_, **__: value


def _pretend() -> None:
    """Let torch.cuda speak of the device."""
    about = SimpleNamespace(
        name=NAME, total_memory=MEMORY, L2_cache_size=CACHE, major=7, minor=5, multi_processor_count=40, warp_size=32
    )  # fmt: skip
    random = torch.Generator("cuda")
    answers = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "_is_in_bad_fork": False,
        "is_current_stream_capturing": False, "device_count": 1, "current_device": 0, "get_device_name": NAME,
        "get_device_capability": (7, 5), "get_device_properties": about, "mem_get_info": (MEMORY - 2**30, MEMORY),
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "get_arch_list": ["sm_75"],
        "_exchange_device": 0, "_maybe_exchange_device": 0, "device": nullcontext(), "stream": nullcontext(),
        "init": None, "_lazy_init": None, "set_device": None, "synchronize": None, "empty_cache": None,
        "reset_peak_memory_stats": None,
    }  # fmt: skip
    for name, value in answers.items():
        setattr(torch.cuda, name, _returns(value))
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.CUDAGraph, torch.cuda.graph = Stream, Event, CUDAGraph, graph
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *_: Stream()
    torch.cuda.default_generators = (random,)
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = lambda seed: random.manual_seed(int(seed)) and None
    torch.cuda.get_rng_state, torch.cuda.set_rng_state = (
        (lambda *_: random.get_state()),
        (lambda state, *_: random.set_state(state)),
    )
    torch.cuda.get_rng_state_all = lambda: [random.get_state()]
    torch.cuda.set_rng_state_all = lambda states: random.set_state(states[0])
    torch.cuda._lazy_call = lambda work, **_: work()


def _copy_tensors() -> None:
    """copy.deepcopy makes a new storage on the device from Python, which a CPU build of torch cannot."""
    ordinary = torch.Tensor.__deepcopy__

    def deepcopy(tensor: torch.Tensor, memo: dict) -> torch.Tensor:
        if not (tensor.is_cuda and tensor.is_leaf) or id(tensor) in memo:
            return ordinary(tensor, memo)
        memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]

    torch.Tensor.__deepcopy__ = deepcopy


def _serve_libraries() -> None:
    """bitsandbytes is imported as on a machine without a GPU: its library for GPUs cannot run. Triton's kernels are interpreted."""
    ordinary, available = builtins.__import__, torch.cuda.is_available

    def import_(name: str, *more, **named):
        if name.partition(".")[0] != "bitsandbytes" or "bitsandbytes" in sys.modules:
            return ordinary(name, *more, **named)
        torch.cuda.is_available = _returns(False)
        try:
            return ordinary(name, *more, **named)
        finally:
            torch.cuda.is_available = available

    builtins.__import__ = import_
    if importlib.util.find_spec("triton"):
        from triton.runtime.jit import JITFunction

        JITFunction.run = _interpret


def _interpret(kernel, *arguments, grid, warmup: bool = False, **settings) -> None:
    """Run a kernel in the interpreter; of a product as large as those that are timed, only a part."""
    from labsupport.kernels import language

    if any(isinstance(value, torch.Tensor) and not value.is_cuda for value in arguments):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    capturing = _library.capture(0)
    # On copies, which a kernel on a GPU does not need: the interpreter wants the CPU's memory, and has no bfloat16.
    copies = [value.cpu() if isinstance(value, torch.Tensor) else value for value in arguments]
    copies = [v.float() if isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16 else v for v in copies]
    language.interpret(kernel.fn, tuple(min(count, PROGRAMS) for count in grid), *copies, **settings)
    for value, computed in zip(arguments, copies, strict=True):
        if isinstance(value, torch.Tensor):
            value.copy_(computed)
    _library.capture(capturing)


if "torch" in sys.modules:
    raise ImportError("pretend_cuda comes too late: torch has asked for a GPU already")
if reason := missing():
    raise ImportError(reason)
_library = _loaded()
import torch  # noqa: E402

_pretend()
_copy_tensors()
_serve_libraries()
