"""Which token pays, against a plain computation from a model's own maps of attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from architectures import make

from labsupport.evidence import measurements, positions, sweep
from labsupport.model import models, text
from labsupport.quant import gptq, rtn

SEEN, TOKENS = 3, 40
IDS = torch.randint(1, 300, (SEEN + 2, TOKENS), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("length", "want"), [(512, [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]), (40, [0, 1, 2, 4, 8, 16, 32, 40])])
def test_places_go_in_powers_of_two(length, want):
    assert positions.edges(length) == want


@torch.no_grad()
def test_equals_a_plain_computation():
    model = make("llama").eval()
    layers = {name: layer for name, layer in models.linears(model).items() if name.endswith("v_proj")}
    fed = {}
    hooks = [layer.register_forward_pre_hook(lambda _, x, name=name: fed.update({name: x[0]})) for name, layer in layers.items()]
    model.config._attn_implementation = "eager"
    maps = model(IDS, use_cache=False, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    found = list(positions.rows(model, IDS[:SEEN], IDS[SEEN:], 3, 32))
    assert [row["block"] for row in found] == list(range(len(layers)))
    for row, (name, layer), attention in zip(found, layers.items(), maps, strict=True):
        w, x = attention.square().sum((1, 2)), fed[name]
        seen, later = x[:SEEN].flatten(0, 1), x[:SEEN, 1:].flatten(0, 1)
        heard = (w[:SEEN].flatten()[:, None] * seen).t() @ seen
        solved = {positions.ROUNDING: rtn.quantize(layer.weight, 3, 32)}
        given = {positions.GPTQ: seen.t() @ seen, positions.NOT_FIRST: later.t() @ later, positions.LISTENING: heard}
        solved |= {way: gptq.quantize(layer.weight, hessian, 3, 32) for way, hessian in given.items()}
        for number, (start, end) in enumerate(pairwise(positions.edges(TOKENS))):
            # Six digits are kept of what float32 sums give.
            share = w[SEEN:, start:end].sum() / w[SEEN:].sum()
            assert row["heard"][number] == pytest.approx(share.item(), abs=2e-6)
            for way in positions.WAYS:
                error = (x[SEEN:, start:end] @ (solved[way].dequantize() - layer.weight).t()).square().sum(2).mean()
                assert row[way][number] == pytest.approx(error.item(), rel=1e-4), way
        assert sum(row["heard"]) == pytest.approx(1, abs=1e-5)


def test_a_model_whose_attention_cannot_be_seen_is_refused():
    ids = IDS[:2, :16]
    with pytest.raises(models.ModelError, match="block 0 has no linear whose output, as it stands, is the values"):
        next(positions.rows(make("phi3").eval(), ids, ids, 4, 32))
    with pytest.raises(ValueError, match="calibration has windows of 16 tokens, held_out of 15: wanted one length"):
        next(positions.rows(make("llama").eval(), ids, ids[:, 1:], 4, 32))


def test_a_sweep_goes_on_from_the_block_after_the_last(tmp_path):
    model = make("llama").eval()
    stream = text.TokenStream(IDS.flatten(), torch.arange(IDS.numel()) // TOKENS, tuple("abcde"), 800, "digest", "made up")
    path = tmp_path / "positions.json"

    def run():
        return sweep.run("positions", model, stream, path, "tiny", 2, TOKENS, calibration=lambda domain, samples: IDS[:SEEN])

    whole = run().rows
    assert [row["block"] for row in whole] == [0, 1]
    about, rows = measurements.read(path)
    measurements.write(path, about, rows[:1])
    assert run().rows == whole
    path.unlink()
    with pytest.raises(ValueError, match="calibration is missing, and the sweep 'positions' has rows that need it"):
        sweep.run("positions", model, stream, path, "tiny", 2, TOKENS)
