"""Sweeps that train: what each arm is, on a tiny model, against plain computations; refusals; going on after a stop."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from architectures import make

from labsupport.evidence import calibrating, finetuning, measurements, retraining, sweep
from labsupport.model import models, text
from labsupport.pipeline import lora, training
from labsupport.quant import nf4, old_grid, rtn

TOKENS, WINDOWS = 32, 4
SHORT = training.Schedule(steps=3, batch=2, length=16, learning_rate=1e-3, warmup=1)


def stream(seed: int) -> text.TokenStream:
    ids = torch.randint(1, 300, (40, TOKENS), generator=torch.Generator().manual_seed(seed))
    return text.TokenStream(ids.flatten(), torch.arange(ids.numel()) // 160, tuple("abcdefgh"), 800, f"digest {seed}", "made up")


def texts(domain: str, split: str) -> text.TokenStream:
    return stream(sum(map(ord, domain + split)))


@pytest.fixture
def tiny(monkeypatch):
    """A tiny Llama, trainings of three steps, and sweeps of few rows."""
    for module in (finetuning, retraining):
        monkeypatch.setattr(module, "SCHEDULE", SHORT)
        monkeypatch.setattr(module, "SAMPLES", 2)
    monkeypatch.setattr(finetuning, "RANK", 4)
    return make("llama").eval()


@pytest.fixture
def rows(tiny, tmp_path):
    return finetuning.Rows(finetuning.Given(tiny, stream(0), texts, TOKENS, WINDOWS, tmp_path / "states"))


def weights(model) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach() for name, layer in models.linears(model).items()}


@pytest.mark.parametrize(("base", "bits"), finetuning.BASES)
def test_each_arm_is_what_its_name_says(rows, base, bits):
    original, stored = rows.originals, rows.base(base, bits)[1]
    adapters = lora.adapters(rows.trained(base, bits, 0))
    update = {name: layer.update for name, layer in adapters.items()}
    read = {name: tensor.dequantize() for name, tensor in stored.items()}
    made = {}
    for arm in "bcef":
        made[arm], more = rows._model(base, bits, arm, 0)
        start = read if arm in "be" else original
        for name, found in weights(made[arm]).items():
            merged = start[name] + update[name]
            wanted = merged if arm in "bc" else old_grid.values(merged, stored[name])
            # Two sums of two float32 numbers in another order.
            assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-7), (arm, name)
        projected = sum(((w - start[name]) * update[name]).sum() for name, w in weights(made[arm]).items())
        share = projected / sum(u.square().sum() for u in update.values())
        assert more["survived"] == pytest.approx(share.item(), rel=1e-4, abs=1e-6)
        assert ("moved" in more) == (arm in "ef")
    # After three steps an update is far smaller than half the way to the next level, but for a few: what stands on a level stays.
    on_levels, between = (rows._model(base, bits, arm, 0)[1] for arm in "ef")
    assert on_levels["moved"] < 0.01 < between["moved"] or base == "rtn"
    assert on_levels["survived"] < 0.1
    again, _ = rows._model(base, bits, "d", 0, "original", base)
    direct = {
        "nf4": partial(nf4.quantize, double_quant=True),
        "rtn": partial(rtn.quantize, bits=bits, group_size=models.group_size(again)),
    }
    for name, found in weights(again).items():
        merged = weights(rows._model(base, bits, "c", 0)[0])[name]
        assert torch.equal(found, direct[base](merged).dequantize()), name
    adapted = rows.row({"base": base, "bits": bits, "arm": "a", "seed": 0})
    merged = rows.row({"base": base, "bits": bits, "arm": "b", "seed": 0})
    assert adapted["perplexity"] == pytest.approx(merged["perplexity"], rel=1e-5)  # one function, computed in another order
    assert adapted["change"] != 0
    assert "survived" not in adapted


def test_an_adapter_of_the_float_model_is_merged_there(rows):
    update = {name: layer.update for name, layer in lora.adapters(rows.trained("float", 16, 1)).items()}
    stored, more = rows._model("float", 3, "g", 1, stored="rtn")
    for name, found in weights(stored).items():
        merged = rows.originals[name] + update[name]
        assert torch.equal(found, rtn.quantize(merged, 3, models.group_size(stored)).dequantize()), name
    assert abs(more["survived"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "qat", "calibration"])
def test_a_sweep_goes_on_where_it_was_and_leaves_no_states(name, tiny, tmp_path, monkeypatch):
    few = {
        "lora": [{"base": "nf4", "bits": 4, "arm": "untuned"}, {"base": "nf4", "bits": 4, "arm": "a", "seed": 0},
                 {"base": "nf4", "bits": 4, "arm": "d", "merged": "own", "stored": "gptq", "seed": 0}],
        "qat": [{"method": "gptq", "bits": 3, "group_size": 32}, {"method": "float", "further": True},
                {"method": "awq", "bits": 3, "group_size": 32, "further": True},
                *({"method": "qat", "bits": bits, "group_size": 32, "way": way}
                  for way, bits in (("straight-through", 2), ("ternary", 1.58), ("learned steps", 3), ("soft", 2)))],
        "calibration": [{"bits": 3, "method": "rtn"},
                        *({"bits": 3, "method": "gptq", "text": of, "samples": 2, "draw": 0} for of in calibrating.TEXTS)],
    }[name]  # fmt: skip
    monkeypatch.setitem(sweep.SWEEPS, name, lambda model: iter(few))
    run = partial(sweep.run, name, tiny, stream(0), model_name="tiny", windows=WINDOWS, length=TOKENS, texts=texts)
    whole = run(path=tmp_path / "whole.json")
    assert [sweep.setting_of(row) for row in whole.rows] == few

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    path = tmp_path / "again.json"
    with pytest.raises(KeyboardInterrupt):
        run(path=path, on_row=stop)
    assert len(measurements.read(path)[1]) == 2
    assert (tmp_path / ".again-states").is_dir()
    assert run(path=path).rows == whole.rows
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.json", "whole.json"]
    about = whole.about["training"]
    assert about["steps"] == SHORT.steps
    monkeypatch.setattr(retraining if name == "qat" else finetuning, "SCHEDULE", training.Schedule(1, 1, 8))
    with pytest.raises(ValueError, match="holds rows measured with another training"):
        run(path=path)
    with pytest.raises(ValueError, match=f"texts is missing, and the sweep '{name}' trains on them"):
        sweep.run(name, tiny, stream(0), tmp_path / "other.json", "tiny", WINDOWS, TOKENS)


def test_the_rows_that_are_measured_for_the_course_model():
    model, _ = models.load_model()
    for name in ("lora", "qat", "calibration"):
        settings = [sorted(setting.items()) for setting in sweep.SWEEPS[name](model)]
        assert len({str(setting) for setting in settings}) == len(settings)
    arms = [setting for setting in sweep.SWEEPS["lora"](model) if setting.get("seed") == 4]
    assert {setting["arm"] for setting in arms} == set("abcdefg")


def test_a_weight_on_an_older_grid_is_at_the_nearest_of_its_levels():
    generator = torch.Generator().manual_seed(0)
    weight, other = torch.randn(2, 6, 128, generator=generator)
    other[:, :64] *= 3  # beyond the ends of the grid
    for stored in (
        rtn.quantize(weight, 3, 32),
        rtn.quantize(weight, 4, 64, symmetric=True),
        nf4.quantize(weight, double_quant=True),
    ):
        found = old_grid.values(other, stored)
        if isinstance(stored, nf4.BlockTensor):
            levels = torch.tensor(stored.levels).expand(6, 128, 16) * stored.block_absmax.repeat_interleave(64).view(6, 128, 1)
        else:
            scale, zero = (
                part.repeat_interleave(stored.group_size, 1)[..., None] for part in (stored.scale.float(), stored.zero_point)
            )
            levels = (torch.arange(2**stored.bits) - zero) * scale
        nearest = (levels - other[..., None]).abs().amin(2)
        assert torch.allclose((found - other).abs(), nearest, rtol=1e-5, atol=1e-6)
        assert torch.allclose(old_grid.values(stored.dequantize(), stored), stored.dequantize(), rtol=1e-6)
    with pytest.raises(ValueError, match=r"weight has shape \[2, 2\], and what is stored has \[6, 128\]"):
        old_grid.values(torch.zeros(2, 2), stored)
    with pytest.raises(TypeError, match="stored is a str, wanted a UniformTensor or a BlockTensor"):
        old_grid.values(weight, type("str", (), {"shape": (6, 128)})())
