"""This machine: what it is, and how many bytes and operations a second it reaches. Measured when asked for, and not stored."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from labsupport.model import memory, quick

PACKAGES = ("torch", "transformers", "bitsandbytes")
SMALLEST_BUFFER, LARGEST_BUFFER = 2**28, 2**30
SQUARES, LONG_ENOUGH = (512, 1024, 2048, 4096, 8192), 0.02
USUAL_CACHE = 2**25  # where the system does not say how large its last cache is


@dataclass(frozen=True)
class Machine:
    """device: "cpu" or "cuda". name: of processor or GPU. cores: that this process may use. memory, cache: bytes, on the device."""

    device: str
    name: str
    cores: int
    memory: int
    cache: int | None
    versions: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.device})", f"{self.cores} CPU cores, {self.memory / 2**30:.0f} GiB of memory"]
        if self.cache:
            lines[1] += f", last-level cache {self.cache / 2**20:.0f} MiB"
        return "\n".join([*lines, ", ".join(f"{name} {version}" for name, version in self.versions.items())])


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def describe(device: str | torch.device | None = None) -> Machine:
    """What this machine is. device: by default the GPU, if there is one."""
    device = _device(device)
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        return Machine("cuda", about.name, cores, about.total_memory, about.L2_cache_size, versions)
    return Machine(device.type, _processor(), cores, memory.here().total, _cache(), versions)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    if about.is_file():
        for line in about.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cache() -> int | None:
    """The largest cache of the first core, in bytes, where Linux lists it."""
    units = {"K": 2**10, "M": 2**20}
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units and s[:-1].isdigit()), default=None)


def median_seconds(work: Callable[[], object], device: str | torch.device | None = None, budget: float = 0.5) -> float:
    """Median time of `work()`: once to warm up, then until `budget` seconds are over, at least three times.

    Work of which a single call exceeds the budget is timed once.
    """
    device, budget = _device(device), quick.budget(budget)

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken: list[float] = []
    while len(taken) < 1000:
        taken.append(once())
        if sum(taken) >= budget and (len(taken) >= 3 or taken[-1] >= budget):
            break
    return statistics.median(taken)


def _buffer_bytes(device: torch.device) -> int:
    """Several times the last cache, so that the bytes come from memory; at most a GiB, and a sixteenth of what is free."""
    cache = describe(device).cache or USUAL_CACHE
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.here().free
    return int(min(max(4 * cache, SMALLEST_BUFFER), LARGEST_BUFFER, free // 16))


def copy_bandwidth(device: str | torch.device | None = None, budget: float = 0.5) -> float:
    """Bytes a second of a large copy, read and written ones both counted."""
    device = _device(device)
    source = torch.ones(_buffer_bytes(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_seconds(lambda: target.copy_(source), device, budget)


def read_bandwidth(device: str | torch.device | None = None, budget: float = 0.5) -> float:
    """Bytes a second of summing a large float32 tensor: nothing to speak of is written, as when weights are read."""
    device = _device(device)
    source = torch.ones(_buffer_bytes(device) // 4, device=device)
    return 4 * source.numel() / median_seconds(source.sum, device, budget)


def matmul_rate(dtype: torch.dtype = torch.float32, device: str | torch.device | None = None, budget: float = 0.5) -> float:
    """Floating-point operations a second of square matrix products: the best of growing sizes, until one takes LONG_ENOUGH."""
    device, best = _device(device), 0.0
    generator = torch.Generator().manual_seed(0)
    for size in SQUARES:
        square = torch.randn(size, size, generator=generator).to(device, dtype)
        seconds = median_seconds(partial(torch.matmul, square, square), device, budget / len(SQUARES))
        best = max(best, 2 * size**3 / seconds)
        if seconds > LONG_ENOUGH:  # where a format is emulated the next size would take minutes
            break
    return best
