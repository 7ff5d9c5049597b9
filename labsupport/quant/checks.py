"""What the methods ask of their arguments, in one place: each check returns the value in the form that is worked with, or names it.

A value of the wrong kind is a TypeError, one of the right kind that does not fit a ValueError. NumPy's numbers are numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from numbers import Integral, Real
from typing import Any

import torch

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
USUAL_GROUP_SIZES = (256, 128, 64, 32, 16)
LARGEST = 2**31 - 1  # of a size: what no tensor's axis exceeds
TILE = 256  # rows and columns of a matrix that are compared with their mirror image at a time
# X^T X summed in float32 is symmetric, and keeps to |g_ij|^2 <= g_ii g_jj, to some 1e-6 of its largest entry; in float16 to 1e-3.
SLACK = 1e-3


def kind(value: Any) -> str:
    """What a value is, for a message."""
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def tensor(
    value: Any, name: str, dtypes: tuple[torch.dtype, ...] = FLOATS, wanted: str = "a floating-point tensor"
) -> torch.Tensor:
    """A tensor that can be computed with. Raises TypeError for what is none: meta, sparse, quantized, of another dtype."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {kind(value)}, wanted {wanted}")
    if value.is_nested or value.layout != torch.strided or value.is_quantized:
        layout = "nested" if value.is_nested else "quantized" if value.is_quantized else str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} is {layout}, wanted {wanted} with all its values in one block of memory")
    if value.is_meta:
        raise TypeError(f"{name} is on the meta device, which holds shapes and no values: load the weights first")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} is {value.dtype}, wanted {wanted}")
    return value


def matrix(value: Any, name: str = "weight", axes: str = "[out_features, in_features]") -> torch.Tensor:
    """A floating-point tensor with two axes, neither of them 0."""
    tensor(value, name)
    if value.ndim != 2 or value.numel() == 0:
        raise ValueError(f"{name} has shape {list(value.shape)}, wanted {axes}, neither of them 0")
    return value


def finite(value: torch.Tensor, name: str) -> torch.Tensor:
    """Raises ValueError for NaN and infinity."""
    if not value.isfinite().all():
        raise not_finite(value, name)
    return value


def not_finite(value: torch.Tensor, name: str = "weight") -> ValueError:
    """The error for a tensor that holds NaN or infinity."""
    found, count = "NaN" if value.isnan().any() else "infinity", int((~value.isfinite()).sum())
    return ValueError(f"{name} holds {found}: {count} of {value.numel()} values are not finite")


def scales(value: torch.Tensor, name: str, zero: bool = False) -> torch.Tensor:
    """Raises ValueError for what no step of a grid can be: NaN, infinity, less than 0, and 0 unless `zero`."""
    good = (value >= 0 if zero else value > 0) & (value < math.inf)
    if not good.all():
        wanted = "from 0 up" if zero else "above 0"
        raise ValueError(f"{name} holds {int((~good).sum())} values that are not finite numbers {wanted}")
    return value


def whole(value: Any, name: str, least: int = 1, most: int = LARGEST, wanted: str = "") -> int:
    """A whole number from `least` to `most`. True and False are none. wanted: in place of these words."""
    wanted = wanted or (f"a whole number from {least} up" if most == LARGEST else f"a whole number from {least} to {most}")
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= operator.index(value) <= most:
        raise ValueError(f"{name} is {value!r}, wanted {wanted}")
    return operator.index(value)


def number(value: Any, name: str, least: float = -math.inf, most: float = math.inf, wanted: str = "a number") -> float:
    """A number from `least` to `most`. True, False and NaN are none. wanted: in a message."""
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= float(value) <= most:
        raise ValueError(f"{name} is {value!r}, wanted {wanted}")
    return float(value)


def flag(value: Any, name: str) -> bool:
    """True or False, perhaps NumPy's."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise ValueError(f"{name} is {value!r}, wanted True or False")
    return bool(value)


def choice(value: Any, name: str, known: tuple[str, ...]) -> str:
    """One of the known words."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {value!r}, wanted one of {', '.join(known)}")
    return value


def float_dtype(value: Any, name: str, known: tuple[torch.dtype, ...] = FLOATS) -> torch.dtype:
    """One of the dtypes of floating-point numbers."""
    if not isinstance(value, torch.dtype) or value not in known:
        raise ValueError(f"{name} is {value!r}, wanted one of {', '.join(map(str, known))}")
    return value


def bits(value: Any) -> int:
    """Bits of a code on a uniform grid."""
    return whole(value, "bits", 2, 8)


def group_size(value: Any, in_features: int) -> int:
    """A divisor of in_features, which it is where the value is None. The error names the usual sizes that divide it."""
    if value is None:
        return in_features
    size = whole(value, "group_size", wanted="a positive whole number, or None for a whole row")
    if in_features % size:
        raise ValueError(f"group_size {size} does not divide in_features {in_features}: {dividing([in_features])}")
    return size


