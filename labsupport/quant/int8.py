"""LLM.int8(): eight bits for weights and activations, and sixteen for the few columns that would spoil it.

Dettmers et al. 2022, "LLM.int8()", arXiv:2208.07339, sections 2 and 3. A code stands for code * absmax / 127; absmax is the largest
magnitude of a row (a token of an activation, an output of a weight) or of the whole tensor. A magnitude for each row on both
sides is what the paper calls vector-wise.

Codes, statistics and products equal those of bitsandbytes 0.50 on a CPU to the last bit. Its back ends do not scale products of
codes by the same constant: on a CPU it is 6.200124e-05 (bitsandbytes/backends/default/ops.py), in its CUDA kernel 6.200012e-05,
and 1 / 127**2 is 6.2000124e-05. So its outputs on a GPU are smaller by 18 in a million. On a CPU without AVX-512 it sums products
of codes in float32, which loses the last bits of sums beyond 2**24; `matmul_int32` is exact everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from labsupport.quant import checks, grid
from labsupport.quant.grid import QuantizedTensor

THRESHOLD = 6.0  # the paper's, and that of transformers; bitsandbytes' own layer has 0.0
# As bitsandbytes writes them for CPUs; in float32 neither is the nearest number to 1 / 127 and 1 / 127**2.
PER_CODE = 7.874015718698502e-3
PER_PRODUCT = 6.200124e-05
CHUNK = 2**18  # values to take at a time
MOST_PRODUCTS = (2**31 - 1) // 128**2  # of int8 codes whose sum fits int32
EXACT_IN_FLOAT32 = 1024  # this many products of int8 codes are at most 128**2 * 1024 = 2**24 in sum: float32 holds every such sum

Granularity = Literal["row", "tensor"]


@dataclass(frozen=True)
class Int8Tensor(QuantizedTensor):
    """A matrix in 8 bits. codes: int8 [rows, columns]. absmax: float32 [rows], or [1] for the whole tensor."""

    codes: torch.Tensor
    absmax: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def dequantize(self) -> torch.Tensor:
        return self.codes * self.absmax[:, None] * PER_CODE


def quantize(matrix: torch.Tensor, granularity: Granularity = "row", name: str = "weight") -> Int8Tensor:
    """Divide by the largest magnitude, of each row or of the tensor, and round to -127..127, ties to even.

    matrix: float [rows, columns], finite; it is not changed. A row of zeros gets codes 0 and magnitude 0. bitsandbytes casts a
    weight to float16 first: pass weight.half() for its bytes. Raises ValueError for NaN, infinity or a shape that does not fit;
    TypeError for a dtype that is not floating point.
    """
    checks.matrix(matrix, name, "[rows, columns]")
    checks.choice(granularity, "granularity", ("row", "tensor"))
    matrix = matrix.detach()
    high, low = (matrix.amax(1), matrix.amin(1)) if granularity == "row" else (matrix.amax().view(1), matrix.amin().view(1))
    absmax = torch.maximum(high, -low).abs_().float()  # abs turns the -0.0 of a row of zeros into 0.0
    if not absmax.isfinite().all():
        raise checks.not_finite(matrix, name)
    factors = (127.0 / absmax)[:, None].expand(len(matrix), 1)
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    step = max(1, CHUNK // matrix.shape[1])
    for start in range(0, len(matrix), step):  # some rows at a time, which stay in a CPU's cache between the steps
        rows = slice(start, start + step)
        codes[rows] = (matrix[rows] * factors[rows]).round_().nan_to_num_(0.0)  # a row of zeros gives 0 * (127 / 0), NaN
    return Int8Tensor(codes, absmax)


def outlier_columns(activations: torch.Tensor, threshold: float = THRESHOLD) -> torch.Tensor:
    """Columns in which any token reaches `threshold` in magnitude, ascending. float [tokens, features] -> int64 [outliers]."""
    threshold = checks.number(threshold, "threshold", 0, wanted="a number from 0 up")
    return (activations.abs() >= threshold).any(0).nonzero().view(-1)


def quantize_activations(
    activations: torch.Tensor, threshold: float = 0.0, granularity: Granularity = "row"
) -> tuple[Int8Tensor, torch.Tensor]:
    """The activations without their outlier columns, in 8 bits; and the places of those columns, int64 [outliers].

    activations: float [tokens, features]. With threshold 0 nothing is left out. A value that reaches the threshold does not count
    for its row's magnitude, and all codes of its column are 0. (A smaller value in such a column still counts for its row's
    magnitude, as in bitsandbytes.)
    """
    if threshold == 0:
        return quantize(activations, granularity, "activations"), torch.zeros(0, dtype=torch.int64, device=activations.device)
    columns = outlier_columns(activations, threshold)
    inside = activations.masked_fill(activations.abs() >= threshold, 0)
    quantized = quantize(inside, granularity, "activations")
    quantized.codes[:, columns] = 0
    return quantized, columns


def round_tokens(activations: torch.Tensor) -> torch.Tensor:
    """Each token, [..., features], on the symmetric grid of 255 steps that reaches its largest magnitude: the values, same dtype.

    What compressed-tensors does to "dynamic" activations of strategy "token" when transformers runs a W8A8 model. (vLLM's kernels
    round to absmax / 127 as `quantize` does: a step that is 0.4 % longer.) A token of zeros stays so.
    """
    scale = grid.symmetric_scale(activations.flatten(0, -2), 8).view(*activations.shape[:-1], 1)
    return (activations / scale).round_().clamp_(-128, 127) * scale


def round_inputs(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """`round_tokens` of a linear's input, as a hook before its forward."""
    return round_tokens(inputs[0]), *inputs[1:]


