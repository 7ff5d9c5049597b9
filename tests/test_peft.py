"""Our adapters beside peft's on a base by bitsandbytes: the same start, the same batches, the same optimizer."""

from __future__ import annotations

import builtins

import pytest
import torch
from architectures import make

from labsupport.evidence.training_memory import measure_step
from labsupport.model import models, peers, text
from labsupport.pipeline import lora, training
from labsupport.pipeline.quantize import quantize_model

COURSE = str(models.course_model_dir())
SCHEDULE = training.Schedule(steps=50, batch=2, length=64, learning_rate=1e-3, warmup=5)


@pytest.fixture(scope="module")
def ids():
    return text.load_text(models.load_model(COURSE)[1], "prose").ids[:20_000]


@pytest.mark.slow
def test_losses_are_those_of_peft_and_bitsandbytes(ids):
    """Within 1 % at every one of 50 steps. Both multiply by the same float32 weights: where it was tried, all losses were equal."""
    pytest.importorskip("peft", reason="peft is not installed")
    model, stored = models.load_model(COURSE)[0], {}
    quantize_model(model, "nf4", double_quant=True, stored=stored, in_place=True)
    lora.add(model, stored, rank=8, alpha=16.0)
    theirs, parameters = peers.load_with_peft(training.trainable(model), 16.0, COURSE)
    assert {id(parameter) for parameter in parameters.values()} == {id(p) for p in training.trainable(theirs).values()}
    window = training.batch_at(ids, 2, 64, 0, 0)
    memory = measure_step(models.duplicate(model), window), measure_step(models.duplicate(theirs), window)
    losses = training.fit(model, ids, SCHEDULE), training.fit(theirs, ids, SCHEDULE)
    for mine, other in zip(*losses, strict=True):
        assert abs(mine - other) <= 0.01 * other
    assert all(p.abs().max() > 0 for name, p in training.trainable(model).items() if name.endswith("lora_b"))
    for name, parameter in training.trainable(model).items():
        # A hundredth of the farthest that Adam goes: about the learning rate in a step.
        assert (parameter - parameters[name]).abs().max() <= 0.01 * SCHEDULE.steps * SCHEDULE.learning_rate
    # The same memory, but for codebooks, which bitsandbytes keeps beside each layer: 16 levels, and 256 for its magnitudes.
    assert memory[1].pop("weights") - memory[0].pop("weights") == len(lora.adapters(model)) * 4 * (16 + 256)
    assert memory[0] == memory[1]


@pytest.mark.slow
def test_in_16_bits_peft_keeps_a_float32_copy_of_the_input_for_each_adapter():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = make("llama").bfloat16()
    model = lora.add(models.duplicate(base), rank=4)
    names = list(lora.adapters(model))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=names, lora_dropout=0.0))
    window = torch.randint(1, 300, (3, 25), generator=torch.Generator().manual_seed(0))
    found = measure_step(theirs, window)["activations"] - measure_step(model, window)["activations"]
    hidden, intermediate, n, blocks = 64, 96, 72, 2
    # Copies for q, k, v, o, gate, up and down. Only attention's output stays in 16 bits as well: attention itself keeps it.
    assert found == blocks * n * (4 * (6 * hidden + intermediate) - 2 * (2 * hidden + intermediate))


def test_without_peft_one_line_says_so(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **named):
        if name == "peft":
            raise ModuleNotFoundError("No module named 'peft'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(models.ModelError, match="peft is not installed: pip install peft"):
        peers.load_with_peft({}, 16.0)


@pytest.mark.slow
def test_an_adapter_of_another_model_is_named():
    pytest.importorskip("peft", reason="peft is not installed")
    start = {"model.layers.9.mlp.up_proj.lora_a": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"start names model.layers.9.mlp.up_proj, which is no linear of the model's blocks"):
        peers.load_with_peft(start, 16.0, COURSE)
