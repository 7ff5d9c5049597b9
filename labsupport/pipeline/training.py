"""Training that can be stopped: every batch comes from the seed and the number of its step, and a state is one file of one step.

A run that continues from a state gives what a run without a stop gives, bit for bit on one kind of machine.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from labsupport.model import files, models
from labsupport.model.text import TextError
from labsupport.quant import checks
from labsupport.quant.grid import QuantizedTensor

BETAS = (0.9, 0.95)
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


class Diverged(ValueError):
    """The loss is no number any more. The model holds the last weights whose loss was one."""


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to learn. batch: windows a step. length: tokens of a window, each predicted from those before it.

    The learning rate rises for `warmup` steps, stays, and falls linearly to zero over the last `decay_share` of all steps.
    """

    steps: int = 100
    batch: int = 8
    length: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 10
    decay_share: float = 0.5
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of one step, counted from 0."""
        rising = (step + 1) / self.warmup if self.warmup else 1.0
        falling = (self.steps - step) / max(1, self.decay_share * self.steps)
        return self.learning_rate * min(1.0, rising, falling)


def batch_at(ids: Tensor, batch: int, length: int, seed: int, step: int) -> Tensor:
    """int64 [batch, length + 1]: windows at random places of the text, a function of seed and step alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    starts = torch.randint(0, len(ids) - length, (batch,), generator=generator)
    return torch.stack([ids[s : s + length + 1] for s in starts.tolist()])


def save_state(
    path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, step: int, progress: Mapping[str, Any]
) -> None:
    """Parameters, what the optimizer remembers of each, and in the metadata the step and `progress`: always of one step."""
    tensors = {f"model.{name}": value.detach().clone() for name, value in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().clone()
    files.save_tensors(path, tensors, {"step": str(step), "progress": json.dumps(progress)})


def read_progress(path: Path) -> dict[str, Any] | None:
    """The `progress` of a state; None where there is none. Raises ValueError for a file that is no state."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            return dict(json.loads(file.metadata()["progress"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or of another kind: delete it to start over") from error


@torch.no_grad()
def load_state(path: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Put a state back. Returns how many steps it has seen."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        for name, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"model.{name}"))
            optimizer.state[parameter] = {
                key: file.get_tensor(f"optimizer.{key}.{name}").to(parameter.device)
                for key in OPTIMIZER_STATE
                if f"optimizer.{key}.{name}" in keys
            }
        return int(file.metadata()["step"])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What learns, by full name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def only_last_blocks(model: nn.Module, count: int) -> None:
    """Where a model has more than `count` blocks, let nothing learn but what learns in the last of them, in place.

    The backward pass then ends at the first of these, and gradients and what an optimizer remembers are theirs alone.
    """
    every = models.blocks(model)
    if len(every) > count:
        last = {id(parameter) for block in every[-count:] for parameter in block.parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in last)


def fit(
    model: nn.Module,
    ids: Tensor,
    schedule: Schedule,
    state: Path | None = None,
    save_every: int = 50,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train what of the model requires a gradient, by AdamW, with the norm of all gradients clipped at 1. The loss of each step.

    ids: int64 [tokens], longer than a window. state: a file that keeps the run; the same call goes on from there, and a finished
    run is read back. on_step(step, loss) is called after each step. The model is left in evaluation mode.
    Raises ValueError where nothing learns, and where `state` is of another run (schedule, text, what learns or what is frozen);
    Diverged where a loss or a gradient is not finite: the model then holds the last weights whose loss was finite. `state` holds
    weights whose loss was finite, those of the step at which it was saved last: the same call diverges again.
    """
    parameters = trainable(model)
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: add adapters, or call model.requires_grad_()")
    checks.tokens(ids, "ids", models.vocabulary(model))
    if len(ids) <= schedule.length:
        raise TextError(f"the text has {len(ids)} tokens, wanted more than the {schedule.length} of a window")
    device = next(iter(parameters.values())).device
    plain = [p for p in parameters.values() if p.ndim != 2]
    decayed = [p for p in parameters.values() if p.ndim == 2]
    groups = [{"params": decayed, "weight_decay": schedule.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=schedule.learning_rate, betas=BETAS, fused=True
    )
    progress: dict[str, Any] = {"run": _identity(model, ids, schedule), "losses": []}
    first = 0
    if state is not None:
        files.check_writable(state)
        if (before := read_progress(state)) is not None:
            _check_same(state, before, progress["run"])
            progress, first = before, load_state(state, parameters, optimizer)
    losses: list[float] = progress["losses"]
    good = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    model.train()
    try:
        for step in range(first, schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            window = batch_at(ids, schedule.batch, schedule.length, schedule.seed, step).to(device)
            loss = loss_of(model, window)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            value = loss.item()
            if not (math.isfinite(value) and math.isfinite(norm.item())):
                _put_back(parameters, good)
                found = "a gradient is not finite" if math.isfinite(value) else f"the loss is {value}"
                advice = f"a learning_rate below {schedule.learning_rate} may not diverge"
                raise Diverged(f"{found} at step {step}: the model holds the weights from one step before; {advice}")
            for name, parameter in parameters.items():
                good[name].copy_(parameter.detach())
            if state is not None and step > first and step % save_every == 0:  # weights whose loss is known
                save_state(state, parameters, optimizer, step, progress)
            optimizer.step()
            losses.append(value)
            optimizer.zero_grad()
            on_step(step, value)
        if state is not None and first < schedule.steps:
            save_state(state, parameters, optimizer, schedule.steps, progress)
    finally:
        optimizer.zero_grad()
        model.eval()
    return losses


def loss_of(model: nn.Module, window: Tensor) -> Tensor:
    """Mean loss in nats of a batch of windows, int64 [batch, length + 1]; the logits are taken in float32."""
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def _put_back(parameters: Mapping[str, Tensor], good: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(good[name])


def _identity(model: nn.Module, ids: Tensor, schedule: Schedule) -> dict[str, Any]:
    """What must be equal for a state to be of this run. The model counts as it is before the first step."""
    return {
        "schedule": asdict(schedule), "text": digest({"ids": ids}),
        "learns": digest(trainable(model)), "frozen": digest(frozen_tensors(model)),
        "layers": hashlib.sha256(repr(model).encode()).hexdigest(),  # kinds of layers and their settings, as extra_repr gives them
    }  # fmt: skip


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of tensors: their names, shapes and bytes, in their order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def frozen_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that the model holds and that does not learn, packed weights among them, by full name."""
    found = {name: p for name, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    for name, module in model.named_modules():
        if isinstance(stored := getattr(module, "stored", None), QuantizedTensor):
            found |= {f"{name}.stored.{part}": tensor for part, tensor in stored.tensors.items()}
    return found


def _check_same(path: Path, before: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    found = before.get("run", {})
    if other := [key for key in run if found.get(key) != run[key]]:
        words = {"learns": "start of what learns", "frozen": "frozen model", "layers": "kind of layers"}
        named = ", ".join(words.get(key, key) for key in other)
        raise ValueError(f"{path} holds a run with another {named}: choose another file or delete it")
