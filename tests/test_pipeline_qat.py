"""Whole models through fake quantizers: what trained is what is stored, written and read back; a stopped run goes on; refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import make
from torch import nn

from labsupport import checkpoint
from labsupport.model import models
from labsupport.model.models import ModelError
from labsupport.pipeline import qat, training
from labsupport.pipeline.qat import Grid
from labsupport.pipeline.training import Schedule, fit

IDS = torch.randint(1, 300, (600,), generator=torch.Generator().manual_seed(0))
SCHEDULE = Schedule(steps=6, batch=2, length=16, learning_rate=3e-3, warmup=2)
GRIDS = [
    *(Grid(bits=bits, group_size=32, symmetric=symmetric) for bits in (4, 3, 2) for symmetric in (False, True)),
    *(Grid("learned steps", bits, 32, symmetric=True) for bits in (4, 3, 2)),
]


def names_of(grids: list[Grid]) -> list[str]:
    return [f"{grid.way}-{grid.bits}-{'symmetric' if grid.symmetric else 'asymmetric'}" for grid in grids]


def trained(grid: Grid, schedule: Schedule = SCHEDULE, **keywords) -> tuple[nn.Module, list[float]]:
    """A tiny Llama after a few steps, its fake quantizers still in place."""
    model = qat.prepare(make("llama"), grid)
    return model, fit(model, IDS, schedule, **keywords)


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(IDS[None, :48]).logits


@pytest.mark.parametrize("grid", GRIDS, ids=names_of(GRIDS))
def test_what_trained_is_what_is_stored_written_and_read_back(tmp_path, grid):
    """Values are equal to the last bit, so the logits are: converted, and after checkpoint.save and checkpoint.load."""
    start = {name: layer.weight.clone() for name, layer in models.linears(make("llama")).items()}
    model, _ = trained(grid)
    assert all((layer.weight != start[name]).any() for name, layer in qat.layers(model).items())
    before, stored = logits_of(model), {}
    assert qat.convert(model, stored) is model
    assert not qat.layers(model)
    assert not model.training
    assert torch.equal(logits_of(model), before)
    for name, layer in models.linears(model).items():
        assert torch.equal(layer.weight, stored[name].dequantize())
        assert stored[name].scale.dtype == torch.float16
        assert (stored[name].packed_zero_points is None) == grid.symmetric
    # A checkpoint keeps what is outside the linears in float16.
    with torch.no_grad():
        inside = {f"{name}.weight" for name in stored}
        for name, parameter in model.named_parameters():
            if name not in inside:
                parameter.copy_(parameter.half())
    for layout in ("gptq", "awq") if grid.bits == 4 else ("gptq",):
        found, _ = checkpoint.load(checkpoint.save(model, stored, tmp_path / layout, layout))
        assert all(torch.equal(layer.weight, stored[name].dequantize()) for name, layer in models.linears(found).items())
        assert torch.equal(logits_of(found), logits_of(model))


def test_a_soft_model_is_converted_to_a_grid_that_it_never_stood_on():
    model, _ = trained(Grid("soft", 2, 32))
    layers = {name: (layer(torch.eye(layer.in_features)).detach().t(), layer.stored()) for name, layer in qat.layers(model).items()}
    for beside, stored in layers.values():
        step = stored.scale.float().repeat_interleave(stored.group_size, 1)
        off = (beside - stored.dequantize()).abs()
        # At most half a step off, but for the rounding of a product; and off indeed.
        assert (off <= 0.5001 * step).all()
        assert off.max() > 0.1 * step.min()
    before = logits_of(model)
    qat.convert(model)
    assert (logits_of(model) - before).abs().max() > 1e-3
    assert all(torch.equal(layer.weight, layers[name][1].dequantize()) for name, layer in models.linears(model).items())


def test_a_ternary_model_is_stored_but_has_no_layout_on_disk(tmp_path):
    model, _ = trained(Grid("ternary", 2, 32))
    before, stored = logits_of(model), {}
    qat.convert(model, stored)
    assert torch.equal(logits_of(model), before)
    assert all(len(layer.weight[0, :32].unique()) <= 3 for layer in models.linears(model).values())
    with pytest.raises(checkpoint.CheckpointError, match="stored holds tensors of several kinds"):
        checkpoint.save(model, stored, tmp_path / "new", "gptq")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("way", qat.WAYS)
def test_a_stopped_run_goes_on_to_the_same_result(tmp_path, way):
    grid = Grid(way, 2, 32, symmetric=way == "learned steps")

    def interrupt(step: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    whole, losses = trained(grid)
    with pytest.raises(KeyboardInterrupt):
        trained(grid, state=tmp_path / "state", save_every=2, on_step=interrupt)
    seen: list[int] = []
    other, found = trained(grid, state=tmp_path / "state", save_every=2, on_step=lambda step, loss: seen.append(step))
    assert seen == [4, 5]
    assert found == losses
    values = training.trainable(whole)
    assert any(name.endswith(".step") for name in values) == (way == "learned steps")
    assert all(torch.equal(parameter, values[name]) for name, parameter in training.trainable(other).items())


@pytest.mark.parametrize(
    ("grid", "error", "message"),
    [
        (Grid("STE"), ValueError, "way is 'STE', wanted one of straight-through, learned steps, soft, ternary"),
        (Grid(group_size=48), ValueError, r"group_size 48 does not divide in_features 64 of model.*in all linears 32, 16 do"),
        (Grid(group_size=0), ValueError, "group_size is 0, wanted a positive whole number, or None"),
        (Grid(bits=9, group_size=32), ValueError, "bits is 9, wanted a whole number from 2 to 8"),
        (Grid("soft", group_size=32, sharpness=0), ValueError, "sharpness is 0"),
        (Grid(group_size=32, scale_dtype=torch.int8), ValueError, "scale_dtype is torch.int8"),
    ],
)
def test_a_grid_that_does_not_fit_leaves_the_model_as_it_was(grid, error, message):
    model = make("llama")
    with pytest.raises(error, match=message):
        qat.prepare(model, grid)
    assert not qat.layers(model)
    assert torch.equal(logits_of(model), logits_of(make("llama")))


def test_models_that_cannot_be_prepared_or_converted_are_named():
    grid = Grid(group_size=32)
    with pytest.raises(ModelError, match="has no fake quantizers to convert: prepare it first"):
        qat.convert(make("llama"))
    with pytest.raises(ModelError, match="has fake quantizers already"):
        qat.prepare(qat.prepare(make("llama"), grid), replace(grid, bits=3))
    shared = make("llama")
    shared.model.layers[1].self_attn.q_proj = shared.model.layers[0].self_attn.q_proj
    with pytest.raises(ModelError, match="are one weight: a fake quantizer in one place would not be in the other"):
        qat.prepare(shared, grid)
    broken = make("llama")
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        qat.prepare(broken, grid)
    converted = qat.convert(qat.prepare(make("llama"), grid))
    with pytest.raises(ModelError, match="has no fake quantizers to convert"):
        qat.convert(converted)


def test_a_state_of_another_grid_is_another_run(tmp_path):
    model, ids = make("llama"), torch.randint(1, 300, (200,), generator=torch.Generator().manual_seed(0))
    few = training.Schedule(steps=1, batch=1, length=16)
    training.fit(qat.prepare(models.duplicate(model), qat.Grid(bits=3, group_size=32)), ids, few, tmp_path / "state")
    with pytest.raises(ValueError, match="holds a run with another kind of layers: choose another file"):
        training.fit(qat.prepare(model, qat.Grid(bits=4, group_size=32)), ids, few, tmp_path / "state")
