"""How fast the quantizers and the products with 4-bit weights are, compared with copying, 16 bits and bitsandbytes: `labs bench`.

Everything is measured on this machine, in one run.
"""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from labsupport import kernels
from labsupport.evidence import machine, measurements, timing
from labsupport.evidence.machine import median_seconds
from labsupport.evidence.timing import Product
from labsupport.model import files, memory, models, peers
from labsupport.quant import grid, int8, nf4, rtn

# [out_features, in_features]: attention and MLP of models of 7B and 70B.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 28672))
BATCHES = (1, 2, 4, 8, 16, 32, 64)
PEERS_ROWS = 32  # bitsandbytes' 4-bit layer for CPUs wants whole blocks of them
LOUD, LOUD_CHANNELS = 20.0, 6  # outlier columns, as large models have them, for what treats them apart


@dataclass(frozen=True)
class Timing:
    """Median seconds of one piece of work on a float32 weight, of copying that weight, and of bitsandbytes doing the same."""

    name: str
    seconds: float
    copy: float
    theirs: float | None = None

    @property
    def passes(self) -> float:
        """How many copies of the weight would take as long. 1 is the limit for what reads and writes it whole."""
        return self.seconds / self.copy

    @property
    def ratio(self) -> float | None:
        """How many times as fast as bitsandbytes."""
        return None if self.theirs is None else self.theirs / self.seconds


def quantizers(rows: int = 4096, columns: int = 4096, budget: float = 1.0) -> Iterator[Timing]:
    """Quantize and dequantize a normal weight [rows, columns] by every method. budget: seconds for each piece of work.

    Raises ValueError where a row is not whole groups of 128.
    """
    if rows < 1 or columns < 1 or columns % 128:
        raise ValueError(f"the weight is {rows} x {columns}, wanted at least one row, and columns in groups of 128")
    functional = peers.bitsandbytes().functional
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02
    target = torch.empty_like(weight)
    copy = median_seconds(lambda: target.copy_(weight), "cpu", budget)

    def timing(name: str, work, theirs=None) -> Timing:
        peer = None if theirs is None else median_seconds(theirs, "cpu", budget)
        return Timing(name, median_seconds(work, "cpu", budget), copy, peer)

    for bits in (4, 3):
        yield timing(f"rtn {bits} bits g128: quantize", partial(rtn.quantize, weight, bits, 128))
        yield timing(f"rtn {bits} bits g128: dequantize", rtn.quantize(weight, bits, 128).dequantize)
    for kind, double in (("nf4", False), ("nf4", True), ("fp4", False)):
        name = kind.upper() + (" double" if double else "")
        theirs = partial(functional.quantize_4bit, weight, quant_type=kind, compress_statistics=double)
        yield timing(f"{name}: quantize", partial(nf4.quantize, weight, kind, 64, double), theirs)
        packed, state = theirs()
        stored = nf4.quantize(weight, kind, 64, double)
        yield timing(f"{name}: dequantize", stored.dequantize, partial(functional.dequantize_4bit, packed, state))
    half = weight.half()
    theirs = partial(functional.int8_vectorwise_quant, half)
    codes, absmax, _ = theirs()
    yield timing("int8 rows, from float16: quantize", partial(int8.quantize, half), theirs)
    stored = int8.quantize(half)
    yield timing("int8 rows: dequantize", stored.dequantize, partial(functional.int8_vectorwise_dequant, codes, absmax))


