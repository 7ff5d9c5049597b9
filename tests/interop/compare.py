"""Two results side by side, said in a line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from interop import golden
from interop.golden import Found, Solved

ROWS_EQUAL = 15 / 16  # see verdict
SCALE = 1e-3  # of a row's largest: condition numbers after damping, up to 1.3e4, times float32's 2**-24
# Where both sides sum their own Hessian: its last bits differ, and weights in the middle between two levels go either way. The rows
# of such weights go on otherwise; up to 0.12 % of codes and 0.10 % of the loss were seen on two processors.
SHARE, LOSS = 0.995, 2e-3
# Of a value, where one forward pass rounds otherwise than another: scales are stored as float16, whose neighbors are 2**-10 apart.
NEIGHBOR = 2**-10
EQUAL = "equal"
PARTS = ("codes", "scale", "zero_point", "g_idx")


def loss(weight: torch.Tensor, hessian: torch.Tensor, solved: Solved) -> float:
    """tr(E H E^T), in float64."""
    error = solved.dequantize().double() - weight.double()
    return ((error @ hessian.double()) * error).sum().item()


def differences(one: Solved, other: Solved) -> str:
    """Empty where both are equal bit for bit, else how much of what differs."""
    said = []
    for part in PARTS:
        a, b = getattr(one, part), getattr(other, part)
        if a.shape != b.shape:
            said.append(f"{part} {list(a.shape)} against {list(b.shape)}")
        elif not torch.equal(a.to(b.dtype), b):
            said.append(f"{int((a != b).sum())} of {b.numel()} values of {part}")
    return ", ".join(said)


@dataclass(frozen=True)
class Verdict:
    said: str
    good: bool


def verdict(one: Solved, other: Solved, same_rounding: bool) -> Verdict:
    """Bit for bit where both sides round alike (cases.rounding_of); otherwise row by row.

    Rows do not meet in GPTQ. Where a last bit moves a weight over the middle between two levels, its row goes on otherwise and
    the others stay. One thread against two changed one row of 16 to 48 in one case of twenty.
    """
    said = differences(one, other)
    if not said:
        return Verdict(EQUAL, True)
    if same_rounding or one.codes.shape != other.codes.shape or one.scale.shape != other.scale.shape:
        return Verdict(f"differs in {said}", False)
    equal = (one.codes == other.codes).all(1)
    gap = (one.scale - other.scale).abs() / other.scale.amax(1, keepdim=True)
    same_scales = bool((gap[equal] <= SCALE).all())
    good = equal.float().mean().item() >= ROWS_EQUAL and same_scales and torch.equal(one.g_idx, other.g_idx)
    return Verdict(f"equal in {int(equal.sum())} of {len(equal)} rows where the factorization rounds otherwise", good)


def apart(weight: torch.Tensor, hessian: torch.Tensor, one: Solved, other: Solved) -> tuple[float, float]:
    """The share of codes that are equal, and by how much of itself the loss differs. The Hessians are equal but for rounding."""
    share = (one.codes == other.codes).double().mean().item()
    return share, abs(loss(weight, hessian, one) / loss(weight, hessian, other) - 1)


def rounds_otherwise(one: Found, other: Found) -> bool:
    """Whether one model fed one text gave mean inputs that differ in their last bits: other processors, other sums."""
    means = [key for key in one.tensors if key.endswith("x_mean")]
    return any(not torch.equal(one.tensors[key], other.tensors[key]) for key in means)


# The share of values that must agree where a tie decides: two limits of the search for clips are often as good as each other to
# float32's last bits, and the limit that was taken decides the scale of its group.
TIED = {"clip": 0.75, "scales": ROWS_EQUAL, "qweight": SHARE, "qzeros": ROWS_EQUAL}


def _equal(key: str, a: torch.Tensor, b: torch.Tensor, same_rounding: bool) -> bool:
    """Bit for bit, or where both sides round otherwise: neighbors, in a share of places where a tie decides."""
    if same_rounding or torch.equal(a, b):
        return torch.equal(a, b)
    part = key.rpartition("/")[2]
    if part in ("qweight", "qzeros"):
        near = golden.unpack_awq(a) == golden.unpack_awq(b)
    else:
        near = (a - b).abs() <= NEIGHBOR * b.abs().clamp(min=torch.finfo(torch.float16).tiny)
    return near.float().mean().item() >= TIED.get(part, 1.0)


def found_differences(one: Found, other: Found, same_rounding: bool = True) -> str:
    """As `differences`, of what AutoAWQ found; timing left out, losses compared by the ratio that wins."""
    said = []
    if one.groups != other.groups:
        said.append("other groups of linears")
    for key in sorted((one.tensors.keys() | other.tensors.keys()) - {"seconds", "logits_change"}):
        a, b = one.tensors.get(key), other.tensors.get(key)
        if a is None or b is None:
            said.append(f"{key} only on one side")
        elif key.endswith("losses"):
            if a.argmin() != b.argmin():
                said.append(f"{key}: ratio {a.argmin() / len(a):.2f} against {b.argmin() / len(b):.2f}")
        elif a.shape != b.shape:
            said.append(f"{key} {list(a.shape)} against {list(b.shape)}")
        elif not _equal(key, a, b, same_rounding):
            said.append(f"differs in {int((a != b).sum())} of {b.numel()} values of {key}")
    return ", ".join(said)
