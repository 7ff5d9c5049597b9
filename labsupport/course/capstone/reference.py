"""A reference answer: bytes go to the matrices where they save the most loss, codes by GPTQ, and at low bits a little training.

1. How much a matrix loses with each choice of bits and groups is estimated by its Fisher information: half the sum of F e^2, where
   e is the error of rounding to nearest and F the mean square of the gradient of a window's loss, on training text.
2. `budget.spend` buys, again and again, the upgrade that saves the most for each byte.
3. The embedding is quantized first, since it feeds everything, and as the head once more: by GPTQ on what the head is fed. The
   linears of the blocks follow, by GPTQ, fed by what is before them; or they are trained on their grids, which pays below 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from labsupport.model import models
from labsupport.model.text import load_text
from labsupport.pipeline import budget as budgets
from labsupport.pipeline import calibrate, qat, training
from labsupport.pipeline.quantize import quantize_model
from labsupport.quant import gptq, rtn
from labsupport.quant.grid import QuantizedTensor

TABLE = "model.embed_tokens"  # the embedding, which is the head as well
BITS, GROUP_SIZES = (2, 3, 4, 5, 6), (32, 64, 128)
CHOICES = [(bits, size) for bits in BITS for size in GROUP_SIZES]
GPTQ = {"act_order": True, "static_groups": True}
SAMPLES = 32  # windows of training text to calibrate on
SCHEDULE = training.Schedule(steps=200, batch=2, length=512, warmup=20)
# By the bits that most matrices have: the fewer levels, the further a weight must go. As in data/measurements/qat.json.
RATES = {4: 5e-5, 3: 2e-4, 2: 1e-3}
# Bytes of a submission that are in no matrix: norms, the file's header with the names of all tensors, config.json.
BESIDE = 22_500


@dataclass(frozen=True)
class Choice:
    """What one matrix gets."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class Given:
    """What answers are made of. calibration: training text, int64 [windows, length]. ids: all of it, int64 [tokens].

    folder: keeps states of training. on_step(step, loss) is called while a model learns.
    """

    model: nn.Module
    calibration: Tensor
    ids: Tensor
    folder: Path
    on_step: Callable[[int, float], None] = lambda step, loss: None

    @cached_property
    def information(self) -> dict[str, Tensor]:
        """See `fisher`: of every second window, since each takes a backward pass."""
        return fisher(self.model, self.calibration[::2])


def given(folder: Path, on_step: Callable[[int, float], None] = lambda step, loss: None) -> Given:
    """The course model and its training text."""
    model, tokenizer = models.load_model(str(models.course_model_dir()), device="cpu")
    code = load_text(tokenizer, "code", "train")
    ids = torch.cat([code.ids, load_text(tokenizer, "prose", "train").ids])
    return Given(model, calibrate.windows(code, SAMPLES), ids, folder, on_step)


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """Every module with a matrix, by name: the embedding and the linears of the blocks."""
    return {TABLE: model.get_submodule(TABLE), **models.linears(model)}


def fisher(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Mean square of the gradient of a window's mean loss, for each weight of each matrix. ids: int64 [windows, length].

    The gradient of a window, times its tokens, stands in for those of single tokens: it takes one backward pass for each window.
    """
    found = {name: torch.zeros_like(module.weight, requires_grad=False) for name, module in matrices(model).items()}
    learner = models.duplicate(model).requires_grad_(True)
    for window in ids:
        learner.zero_grad()
        with torch.enable_grad():
            training.loss_of(learner, window[None]).backward()
        for name, module in matrices(learner).items():
            found[name] += module.weight.grad.pow(2) * len(window) / len(ids)
    return found


@torch.no_grad()
def losses(model: nn.Module, information: Mapping[str, Tensor]) -> Tensor:
    """Estimated loss of each matrix with each of CHOICES, in nats a token: float [matrices, choices]."""
    rows = []
    for name, module in matrices(model).items():
        errors = [rtn.quantize(module.weight, bits, size).dequantize() - module.weight for bits, size in CHOICES]
        rows.append(torch.stack([0.5 * (information[name] * error.pow(2)).sum() for error in errors]))
    return torch.stack(rows)


def allocation(given: Given, budget: int) -> dict[str, Choice]:
    """Bits and group size of each matrix, so that all of them take at most `budget` bytes. Raises ValueError where nothing fits."""
    found = matrices(given.model)
    shapes = torch.tensor([list(module.weight.shape) for module in found.values()])
    chosen = budgets.allocate(losses(given.model, given.information), shapes, torch.tensor(CHOICES), budget)
    return {name: Choice(*CHOICES[place]) for name, place in zip(found, chosen.tolist(), strict=True)}


@torch.no_grad()
def quantize_table(model: nn.Module, ids: Tensor, choice: Choice, damping: float = 0.1) -> QuantizedTensor:
    """Quantize the embedding in place, by GPTQ on what the head is fed. ids: calibration text, int64 [windows, length].

    A row is a token's input as well, where every error counts alike: for that the damping is high.
    """
    weight = model.get_submodule(TABLE).weight
    hessian = torch.zeros(weight.shape[1], weight.shape[1])
    for window in ids:
        fed = model.model(input_ids=window[None], use_cache=False).last_hidden_state[0]
        hessian += 2 * fed.T @ fed / (len(window) * len(ids))
    tensor = gptq.quantize(weight, hessian, choice.bits, choice.group_size, damping=damping, **GPTQ)
    weight.copy_(tensor.dequantize())
    return tensor


def by_gptq(given: Given, choices: Mapping[str, Choice]) -> tuple[nn.Module, dict[str, QuantizedTensor]]:
    """A quantized copy of the model, and what is stored of it by name."""
    model = models.duplicate(given.model).requires_grad_(False)
    stored: dict[str, QuantizedTensor] = {TABLE: quantize_table(model, given.calibration, choices[TABLE])}
    each = {name: vars(choice) for name, choice in choices.items() if name != TABLE}
    quantize_model(model, "gptq", calibration=given.calibration, overrides=each, in_place=True, stored=stored, **GPTQ)
    return model, stored


def trained(given: Given, choices: Mapping[str, Choice], state: str) -> tuple[nn.Module, dict[str, QuantizedTensor]]:
    """As `by_gptq`, but the linears of the blocks, and the norms, learn with their weights on their grids (straight through).

    state: the name of the file that keeps the run.
    """
    model = models.duplicate(given.model).requires_grad_(False)
    stored: dict[str, QuantizedTensor] = {TABLE: quantize_table(model, given.calibration, choices[TABLE])}
    for name, layer in models.linears(model).items():
        grid = qat.Grid("straight-through", choices[name].bits, choices[name].group_size)
        model.set_submodule(name, qat.QATLinear(layer, grid))
    model.requires_grad_(True)
    model.get_submodule(TABLE).weight.requires_grad_(False)  # it is on its grid already
    usual = max(RATES, key=lambda bits: sum(choice.bits == bits for choice in choices.values()))
    schedule = replace(SCHEDULE, learning_rate=RATES[usual])
    training.fit(model, given.ids, schedule, given.folder / f"{state}.safetensors", on_step=given.on_step)
    qat.convert(model, stored)
    return model, stored


def answer(given: Given, budget: int, train: bool) -> tuple[nn.Module, dict[str, QuantizedTensor]]:
    """The reference answer for a submission of `budget` bytes: its model, and what is stored of it."""
    choices = allocation(given, budget - BESIDE)
    return trained(given, choices, f"mixed-{budget}") if train else by_gptq(given, choices)