def _made_up(rows: int, columns: int, device: str) -> grid.UniformTensor:
    """A 4-bit weight of random codes in groups of 128, made without the float weight."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (rows * columns // 2,), dtype=torch.uint8, generator=generator)
    zeros = torch.full(((rows * columns // 128 + 1) // 2,), 0x88, dtype=torch.uint8)
    scale = (0.002 * (1 + torch.rand(rows, columns // 128, generator=generator))).half()
    return grid.UniformTensor(codes.to(device), scale.to(device), zeros.to(device), 4, 128, (rows, columns))


def products(
    shapes: Sequence[tuple[int, int]] = SHAPES, batches: Sequence[int] = BATCHES, budget: float = 0.3, device: str | None = None
) -> Iterator[Product]:
    """Time bfloat16 activations times one weight, in 16 bits and in 4, at every shape and batch.

    The kernels are bf16; int4, which is Triton's on a GPU and PyTorch's own on a CPU; int4 made into 16 bits for each product; and
    where bitsandbytes is installed its NF4, its int8, and its int8 with outlier columns. A shape that does not fit into memory
    is left out. Raises ValueError where rows are not whole groups of 128.
    """
    measured_on = machine.describe(device)
    for rows, columns in shapes:
        if rows < 1 or columns < 1 or columns % 128:
            raise ValueError(f"the weight is {rows} x {columns}, wanted at least one row, and columns in groups of 128")
        # At most a float32 copy, and one in 64 bits of a part, beside the copies that are multiplied in turn.
        if 12 * rows * columns + 8 * timing.PAST_THE_CACHE * (measured_on.cache or 0) > _free(measured_on.device):
            continue
        stored = _made_up(rows, columns, measured_on.device)
        wide = stored.dequantize().bfloat16()
        x = torch.randn(max(batches), columns, generator=torch.Generator().manual_seed(0)).to(wide)
        loud = x.clone()
        loud[:, :: columns // LOUD_CHANNELS] *= LOUD
        ready = kernels.prepare(stored, device=measured_on.device)
        made = [
            ("bf16", lambda n, w=wide: timing.dense(w, n), wide.nbytes, x),
            ("int4", lambda n, w=ready: timing.int4(w, n), ready.nbytes, x),
            ("int4, unfused", lambda n, w=stored: timing.dequantize_first(w, torch.bfloat16, n), stored.nbytes, x),
        ]
        if find_spec("bitsandbytes") and rows % PEERS_ROWS == 0:
            for method, read in (("nf4", wide.nbytes // 4), ("int8", wide.nbytes // 2), ("int8 mixed", wide.nbytes // 2)):
                make = lambda n, w=wide, m=method: timing.bitsandbytes(w, m, n)  # noqa: E731
                made.append((f"bitsandbytes {method}", make, read, loud if "mixed" in method else x))
        for name, make, read, inputs in made:
            rotated = make(timing.copies(read, measured_on.cache))
            for batch in batches:
                yield timing.measure(name, rotated, (rows, columns), inputs[:batch].contiguous(), budget, graph="mixed" not in name)


def _free(device: str) -> int:
    return torch.cuda.mem_get_info()[0] if device == "cuda" else memory.here().free


def instructions(device: str) -> str | None:
    """The instruction set of PyTorch's kernels on a CPU, such as AVX2. Processors of one name can differ in it. None for a GPU."""
    return torch.backends.cpu.get_cpu_capability() if device == "cpu" else None


def measurements_path(measured_on: machine.Machine) -> Path:
    """data/measurements/<device>.json: the device's name in small letters, and for a CPU its instruction set."""
    name = f"{measured_on.name} {instructions(measured_on.device) or ''}".lower()
    return models.data_dir() / "measurements" / (re.sub(r"[^a-z0-9]+", "-", name).strip("-") + ".json")


def about(command: str, measured_on: machine.Machine, budget: float) -> dict[str, object]:
    """What a reader of the rows has to know about the run. Measures the bandwidth."""
    triton = metadata.version("triton") if kernels.language.available() else "not installed"
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": measured_on.device,
        "name": measured_on.name,
        "instructions": instructions(measured_on.device),
        "cache": measured_on.cache,
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # of the last minute: was the machine shared?
        "versions": measured_on.versions | {"triton": triton},
        "bandwidth": timing.bandwidth(measured_on.device, budget),
        "seconds": "of one product, the least of many; weights rotated past the last-level cache"
        + ("; in CUDA graphs, but for int8 mixed, which waits for the GPU" if measured_on.device == "cuda" else ""),
    }


def write(path: Path, about: dict[str, object], rows: Sequence[Product]) -> None:
    """The file appears whole or not at all. Raises OSError."""
    measurements.write(path, about, [asdict(row) for row in rows])


def partial_path(path: Path) -> Path:
    """Where the rows for `path` are until the last of them is there."""
    return path.with_name(f"{path.stem}.partial.json")


def kept(path: Path, about: dict[str, object], rows: Iterable[Product]) -> Iterator[Product]:
    """The rows, each in a file before the next is measured: at `partial_path`, until with the last one all are at `path`.

    So a run that fails keeps what it measured, and leaves what an earlier run measured as it is.
    """
    finished: list[Product] = []
    for row in rows:
        finished.append(row)
        write(partial_path(path), about, finished)
        yield row
    write(path, about, finished)
    partial_path(path).unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Before minutes of measuring: raise OSError where no file can be written at `path`, ValueError where it is not ours."""
    if path.is_dir():
        raise IsADirectoryError(f"--out is {path}, a directory: wanted a JSON file")
    for replaced in (path, partial_path(path)):
        if replaced.exists():
            measurements.read(replaced)  # only rows that this wrote are replaced
        files.check_writable(replaced)


def load(name: str) -> tuple[dict[str, object], list[Product]]:
    """The rows of a machine that was measured for the course, and `about` their run: data/measurements/<name>.json."""
    return read(models.data_dir() / "measurements" / f"{name}.json")


def read(path: Path) -> tuple[dict[str, object], list[Product]]:
    """What `write` wrote."""
    about, rows = measurements.read(path)
    return about, [Product(**row) for row in rows]
