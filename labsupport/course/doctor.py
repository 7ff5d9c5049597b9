"""Whether this machine is ready for the course: `labs doctor`. Each finding is a line; a problem says what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import platform
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from labsupport.install import DRIVER_FOR_CUDA, NEWEST, OLDEST, nvidia_driver
from labsupport.model import memory

GIB = 2**30
DISK_WANTED = 0.5 * GIB
TAKE_CPU, TAKE_CUDA = (f"`python3 labsupport/install.py --torch {build}`" for build in ("cpu", "cuda"))
LIBRARIES = ("torch", "transformers", "bitsandbytes", "jupyterlab")


@dataclass(frozen=True)
class Finding:
    """One line about one thing. todo: what to do about it; empty when all is well."""

    what: str
    found: str
    todo: str = ""


def findings() -> Iterator[Finding]:
    """Look at everything in turn; the slow things (importing torch, loading the model) come last."""
    version = sys.version_info[:2]
    yield Finding(
        "python",
        f"{platform.python_version()} at {sys.executable}",
        "" if OLDEST <= version <= NEWEST else f"the course runs on 3.{OLDEST[1]} to 3.{NEWEST[1]}: make lab PYTHON=python3.12",
    )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels that the course does not use
    for name in LIBRARIES:
        yield _library(name)
    yield from _resources()
    yield from _device()
    yield _sandbox()
    yield from _model_and_text()


def _library(name: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
        importlib.import_module(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "not installed", f"pip install {name}, or `make lab` for the whole environment")
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:120]
        return Finding(
            name, f"{version} does not import ({type(error).__name__}: {first})", f"pip install --force-reinstall {name}"
        )
    return Finding(name, version)


def _resources() -> Iterator[Finding]:
    try:
        free = memory.here()
        yield Finding("memory", str(free), free.todo)
    except ImportError:
        yield Finding("memory", "unknown: psutil is not installed", "pip install psutil")
    disk = shutil.disk_usage(Path.cwd())
    todo = "" if disk.free >= DISK_WANTED else "free some space: at least 0.5 GiB"
    yield Finding("disk", f"{disk.free / GIB:.1f} GiB free in {Path.cwd()}", todo)


def _device() -> Iterator[Finding]:
    """What the course computes on, and what keeps it from a GPU whose driver is there."""
    try:
        from labsupport.evidence import machine

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a driver that is too old: said below
            about = machine.describe()
    except Exception as error:
        yield Finding("device", f"unknown ({type(error).__name__}: {error})", "see torch above")
        return
    if about.device == "cuda":
        yield Finding("device", f"{about.name}, {about.memory / GIB:.1f} GiB", _no_kernels())
        return
    yield Finding("device", f"{about.name}, {about.cores} cores (no GPU is needed)")
    if (driver := nvidia_driver()) is not None:
        yield _unused(driver)


def _no_kernels() -> str:
    """What to do about a GPU that PyTorch finds and has no kernels for, as its builds leave out old ones; "" where it computes."""
    import torch

    try:
        (torch.ones(2, device="cuda") + 1).sum().item()
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"it does not compute ({reason}): {TAKE_CPU} goes on with the CPU"
    return ""


def _unused(driver: int) -> Finding:
    """NVIDIA's driver (the first number of its version, 0 for unknown) where PyTorch does not use it."""
    import torch

    name, cuda = f"NVIDIA {driver or 'of unknown version'}", torch.version.cuda
    if cuda is None:
        linux = sys.platform.startswith("linux")
        how = f"{TAKE_CUDA} uses the GPU" if linux else "https://pytorch.org/get-started/locally has the build for the GPU"
        return Finding("driver", f"{name}, not used: this PyTorch is the build for CPUs. If it is new enough, {how}")
    wanted = DRIVER_FOR_CUDA.get(int(cuda.split(".")[0]), 0)
    if 0 < driver < wanted:
        why, todo = f"too old: CUDA {cuda}, which this PyTorch is built with, needs {wanted}", "update the driver to use the GPU"
    else:
        why, todo = "and PyTorch finds no GPU that it can use", "see whether `nvidia-smi` shows the GPU"
    return Finding("driver", f"{name}, {why}; the course runs on the CPU", f"{todo}, or do without: {TAKE_CPU} is smaller")


def _sandbox() -> Finding:
    program = shutil.which("bwrap")
    return Finding("sandbox", f"bubblewrap at {program}" if program else "no bubblewrap (only `labs grade`, for a class, needs it)")


def _model_and_text() -> Iterator[Finding]:
    try:
        from labsupport.model import models, text
    except Exception as error:
        yield Finding(
            "model", f"labsupport does not import ({type(error).__name__}: {error})", "`make lab` repairs the environment"
        )
        return
    name = None
    try:
        name = models.model_name()
        model, tokenizer = models.load_model(name)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        course = name is None or Path(name) == models.course_model_dir()
        todo = "git checkout -- data, or clone the course again" if course else "LABS_MODEL names it: correct or unset it"
        yield Finding("model", first, todo)
        return
    yield Finding("model", f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters from {name}")
    try:
        tokens = text.load_text(tokenizer)
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        yield Finding("text", first, "LABS_TEXT names it: correct or unset it; the default needs only Python's standard library")
        return
    yield Finding("text", f"{tokens.source}: {len(tokens)} tokens of {len(tokens.names)} documents, sha256 {tokens.sha256[:12]}")
