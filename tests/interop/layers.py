"""The layers whose GPTQ results are kept, in the golden file with them: two made up to be awkward, two of the course model."""

from __future__ import annotations

import torch
from interop.cases import ALL, SEARCHED, SOME, Setting

# Which settings are kept for which layer.
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "correlated": ALL + SEARCHED,
    "one-sided": ALL,
    "course-o_proj": SOME,
    "course-down_proj": SOME,
}


def _integers(values: torch.Tensor, limit: float) -> torch.Tensor:
    """Rounded so that the 99.9th percentile of magnitudes is `limit`; int8, with what is larger clipped."""
    step = values.abs().flatten().kthvalue(int(0.999 * values.numel())).values / limit
    return (values / step).round().clamp(-127, 127).to(torch.int8)


def _without_ties(inputs: torch.Tensor) -> torch.Tensor:
    """No two columns with equal sums of squares: the order of act_order is then the same for every sort."""
    seen = set()
    for column in inputs.T:
        while (energy := int(column.long().pow(2).sum())) in seen:
            column[column.abs().argmin()] += 1
        seen.add(energy)
    return inputs


def _correlated() -> tuple[torch.Tensor, torch.Tensor]:
    """32x256: inputs of unequal size that share 32 directions. Column 77 is never fed, and has the largest weight of each row."""
    generator = torch.Generator().manual_seed(32)
    mixing = torch.randn(32, 256, generator=generator)
    inputs = torch.randn(250, 32, generator=generator) @ mixing / 5 + torch.randn(250, 256, generator=generator) / 3
    inputs = inputs * torch.exp(0.7 * torch.randn(256, generator=generator))
    weight = torch.randn(32, 256, generator=generator) / 16
    inputs[:, 77], weight[:, 77] = 0, 0.5
    return weight, _integers(inputs, 100)[:243]  # 2/243 H has entries that are no whole numbers: how a mean is added shows


def _one_sided() -> tuple[torch.Tensor, torch.Tensor]:
    """18x384, fewer inputs than columns: H is singular before damping. Rows all positive, all negative, zero, constant."""
    generator = torch.Generator().manual_seed(18)
    inputs = torch.randn(128, 64, generator=generator) @ torch.randn(64, 384, generator=generator)
    inputs = inputs * torch.exp(0.5 * torch.randn(384, generator=generator))
    weight = torch.randn(18, 384, generator=generator) / 20
    weight[:5] = weight[:5].abs()
    weight[5:7] = -weight[5:7].abs()
    weight[7], weight[8], weight[9] = 0, 0.25, -0.25
    weight[10:14, :128] = weight[10:14, :128].abs() + 0.1
    return weight, _integers(inputs, 100)


@torch.no_grad()
def _course(name: str, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first rows of a linear of the course model (rows do not meet in GPTQ) and what it is fed on held-out prose."""
    from labsupport.model import models, text

    model, tokenizer = models.load_model(str(models.course_model_dir()), device="cpu")
    stream = text.load_text(tokenizer, "prose")
    layer, fed = models.linears(model)[name], []
    handle = layer.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0].flatten(0, 1)))
    model(input_ids=stream.ids[:tokens][None], use_cache=False)
    handle.remove()
    return layer.weight[:rows].detach().float(), _integers(torch.cat(fed), 100)


def make() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every layer: weight float32 [out, in] with values that float16 holds, inputs int8 [n, in]."""
    layers = {
        "correlated": _correlated(),
        "one-sided": _one_sided(),
        "course-o_proj": _course("model.layers.2.self_attn.o_proj", 48, 256),
        "course-down_proj": _course("model.layers.5.mlp.down_proj", 16, 250),
    }
    return {name: (weight.half().float(), _without_ties(inputs)) for name, (weight, inputs) in layers.items()}
