"""How long a product takes when its weight comes from memory: buffers rotated past the last-level cache, CUDA graphs on a GPU.

A layer is used once in a step, and by the time the next step comes to it the rest of the model has been through the cache. A loop
that multiplies with one and the same weight measures the cache instead.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.functional import linear

from labsupport import kernels
from labsupport.evidence import machine
from labsupport.model import peers, quick
from labsupport.quant.grid import UniformTensor

PAST_THE_CACHE = 4  # times the last-level cache that a rotation reads
MOST_COPIES = 64
PIECE = 2**24  # bytes
FEWEST = 3  # times that something is timed, however slow it is


@dataclass(frozen=True)
class Product:
    """One product, timed. read: bytes of the weight as it is stored. seconds: of one product, the least of many."""

    kernel: str
    out_features: int
    in_features: int
    batch: int
    read: int
    seconds: float

    @property
    def rate(self) -> float:
        """Bytes of the weight read in a second."""
        return self.read / self.seconds


def copies(read: int, cache: int | None) -> int:
    """How many weights of `read` bytes are together PAST_THE_CACHE times the cache; at least 2, at most MOST_COPIES."""
    wanted = PAST_THE_CACHE * (cache or machine.USUAL_CACHE)
    return min(max(2, -(-wanted // read)), MOST_COPIES)


def seconds(calls: Sequence[Callable[[], object]], device: torch.device, budget: float = 0.5, graph: bool = True) -> float:
    """Seconds of one of several equal calls made in turn: the least of as many as the budget allows, FEWEST or more.

    The least, since whatever else the machine does only adds. On a GPU all calls in turn are one CUDA graph, so that what is timed
    is the kernels and not the launching of them. graph: False for calls that wait for the GPU, which no graph can hold; their time
    has the launching in it.
    """
    budget = quick.budget(budget)
    if device.type == "cuda":
        return _on_gpu(calls, budget, graph)
    calls[0]()  # what is set up once is set up now
    taken: list[float] = []
    started = time.perf_counter()
    for call in itertools.cycle([*calls[1:], calls[0]]):
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        taken.append(end - start)
        if len(taken) >= FEWEST and end - started >= budget:
            return min(taken)


def _on_gpu(calls: Sequence[Callable[[], object]], budget: float, graph: bool) -> float:
    def in_turn() -> None:
        for call in calls:
            call()

    once = _captured(in_turn) if graph else in_turn
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    once()  # what is set up once is set up now
    best, started, rounds = float("inf"), time.perf_counter(), 0
    while rounds < FEWEST or time.perf_counter() - started < budget:
        begin.record()
        once()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
        rounds += 1
    return best / len(calls)


def _captured(work: Callable[[], None]) -> Callable[[], None]:
    """The replay of a CUDA graph of `work`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and allocates outside of the graph
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def bandwidth(device: str | torch.device = "cpu", budget: float = 0.5) -> float:
    """Bytes a second of copying a large tensor, read and written ones counted, or of summing it, whichever is more."""
    device = torch.device(device)
    source = torch.ones(machine.SMALLEST_BUFFER // 4, device=device)
    target = torch.empty_like(source)
    # In pieces as large as a layer: on a busy machine a short piece gets through undisturbed now and then, a long one never does.
    pieces = list(zip(target.split(PIECE // 4), source.split(PIECE // 4), strict=True))
    copied = 2 * PIECE / seconds([partial(to.copy_, piece) for to, piece in pieces], device, budget / 2)
    return max(copied, PIECE / seconds([piece.sum for _, piece in pieces], device, budget / 2))


Multiply = Callable[[torch.Tensor], object]


def dense(weight: torch.Tensor, count: int) -> tuple[list[Multiply], int]:
    """The 16-bit product with `count` copies of a weight [out, in], and the bytes that one reads."""
    return [partial(_linear, weight.clone()) for _ in range(count)], weight.nbytes


def _linear(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return linear(x, weight)


def int4(ready: kernels.Int4Weight, count: int) -> tuple[list[Multiply], int]:
    """The product with a prepared 4-bit weight, likewise."""
    held = [replace(ready, codes=ready.codes.clone(), grids=tuple(g.clone() for g in ready.grids)) for _ in range(count)]
    return [partial(_times, weight) for weight in held], ready.nbytes


def _times(weight: kernels.Int4Weight, x: torch.Tensor) -> torch.Tensor:
    return kernels.matmul(x, weight)


def dequantize_first(weight: UniformTensor, dtype: torch.dtype, count: int) -> tuple[list[Multiply], int]:
    """The whole weight made anew for every product, in `dtype`, and multiplied from memory."""

    held = [replace(weight, packed_codes=weight.packed_codes.clone()) for _ in range(count)]
    return [partial(_unpacked, stored, dtype) for stored in held], weight.nbytes


def _unpacked(weight: UniformTensor, dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    return linear(x, weight.dequantize().to(dtype))


def bitsandbytes(weight: torch.Tensor, method: str, count: int) -> tuple[list[Multiply], int]:
    """A bitsandbytes layer in evaluation, of a weight [out, in]: "nf4", "int8", or "int8 mixed", with threshold 6.

    The last looks for outliers before it goes on, and so waits for a GPU: time it without a graph.
    """
    nn = peers.bitsandbytes().nn
    rows, columns = weight.shape

    def layer():
        if method == "nf4":
            made = nn.Linear4bit(columns, rows, bias=False, compute_dtype=weight.dtype, quant_type="nf4", compress_statistics=False)
            made.weight = nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False)
        else:
            made = nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0 if "mixed" in method else 0.0)
            made.weight = nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        return made.to(weight.device).eval()

    first = layer()  # quantizing takes seconds, copying does not
    # A code of nf4 takes half a byte and 64 of them a float32 magnitude; one of int8 a byte, and a row a float32 magnitude.
    read = weight.numel() // 2 + weight.numel() // 16 if method == "nf4" else weight.numel() + 4 * rows
    return [first, *(copy.deepcopy(first) for _ in range(count - 1))], read


def measure(
    name: str, made: tuple[list[Multiply], int], shape: tuple[int, int], x: torch.Tensor, budget: float = 0.5, graph: bool = True
) -> Product:
    """Time x [batch, in] times each of the weights in turn. graph: see `seconds`."""
    multiplies, read = made
    with torch.no_grad():
        took = seconds([partial(multiply, x) for multiply in multiplies], x.device, budget, graph)
    return Product(name, *shape, len(x), read, took)
