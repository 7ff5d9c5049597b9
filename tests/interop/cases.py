"""What both sides are given: settings, and layers whose Hessian has the same bits on every machine. Needs torch alone.

Imported by the course's environment and by the peers' own, so that neither has to know the other.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import product

import torch

DAMPING = 0.01
BLOCK_SIZE = 128


@dataclass(frozen=True)
class Setting:
    """One way to run GPTQ. group_size None: a grid for each whole row. mse: grids searched for the least error."""

    bits: int
    group_size: int | None
    symmetric: bool
    act_order: bool
    static_groups: bool
    mse: bool = False

    @property
    def name(self) -> str:
        """For example 4b-g32-asym-order-static."""
        parts = [f"{self.bits}b", f"g{self.group_size}" if self.group_size else "row", "sym" if self.symmetric else "asym"]
        parts += [word for word, on in (("order", self.act_order), ("static", self.static_groups), ("mse", self.mse)) if on]
        return "-".join(parts)


# Static groups say nothing new where the row is the group.
ALL = tuple(
    Setting(bits, group_size, symmetric, act_order, static_groups)
    for bits, group_size, symmetric, act_order in product((4, 3, 2), (32, 128, None), (False, True), (False, True))
    for static_groups in ((False, True) if group_size else (False,))
)
SEARCHED = tuple(Setting(bits, 128, symmetric, False, False, mse=True) for bits in (4, 3, 2) for symmetric in (False, True))
# For layers too large to keep every setting: each bits, group, order and grid at least twice.
SOME = tuple(
    setting
    for setting in ALL
    if (setting.bits, setting.group_size, setting.symmetric, setting.act_order, setting.static_groups)
    in {
        (4, 128, False, False, False), (4, 128, False, True, True), (4, 32, True, True, False), (4, None, True, False, False),
        (3, 128, True, True, False), (3, 32, False, False, False), (3, 32, True, True, True), (3, None, False, True, False),
        (2, 128, False, True, True), (2, 32, False, True, False), (2, 128, True, False, False), (2, None, True, True, False),
    }
)  # fmt: skip

FEW = tuple(
    Setting(bits, 128, symmetric=False, act_order=act_order, static_groups=False)
    for bits in (4, 3, 2)
    for act_order in (False, True)
)


@dataclass(frozen=True)
class AwqRun:
    """One way to run AutoAWQ, 4 bits with zero-points.

    duo_scaling: AutoAWQ's own rule for scales; without it llm-awq's. quantize: to the end; without it the model is only scaled
    and clipped. patched: with the search that restores the weights.
    """

    group_size: int
    duo_scaling: bool = True
    clip: bool = True
    quantize: bool = True
    patched: bool = True

    @property
    def name(self) -> str:
        """For example g128-duo-clip-codes."""
        flags = (("duo", self.duo_scaling), ("clip", self.clip), ("codes", self.quantize), ("stock", not self.patched))
        return "-".join([f"g{self.group_size}", *(word for word, on in flags if on)])


def exact_hessian(inputs: torch.Tensor) -> torch.Tensor:
    """H = 2/n X^T X, float32 [in, in], each entry rounded once and so the same in whatever order a machine adds.

    inputs: int8 [n, in]. All sums are whole numbers below 2**24.
    """
    x = inputs.double()
    products = x.T @ x
    if products.abs().max() >= 2**24:
        raise ValueError(f"inputs {list(inputs.shape)} give sums up to {products.abs().max():.0f}, wanted below 2**24")
    return products.float() * (2 / len(inputs))


def rounding_of(hessian: torch.Tensor) -> str:
    """A digest of how this machine and its thread count round the factorization of a Hessian and a product with it.

    Where it is the one that is recorded, a peer's results must come out bit for bit; elsewhere the last bits may differ.
    """
    digest = hashlib.sha256()
    order = torch.argsort(torch.diag(hessian), descending=True)
    for h in (hessian.clone(), hessian[order][:, order]):
        diagonal = h.diagonal()
        diagonal[diagonal == 0] = 1
        diagonal += DAMPING * torch.diag(h).mean()  # of a copy: PyTorch adds neighbors in another order than strided values
        factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
        digest.update(factor.numpy().tobytes())
        digest.update((factor[:, :BLOCK_SIZE] @ factor[:BLOCK_SIZE]).numpy().tobytes())
    return digest.hexdigest()