def matmul_int32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The product a @ b.T of codes, exact: int8 [m, k] and int8 [n, k] -> int32 [m, n].

    A sum of k products is at most 128**2 k in magnitude, so int32 holds it for k up to 131,071. On a CPU the sum is taken in
    parts of EXACT_IN_FLOAT32 columns, each of them one float32 product: processors without instructions for int8 are some 20
    times slower at integer products than at these.
    """
    for matrix, name in ((a, "a"), (b, "b")):
        checks.tensor(matrix, name, (torch.int8,), "torch.int8")
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b have shapes {list(a.shape)} and {list(b.shape)}, wanted [m, k] and [n, k]")
    if a.shape[1] > MOST_PRODUCTS:
        raise ValueError(f"a has {a.shape[1]} columns, and a sum of more than {MOST_PRODUCTS} products may not fit int32")
    if a.device.type == "cpu":
        parts = zip(a.split(EXACT_IN_FLOAT32, dim=1), b.split(EXACT_IN_FLOAT32, dim=1), strict=True)
        return sum(((x.float() @ y.float().t()).to(torch.int32) for x, y in parts), start=torch.zeros((), dtype=torch.int32))
    return (a.double() @ b.double().t()).to(torch.int32)  # PyTorch's integer product on a GPU takes few shapes only


def linear(
    activations: torch.Tensor,
    weight: Int8Tensor,
    bias: torch.Tensor | None = None,
    threshold: float = THRESHOLD,
    outlier_weight: torch.Tensor | None = None,
    granularity: Granularity = "row",
) -> torch.Tensor:
    """activations @ weight.T + bias: int8 times int8 for most columns, floating point for the outlier columns.

    activations: float [tokens, in_features], cast to float16 before they are rounded to int8, as in bitsandbytes; the result
    has their dtype. outlier_weight: float [out_features, in_features], the weight before quantization; the paper takes the
    outlier columns from it. Without it they are read back from int8, as bitsandbytes does, which keeps no second copy of the
    weight. threshold 0: all columns in int8. Raises ValueError for NaN, a negative threshold or shapes that do not fit.
    """
    checks.tensor(activations, "activations")
    if activations.ndim != 2 or activations.shape[-1] != weight.shape[1]:
        wanted = f"[tokens, {weight.shape[1]}], the weight's in_features"
        raise ValueError(f"activations has shape {list(activations.shape)}, wanted {wanted}")
    threshold = checks.number(threshold, "threshold", 0, wanted="a number from 0 up")
    if bias is not None:
        checks.tensor(bias, "bias", checks.FLOATS + checks.INTEGERS, "a tensor of numbers")
        if bias.shape != (weight.shape[0],):
            raise ValueError(f"bias has shape {list(bias.shape)}, wanted [{weight.shape[0]}]")
        checks.finite(bias, "bias")
    if outlier_weight is not None and checks.matrix(outlier_weight, "outlier_weight").shape != weight.shape:
        raise ValueError(f"outlier_weight has shape {list(outlier_weight.shape)}, wanted {list(weight.shape)}")
    quantized, columns = quantize_activations(activations.half(), threshold, granularity)
    scale = quantized.absmax[:, None] * weight.absmax[None]
    output = matmul_int32(quantized.codes, weight.codes) * scale * PER_PRODUCT
    output = (output if bias is None else output + bias.to(activations.dtype)).to(activations.dtype)
    if len(columns) == 0:
        return output
    if outlier_weight is None:
        kept = Int8Tensor(weight.codes[:, columns], weight.absmax).dequantize()
    else:
        kept = outlier_weight[:, columns]
    return output.addmm(activations[:, columns], kept.to(activations.dtype).t())


class Int8Linear(nn.Module):
    """A linear layer that multiplies in int8, with outlier columns in floating point: `linear`, and the weight that it needs.

    paper: keep the weight in float16 as well, for the outlier columns; otherwise they are read back from int8.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    outlier_weight: torch.Tensor | None

    def __init__(self, layer: nn.Linear, threshold: float = THRESHOLD, paper: bool = False, granularity: Granularity = "row"):
        super().__init__()
        half = layer.weight.detach().half()
        quantized = quantize(half, granularity)
        self.threshold, self.granularity, self.bias = threshold, granularity, layer.bias
        self.register_buffer("codes", quantized.codes)
        self.register_buffer("absmax", quantized.absmax)
        self.register_buffer("outlier_weight", half if paper else None)

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored for the weight."""
        stored = (self.codes, self.absmax, self.outlier_weight)
        return sum(t.nbytes for t in stored if t is not None)

    @property
    def stored(self) -> Int8Tensor:
        """The weight in 8 bits."""
        return Int8Tensor(self.codes, self.absmax)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if not len(flat):  # an expert to which no token is routed
            return x.new_zeros(*x.shape[:-1], len(self.codes))
        output = linear(flat, self.stored, self.bias, self.threshold, self.outlier_weight, self.granularity)
        return output.view(*x.shape[:-1], -1)
