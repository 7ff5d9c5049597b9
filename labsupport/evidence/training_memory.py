"""Bytes of a training step: counted on paper from a model's shape, and measured from the tensors of a real step.

Five kinds, for full fine-tuning, LoRA, and LoRA on a base in NF4 (QLoRA). Activations are what autograd keeps of the forward pass
for the backward pass, tensor by tensor, in transformers' Llama with SDPA: on a CPU they are what is measured, to the byte.
Temporary is an estimate: what else is held at the busiest moment.

Not counted: `training.fit` keeps one copy more of what learns, to go back to. peft's prepare_model_for_kbit_training casts all that
is not quantized to float32. Where a model computes in 16 bits, peft's float32 adapters each keep a float32 copy of their input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from labsupport.evidence.shapes import Shape
from labsupport.pipeline import training
from labsupport.quant import checks, nf4
from labsupport.quant.grid import QuantizedTensor

SIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "uint8": 1}  # bytes of a value
KINDS = ("weights", "gradients", "states", "activations", "temporary")
# Of bitsandbytes' 8-bit optimizers: values that share a magnitude; smaller tensors keep 32 bits; smaller tensors are never paged.
STATE_BLOCK, LEAST_8BIT, LEAST_PAGED = 256, 4096, 100_000


@dataclass(frozen=True)
class Part:
    """One line of the count. values: of one tensor. times: how many such tensors. pageable: may leave the GPU for CPU memory."""

    kind: str
    name: str
    dtype: str
    values: int
    times: int = 1
    pageable: bool = False

    @property
    def nbytes(self) -> int:
        return self.values * self.times * SIZE[self.dtype]


@dataclass(frozen=True)
class Step:
    """A training step on `batch` windows of `length` tokens.

    tuning: "full", "lora" or "qlora"; adapters of `rank` stand beside every linear of the blocks, and the base of "qlora" is NF4
    with double quantization. dtype: of weights that are not quantized and of what passes between layers. adapter_dtype: of A and B.
    optimizer: "adamw", two float32 states a parameter, or "adamw-8bit", bitsandbytes'. paged: its states are pageable, as in
    bitsandbytes' PagedAdamW. checkpointing: of what a block keeps only its input stays; its backward pass computes the rest again.
    attention: the kernel behind SDPA, "flash", or "math", which keeps a probability for each pair of tokens.
    Raises ValueError for another value.
    """

    tuning: Literal["full", "lora", "qlora"]
    batch: int = 1
    length: int = 512
    rank: int = 8
    dtype: str = "bfloat16"
    adapter_dtype: str = "float32"
    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    paged: bool = False
    checkpointing: bool = False
    attention: Literal["flash", "math"] = "flash"

    def __post_init__(self) -> None:
        checks.choice(self.tuning, "tuning", ("full", "lora", "qlora"))
        checks.choice(self.dtype, "dtype", ("float32", "bfloat16", "float16"))
        checks.choice(self.adapter_dtype, "adapter_dtype", ("float32", "bfloat16", "float16"))
        checks.choice(self.optimizer, "optimizer", ("adamw", "adamw-8bit"))
        checks.choice(self.attention, "attention", ("flash", "math"))
        for name in ("batch", "length", "rank"):
            checks.whole(getattr(self, name), name)

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def count(shape: Shape, step: Step) -> list[Part]:
    """Every tensor of a step, in the order of KINDS."""
    learned = learned_tensors(shape, step)
    gradients = [Part("gradients", part.name, part.dtype, part.values, part.times) for part in learned]
    return [
        *weights(shape, step), *gradients, *states(learned, step), *activations(shape, step), *temporary(shape, step),
    ]  # fmt: skip


def totals(parts: Iterable[Part]) -> dict[str, int]:
    """Bytes of each kind."""
    parts = list(parts)
    return {kind: sum(part.nbytes for part in parts if part.kind == kind) for kind in KINDS}


def _model(shape: Shape, dtype: str, linears: bool = True) -> list[Part]:
    """The parameters of the model. linears: those of the blocks' linears among them."""
    tables = [Part("weights", "embedding", dtype, shape.embedding_parameters)]
    if not shape.tied:
        tables.append(Part("weights", "output head", dtype, shape.embedding_parameters))
    norms = [Part("weights", "norms", dtype, shape.hidden, 2 * shape.layers + 1)]
    sizes = shape.block_linears.items() if linears else ()
    return tables + norms + [Part("weights", name, dtype, rows * columns, shape.layers) for name, (rows, columns) in sizes]


