"""labsupport asked for what the peers were asked for, their choices included."""

from __future__ import annotations

import torch
from interop.cases import DAMPING, Setting
from interop.golden import Solved

from labsupport.quant.gptq import quantize


def gptq(weight: torch.Tensor, hessian: torch.Tensor, setting: Setting) -> Solved:
    """labsupport's GPTQ as AutoGPTQ does it."""
    q = quantize(
        weight,
        hessian,
        bits=setting.bits,
        group_size=setting.group_size,
        symmetric=setting.symmetric,
        act_order=setting.act_order,
        static_groups=setting.static_groups,
        damping=DAMPING,
        mse=setting.mse,
        autogptq=True,
    )
    neighbors = torch.arange(weight.shape[1]) // q.group_size
    g_idx = neighbors if q.g_idx is None else q.g_idx
    return Solved(q.codes, q.scale, q.zero_point.to(torch.uint8), g_idx.to(torch.int16))