def dividing(widths: Collection[int], row: str = "None") -> str:
    """Which of the usual group sizes divide all widths, for a message. row: how the caller names a group of a whole row."""
    fitting = [str(size) for size in USUAL_GROUP_SIZES if not any(width % size for width in widths)]
    sizes = ", ".join(fitting) or f"none of {', '.join(map(str, USUAL_GROUP_SIZES))}"
    return f"{sizes} {'do' if len(fitting) > 1 else 'does'}, and {row} takes the whole row"


def undivided(size: int, name: str, widths: Mapping[str, int], row: str = "None") -> ValueError:
    """The error for a linear whose inputs are not whole groups; it names the usual sizes that divide those of all linears.

    widths: in_features of every linear that is quantized, by name.
    """
    wanted = dividing(widths.values(), row)
    return ValueError(f"group_size {size} does not divide in_features {widths[name]} of {name}: in all linears {wanted}")


def codes(value: Any, bits: int, name: str = "codes", ndim: int | None = None) -> torch.Tensor:
    """Whole numbers from 0 to 2**bits - 1, in a tensor of integers or of floats. ndim: how many axes; None for any number."""
    tensor(value, name, FLOATS + INTEGERS, "a tensor of whole numbers")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} has shape {list(value.shape)}, wanted {ndim} axes")
    if value.numel() == 0:
        if ndim is not None:
            raise ValueError(f"{name} has shape {list(value.shape)}, wanted no axis of 0")
        return value
    if value.is_floating_point():
        finite(value, name)
        if (value != value.round()).any():
            raise ValueError(f"{name} holds fractions, wanted whole numbers from 0 to {2**bits - 1}")
    low, high = value.min().item(), value.max().item()
    if low < 0 or high >= 2**bits:
        raise ValueError(f"{name} reach from {low:g} to {high:g}, wanted 0 to {2**bits - 1}")
    return value


def tokens(value: Any, name: str, vocabulary: int) -> torch.Tensor:
    """Token ids that a model with this many tokens knows: int32 or int64, of any shape."""
    tensor(value, name, (torch.int32, torch.int64), "a tensor of token ids, int64")
    if value.numel() and (value.min() < 0 or value.max() >= vocabulary):
        raise ValueError(f"{name} holds tokens {int(value.min())} to {int(value.max())}, the model knows 0 to {vocabulary - 1}")
    return value


def square(value: Any, name: str, in_features: int) -> torch.Tensor:
    """A floating-point tensor [in_features, in_features]."""
    matrix(value, name, "[in_features, in_features]")
    if value.shape != (in_features, in_features):
        wanted = f"[{in_features}, {in_features}] for in_features {in_features}"
        raise ValueError(f"{name} has shape {list(value.shape)}, wanted {wanted}")
    return value


def gram(value: Any, name: str, in_features: int) -> torch.Tensor:
    """A matrix that can be a multiple of X^T X: symmetric, nothing below 0 on its diagonal, no entry larger than that allows,
    and not all zero: of inputs that were never anything but 0 no method learns what matters.

    Whether it is positive definite, a Cholesky factorization tells. Compared some rows and columns at a time.
    """
    square(value, name, in_features)
    diagonal = value.diagonal().float()
    largest = diagonal.max().item()
    tiles = [slice(start, start + TILE) for start in range(0, in_features, TILE)]
    gap = beyond = 0.0
    for i in tiles:
        for j in tiles:
            if i.start <= j.start:
                part = value[i, j].float()
                gap = _more(gap, (part - value[j, i].float().t()).abs().max().item())
                allowed = diagonal[i].abs().sqrt()[:, None] * diagonal[j].abs().sqrt()
                beyond = _more(beyond, (part.abs() - allowed).max().item())
    if not gap < math.inf:
        raise not_finite(value, name)
    if gap > SLACK * abs(largest):
        raise ValueError(f"{name} is not symmetric: entries differ from their mirror image by up to {gap:.3g}")
    if diagonal.min() < 0:
        raise ValueError(f"{name} has {diagonal.min().item():.3g} on its diagonal, wanted sums of squares")
    if beyond > SLACK * largest:
        raise ValueError(f"{name} is no X^T X: an entry is {beyond:.3g} more than the squares on its diagonal allow")
    if largest == 0:
        raise ValueError(f"{name} is zero: the layer never saw an input")
    return value


def _more(one: float, other: float) -> float:
    """The larger one; NaN where either is."""
    return other if math.isnan(other) or other > one else one


def weight_and_grid(value: Any, bits_given: Any, size_given: Any) -> tuple[int, int]:
    """A weight, and of its grid the bits and the group size, which are returned; in_features where the size is None."""
    chosen = bits(bits_given)
    matrix(value)
    return chosen, group_size(size_given, value.shape[1])
