"""A run that is stopped and goes on, one that diverges, and a state that belongs to another run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import make

from labsupport.model import files, models
from labsupport.model.text import TextError
from labsupport.pipeline import lora, training
from labsupport.pipeline.quantize import quantize_model
from labsupport.pipeline.training import Diverged, Schedule, fit, trainable

IDS = torch.randint(1, 300, (600,), generator=torch.Generator().manual_seed(0))
SCHEDULE = Schedule(steps=10, batch=2, length=16, learning_rate=1e-2, weight_decay=0.1, warmup=2)
BASE, STORED = make("llama"), {}
quantize_model(BASE, "nf4", stored=STORED, in_place=True)


def start(seed: int = 0):
    return lora.add(models.duplicate(BASE), STORED, rank=4, seed=seed)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainable(model).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("stop", [0, 4, 5, 8])
def test_a_run_that_was_stopped_goes_on_to_the_same_result(tmp_path, stop):
    whole = start()
    losses = fit(whole, IDS, SCHEDULE)
    assert not same(weights(whole), weights(start()))
    state, seen = tmp_path / "deep" / "state", []

    def interrupt(step, loss):
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(start(), IDS, SCHEDULE, state, save_every=3, on_step=interrupt)
    other = start()
    assert fit(other, IDS, SCHEDULE, state, save_every=3, on_step=lambda step, loss: seen.append(step)) == losses
    assert seen == list(range(stop // 3 * 3, 10))
    assert same(weights(other), weights(whole))
    # A finished run is read back.
    seen.clear()
    again = start()
    assert fit(again, IDS, SCHEDULE, state, on_step=lambda step, loss: seen.append(step)) == losses
    assert not seen
    assert same(weights(again), weights(whole))
    assert [path.name for path in state.parent.iterdir()] == ["state"]
    assert not again.training


def test_a_run_that_diverges_stops_and_the_model_holds_the_last_good_weights(tmp_path):
    model, losses = start(), []
    wild = replace(SCHEDULE, learning_rate=1e20, warmup=0)
    with pytest.raises(
        Diverged, match=r"at step \d: the model holds the weights from one step before; a learning_rate below 1e\+20"
    ):
        fit(model, IDS, wild, tmp_path / "state", save_every=1, on_step=lambda step, loss: losses.append(loss))
    assert losses
    # The weights are those whose loss was the last finite one.
    model.train()
    window = training.batch_at(IDS, wild.batch, wild.length, wild.seed, len(losses) - 1)
    assert training.loss_of(model, window).item() == losses[-1]
    model.eval()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    # The state holds weights whose loss was finite: the same call comes to the same end.
    again = start()
    with pytest.raises(Diverged, match=f"at step {len(losses)}:"):
        fit(again, IDS, wild, tmp_path / "state", save_every=1)
    assert same(weights(again), weights(model))


def test_the_state_of_another_run_is_refused(tmp_path):
    state = tmp_path / "state"
    fit(start(), IDS, SCHEDULE, state)

    def refused(words, model, ids=IDS, schedule=SCHEDULE):
        before = weights(model)
        with pytest.raises(ValueError, match=f"state holds a run with another {words}: choose another file or delete it"):
            fit(model, ids, schedule, state)
        assert same(weights(model), before)

    refused("schedule", start(), schedule=replace(SCHEDULE, seed=1))
    refused("text", start(), ids=IDS.flip(0))
    refused("start of what learns", start(seed=1))
    refused("start of what learns, kind of layers", lora.add(models.duplicate(BASE), STORED, rank=3))
    refused("kind of layers", lora.add(models.duplicate(BASE), STORED, rank=4, alpha=17.0))
    other = start()
    with torch.no_grad():
        next(iter(lora.adapters(other).values())).stored.packed_codes[0] ^= 1
    refused("frozen model", other)
    with torch.no_grad():  # what is stored is shared by all models here
        next(iter(lora.adapters(other).values())).stored.packed_codes[0] ^= 1
    for name, content in (("text", b"not a tensor"), ("half", state.read_bytes()[:1000])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged or of another kind: delete it to start over"):
            fit(start(), IDS, SCHEDULE, tmp_path / name)
    files.save_tensors(tmp_path / "plain", {"w": torch.zeros(2)})
    with pytest.raises(ValueError, match="plain is damaged or of another kind"):
        fit(start(), IDS, SCHEDULE, tmp_path / "plain")


def test_what_cannot_learn_is_named():
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        fit(models.duplicate(BASE).requires_grad_(False), IDS, SCHEDULE)
    with pytest.raises(TextError, match="the text has 16 tokens, wanted more than the 16 of a window"):
        fit(start(), IDS[:16], SCHEDULE)
    with pytest.raises(ValueError, match="ids"):
        fit(start(), IDS + 1000, SCHEDULE)


def test_only_the_last_blocks_learn(course):
    model = models.duplicate(course[0]).requires_grad_(True)
    everything = set(training.trainable(model))
    training.only_last_blocks(model, 6)  # it has six
    assert set(training.trainable(model)) == everything
    training.only_last_blocks(model, 2)
    assert set(training.trainable(model)) == {name for name in everything if ".layers.4." in name or ".layers.5." in name}