def _adapters(shape: Shape, step: Step) -> list[Part]:
    found = []
    for name, (rows, columns) in shape.block_linears.items():
        found.append(Part("weights", f"A of {name}", step.adapter_dtype, step.rank * columns, shape.layers))
        found.append(Part("weights", f"B of {name}", step.adapter_dtype, step.rank * rows, shape.layers))
    return found


def learned_tensors(shape: Shape, step: Step) -> list[Part]:
    """The weights that get a gradient: all of them, or the adapters."""
    return _model(shape, step.dtype) if step.tuning == "full" else _adapters(shape, step)


def weights(shape: Shape, step: Step) -> list[Part]:
    """The model's and the adapters'. NF4 has codes, a byte for each block, a float32 for 256 of these, and one for all."""
    if step.tuning != "qlora":
        return _model(shape, step.dtype) + (_adapters(shape, step) if step.tuning == "lora" else [])
    packed = []
    for name, (rows, columns) in shape.block_linears.items():
        blocks = -(-rows * columns // nf4.BLOCK_SIZE)
        packed += [
            Part("weights", f"{name}, 4-bit codes", "uint8", -(-rows * columns // 2), shape.layers),
            Part("weights", f"{name}, 8-bit magnitudes", "uint8", blocks, shape.layers),
            Part("weights", f"{name}, theirs", "float32", -(-blocks // nf4.NESTED_BLOCK_SIZE) + 1, shape.layers),
        ]
    return _model(shape, step.dtype, linears=False) + packed + _adapters(shape, step)


def states(learned: Iterable[Part], step: Step) -> list[Part]:
    """What the optimizer remembers: mean and mean square of the gradient.

    bitsandbytes' AdamW has them in float32. PyTorch's has the parameter's dtype, and a float32 count of steps for each parameter.
    In 8 bits each is a byte, with a float32 for every 256; a tensor below 4,096 values keeps 32 bits. Tensors from 100,000 values
    on are paged, which adapters of low rank do not reach; the float32 magnitudes stay.
    """
    found = []
    for part in learned:
        eight = step.optimizer == "adamw-8bit" and part.values >= LEAST_8BIT
        pageable = step.paged and part.values >= LEAST_PAGED
        dtype = "uint8" if eight else "float32"
        found.append(Part("states", f"mean and square, {part.name}", dtype, part.values, 2 * part.times, pageable))
        if eight:
            blocks = -(-part.values // STATE_BLOCK)
            found.append(Part("states", f"their magnitudes, {part.name}", "float32", blocks, 2 * part.times))
    if step.optimizer == "adamw" and not step.paged:
        found.append(Part("states", "counts of steps", "float32", 1, sum(part.times for part in learned)))
    if any(part.dtype == "uint8" for part in found):
        found.append(Part("states", "the two 8-bit codes", "float32", 256, 2))
    return found


def activations(shape: Shape, step: Step) -> list[Part]:
    """What autograd keeps of the forward for the backward pass, each tensor once, without parameters.

    A frozen weight asks for nothing of its input; its adapter does: dL/dA needs x, dL/dB needs x A^T. Below the first adapter
    nothing learns, so the first norm of a model with adapters keeps nothing. With checkpointing a block keeps its input alone.
    """
    full, n = step.tuning == "full", step.tokens
    # The same for all blocks.
    ends = [Part("activations", f"{name} of positions", step.dtype, step.length * shape.width) for name in ("cosine", "sine")]
    if full:
        ends.append(Part("activations", "token ids", "int64", step.batch * (step.length + 1)))
    ends += _norm("last norm", shape, step)
    if full:
        ends.append(Part("activations", "output head: input", step.dtype, n * shape.hidden))
    ends += [
        Part("activations", "loss: log-probabilities", "float32", n * shape.vocab),
        Part("activations", "loss: targets", "int64", n),
        Part("activations", "loss: weight of all targets", "float32", 1),
    ]
    if step.checkpointing:
        return [Part("activations", "block: input", step.dtype, n * shape.hidden, shape.layers), *ends]
    first_norms = shape.layers if full else shape.layers - 1
    return [
        *(replace(part, times=first_norms) for part in _norm("first norm", shape, step)),
        *(replace(part, times=part.times * shape.layers) for part in _block(shape, step)),
        *ends,
    ]


def _block(shape: Shape, step: Step) -> list[Part]:
    """Of one block, without its first norm."""
    full, n, d = step.tuning == "full", step.tokens, step.dtype
    queries, keys = shape.heads * shape.width, shape.kv_heads * shape.width
    found = [Part("activations", "q, k, v: input", d, n * shape.hidden)]
    if step.attention == "flash":
        found += [
            Part("activations", "attention: q", d, n * queries),
            Part("activations", "attention: k and v", d, n * keys, 2),
            Part("activations", "attention: log of the sums", "float32", n * shape.heads),
        ]
    else:  # computes in float32, and repeats keys and values for every head
        found += [
            Part("activations", "attention: q, k and v", "float32", n * queries, 3),
            Part("activations", "attention: probabilities", "float32", n * shape.heads * step.length),
        ]
    found.append(Part("activations", "attention: output, o_proj's input", d, n * queries))
    found += _norm("second norm", shape, step)
    found += [
        Part("activations", "gate, up: input", d, n * shape.hidden),
        Part("activations", "gate, up, and SiLU of gate", d, n * shape.intermediate, 3),
        Part("activations", "down_proj: input", d, n * shape.intermediate),
    ]
    if not full:
        found.append(Part("activations", "x A^T", step.adapter_dtype, n * step.rank, len(shape.block_linears)))
    return found


def _norm(name: str, shape: Shape, step: Step) -> list[Part]:
    """It computes in float32. The input divided by its size is only kept for the gradient of the norm's own weight."""
    n = step.tokens
    found = [
        Part("activations", f"{name}: input", "float32", n * shape.hidden),
        Part("activations", f"{name}: 1 / root mean square", "float32", n),
    ]
    return found + ([Part("activations", f"{name}: normalized", step.dtype, n * shape.hidden)] if step.tuning == "full" else [])


def temporary(shape: Shape, step: Step) -> list[Part]:
    """What else is held at the busiest moment of the backward pass: of these two, the one that takes more.

    At the loss: its gradients by log-probabilities and by logits. In down_proj, the widest: the gradient of its input, twice while
    two branches are summed, and of its output; for "qlora" the weight as it reads back in float32, and again where `dtype` differs;
    with checkpointing what its block keeps, computed again.
    """
    n = step.tokens
    loss = [Part("temporary", "loss: gradients by log-probabilities and logits", "float32", n * shape.vocab, 2)]
    block = [
        Part("temporary", "down_proj: gradient of its input", step.dtype, n * shape.intermediate, 2),
        Part("temporary", "down_proj: gradient of its output", step.dtype, n * shape.hidden, 2),
    ]
    if step.tuning == "qlora":
        largest = max(rows * columns for rows, columns in shape.block_linears.values())
        block.append(Part("temporary", "one weight, read back", "float32", largest))
        if step.dtype != "float32":
            block.append(Part("temporary", "one weight, read back and cast", step.dtype, largest))
    if step.checkpointing:
        again = _norm("first norm", shape, step) + _block(shape, step)
        block += [replace(part, kind="temporary", name=f"computed again: {part.name}") for part in again]
    return max(loss, block, key=lambda parts: sum(part.nbytes for part in parts))


def measure_step(model: nn.Module, window: Tensor, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW) -> dict[str, int]:
    """Bytes of the tensors of one real step: weights, gradients, states, activations. The model's weights change by that step.

    window: int64 [batch, length + 1]. A model of peft over bitsandbytes' layers is measured too. Memory that several tensors share
    counts once; buffers do not count. Raises ValueError where no parameter learns.
    """
    parameters = training.trainable(model)
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient: add adapters, or call model.requires_grad_()")
    held = [*model.parameters(), *_packed(model)]
    was_training = model.training
    model.train()
    stepping = optimizer(parameters.values(), lr=1e-4)
    kept: list[Tensor] = []  # also keeps them, so that no memory is used twice while it is counted

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = training.loss_of(model, window)
    activations = _memory(kept, without=[*held, *model.buffers()])
    kept.clear()
    loss.backward()
    gradients = _memory(parameter.grad for parameter in parameters.values() if parameter.grad is not None)
    stepping.step()
    remembered = _memory(value for state in stepping.state.values() for value in state.values() if isinstance(value, Tensor))
    stepping.zero_grad()
    model.train(was_training)
    return {"weights": _memory(held), "gradients": gradients, "states": remembered, "activations": activations}


def _memory(tensors: Iterable[Tensor], without: Iterable[Tensor] = ()) -> int:
    """Bytes of the memory of these tensors, each piece once, and none that is of `without`."""
    sizes = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    others = {tensor.untyped_storage().data_ptr() for tensor in without}
    return sum(size for address, size in sizes.items() if address not in others)


def _packed(model: nn.Module) -> list[Tensor]:
    """The tensors of weights that are kept packed: ours, and what stands beside the codes in bitsandbytes' 4-bit layers."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(stored := getattr(module, "stored", None), QuantizedTensor):
            found += stored.tensors.values()
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            found += [value for value in vars(part).values() if isinstance(value, Tensor)] if part is not None else []
    return found
