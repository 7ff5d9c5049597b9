"""`labs inspect`: what a checkpoint holds, what is wrong with it, and what nobody could know from its bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from labsupport.checkpoint import card, compressed_tensors, gguf_file, layouts
from labsupport.checkpoint.gguf_file import GGUFWeights
from labsupport.checkpoint.skeleton import empty_model_and_ties
from labsupport.checkpoint.statistics import Offset, Order, group_means
from labsupport.checkpoint.stored import Checkpoint, layout_of, read
from labsupport.checkpoint.weights import FLOATS, CheckpointError, Weights, pickles, read_json
from labsupport.model import models, names, opened
from labsupport.quant import gguf_blocks, packing
from labsupport.quant.grid import QuantizedTensor, UniformTensor

SHOWN = 8  # findings of one kind that are listed by name
NEEDED = {"gptq": layouts.PARTS, "gptq_v2": layouts.PARTS, "awq": layouts.PARTS[:3], **compressed_tensors.PARTS}


@dataclass(frozen=True)
class Finding:
    """A fault. where: a tensor, a linear or a file. certain: it follows from what the format says, not from statistics alone."""

    where: str
    message: str
    certain: bool = True

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" + ("" if self.certain else " (by the look of the numbers)")


@dataclass
class Inspection:
    """What was found.

    known: checked and right. unknown: what the bytes cannot tell. nbytes: by what tensors are for. left_in_float: how many values
    the matrices of the blocks hold that are not quantized, by full name. ignored: tensors that the model has no use for any more.
    """

    directory: Path
    layout: str = ""
    settings: dict[str, object] = field(default_factory=dict)
    linears: int = 0
    weights: int = 0
    nbytes: dict[str, int] = field(default_factory=dict)
    left_in_float: dict[str, int] = field(default_factory=dict)
    ignored: set[str] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        stored = sum(size for kind, size in self.nbytes.items() if kind != "not quantized")
        return 8 * stored / self.weights if self.weights else 0.0

    def lines(self) -> Iterator[str]:
        """For people."""
        if self.layout:
            settings = ", ".join(f"{name} {value}" for name, value in self.settings.items() if value is not None)
            yield f"{self.directory}: {self.layout}, {settings}"
            yield f"{self.linears} quantized linears, {self.weights:,} weights at {self.bits_per_weight:.3f} bits"
            if self.left_in_float:
                floats = sum(self.left_in_float.values())
                bits = card.bits_of_blocks(self.bits_per_weight, self.weights, self.left_in_float)
                yield f"left in float: {card.in_short(self.left_in_float)}, {floats:,} weights; with them {bits:.3f} bits"
            width = max((len(f"{size:,}") for size in self.nbytes.values()), default=0)
            yield from (f"  {size:>{width},} bytes  {kind}" for kind, size in self.nbytes.items())
        for title, items in (("right", self.known), ("cannot be known", self.unknown)):
            yield from (f"{title}: {item}" for item in items)
        yield from (f"FAULT {finding}" for finding in self.findings)
        yield f"{len(self.findings)} faults" if len(self.findings) != 1 else "1 fault"


def inspect(directory: str | Path) -> Inspection:
    """Look into a quantized checkpoint. What is wrong with it is a finding.

    Raises CheckpointError only where there is nothing to look into: no directory, no config.json, a config of another format.
    """
    directory = Path(directory)
    result = Inspection(directory)
    file = gguf_file.located(directory)
    if file is None and not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory")
    config = read_json(directory / "config.json") if file is None else {}
    result.layout = layout_of(config, directory) if file is None else "gguf"
    if file is None and (names := pickles(directory)):
        result.findings.append(Finding(names[0], "is a pickle, which can run code when it is loaded; it was not read"))
    try:
        if file is not None:
            gguf_file.available()
        checkpoint = read(directory) if file else Checkpoint(directory, config, result.layout, Weights(directory, any_name=True))
    except CheckpointError as error:
        result.findings.append(Finding("files", str(error)))
        return result
    result.settings = _settings(checkpoint)
    result.nbytes = card.sizes(checkpoint.weights)
    result.findings += _shortened(_completeness(checkpoint, result))
    result.findings += _shortened(_check_floats(checkpoint.weights, result))
    _check_linears(checkpoint, result)
    return result


def _settings(checkpoint: Checkpoint) -> dict[str, object]:
    """What to show of the config."""
    if checkpoint.layout == "gguf":
        kinds = Counter(name.rpartition(".")[2] for name in checkpoint.weights if not name.endswith(".weight"))
        return {"blocks": ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())}
    settings = checkpoint.quantization
    size = checkpoint.group_size if checkpoint.layout in layouts.COMPRESSED else settings.get("group_size")
    return {
        "bits": checkpoint.bits, "group size": settings.get("bnb_4bit_quant_type") if size is None else size,
        "sym": checkpoint.grids.get("symmetric"), "desc_act": settings.get("desc_act"),
        "double quantization": settings.get("bnb_4bit_use_double_quant"),
        "activations": "8 bits a token" if layouts.rounds_activations(checkpoint.layout) else None,
    }  # fmt: skip


def _shortened(findings: Iterator[Finding] | list[Finding]) -> Iterator[Finding]:
    findings = list(findings)
    yield from findings[:SHOWN]
    if len(findings) > SHOWN:
        yield Finding("and", f"{len(findings) - SHOWN} more of this kind")


def _completeness(checkpoint: Checkpoint, result: Inspection) -> Iterator[Finding]:
    """Tensors that the architecture has and the files lack, those that it does not know, and shapes that differ.

    What the blocks hold in float goes into `result`.
    """
    weights = checkpoint.weights
    try:
        model, differing = empty_model_and_ties(checkpoint.directory, weights)
        pieces = opened.open_up(model).pieces
        linears, quantized = models.linears(model), set(checkpoint.names)
    except ValueError as error:
        yield Finding("config.json", f"{error}; whether tensors are missing was not checked")
        return
    if differing:
        one, other = differing
        message = f"ties {other} to {one}, and the files hold different values: a loader that goes by the config drops one"
        yield Finding("config.json", message)
    # gptqmodel can pack a head as well, which is in no block.
    linears |= {name: module for name, module in model.named_modules() if name in quantized and isinstance(module, nn.Linear)}
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    tied = shapes.keys() - {name for name, _ in model.named_parameters()} - {name for name, _ in model.named_buffers()}
    result.left_in_float = models.left_in_float(model)
    ignored, may_lack = names.ignored(model), names.may_lack(model)
    result.ignored = {name for name in weights if name not in shapes and ignored(name)}
    whole = {name: piece.parameter for name, piece in pieces.items() if piece.parameter in weights}
    for name in linears.keys() - quantized:
        result.left_in_float[f"{name}.weight"] = linears[name].weight.numel()
        if f"{name}.weight" in whole:
            continue
        if f"{name}.weight" not in weights:
            yield Finding(name, "is missing: neither packed nor as a plain weight")
        elif (kind := weights.kind(f"{name}.weight")) not in ("F32", "F16", "BF16"):
            yield Finding(name, f"is stored as {kind}, neither packed as this layout packs nor a plain weight")
    for name in sorted(quantized - linears.keys()):
        yield Finding(name, "is packed, and the architecture has no such linear")
    for name, shape in shapes.items():
        owner = name.rpartition(".")[0]
        if name.endswith(".weight") and owner in linears:
            continue
        if name not in weights:
            if name not in tied and not may_lack(name):
                yield Finding(name, "is missing")
        elif weights.shape(name) != shape:
            yield Finding(name, f"has shape {weights.shape(name)}, the config asks for {shape}")
    for name in sorted(weights):
        of_a_linear = any(name.startswith(linear + ".") for linear in linears)
        if not of_a_linear and name not in shapes and name not in whole.values() and name not in result.ignored:
            yield Finding(name, "is not known to the architecture")
    for name in sorted(quantized & linears.keys()):
        parts = NEEDED.get(checkpoint.layout, ())
        if missing := [part for part in parts if f"{name}.{part}" not in weights]:
            yield Finding(name, f"lacks {', '.join(missing)}")
        wanted = [linears[name].out_features, linears[name].in_features]
        readable = checkpoint.layout == "gguf" or any(f"{name}.{part}" in weights for part in parts[:1])
        if readable and (got := _stored_shape(checkpoint, name)) != wanted:
            yield Finding(name, f"holds a weight {got}, the config asks for {wanted}")


def _check_floats(weights: Weights | GGUFWeights, result: Inspection) -> Iterator[Finding]:
    """Of every tensor that is not quantized and that a loader reads."""
    for name in sorted(weights):
        kind = weights.kind(name)
        if card.kind_of(name, kind) != "not quantized" or name in result.ignored:
            continue
        if kind not in FLOATS:
            yield Finding(name, f"is stored as {kind}, wanted one of {', '.join(FLOATS)}")
        elif not all(part.isfinite().all() for part in weights.in_parts(name)):
            yield Finding(name, "holds NaN or infinity")


def _stored_shape(checkpoint: Checkpoint, name: str) -> list[int]:
    """[out_features, in_features] by the shape of the codes alone."""
    if checkpoint.layout == "gguf":
        kind = next(kind for kind in gguf_blocks.WEIGHTS if f"{name}.{kind}" in checkpoint.weights)
        rows, stored = checkpoint.weights.shape(f"{name}.{kind}")
        return [rows, stored // gguf_blocks.BYTES[kind] * gguf_blocks.WEIGHTS[kind]]
    if checkpoint.layout == compressed_tensors.INT8:
        return checkpoint.weights.shape(f"{name}.weight")
    if checkpoint.layout == compressed_tensors.PACKED:
        rows, words = [*checkpoint.weights.shape(f"{name}.weight_packed"), 0, 0][:2]
        return [rows, words * packing.WORD // checkpoint.bits]
    rows, columns = [*checkpoint.weights.shape(f"{name}.qweight"), 0, 0][:2]
    return [columns * 8, rows] if checkpoint.layout == "awq" else [columns, rows * packing.WORD // checkpoint.bits]


@torch.no_grad()
def _check_linears(checkpoint: Checkpoint, result: Inspection) -> None:
    """Every linear in turn, and the statistics of all of them together."""
    broken, offset, order = [], Offset(), Order()
    values: set[float] = set()  # of zero-points, the first two
    zeros = scattered = 0
    for name in checkpoint.names:
        result.linears += 1
        try:
            tensor = checkpoint.tensor(name)
        except CheckpointError as error:
            broken.append(Finding(name, str(error).removeprefix(f"{name}: ")))
            continue
        result.weights += tensor.shape[0] * tensor.shape[1]
        broken += _check_tensor(checkpoint, name, tensor)
        if isinstance(tensor, UniformTensor):
            means, spread = group_means(tensor)
            offset.add(tensor, means)
            if len(values) < 2:
                values |= set(tensor.zero_point.unique().tolist())
            zeros += int((tensor.zero_point == 0).sum())
            scattered += getattr(tensor, "g_idx", None) is not None
            if checkpoint.layout == "awq":
                order.add(tensor, means, spread)
    result.findings += _shortened(broken)
    if offset.steps:
        if len(values) == 1:
            _judge_constant_zero_point(checkpoint, result, int(values.pop()))
        else:
            _judge_zero_points(checkpoint, result, offset, zeros)
        if checkpoint.layout == "awq":
            _judge_order(result, order)
        elif bool(scattered) != bool(checkpoint.quantization.get("desc_act")):
            fact = f"desc_act is {checkpoint.quantization.get('desc_act')}, and {scattered} linears have groups out of order"
            result.findings.append(Finding("config.json", f"{fact}: a loader that goes by the config ignores g_idx"))
    result.unknown.append("whether these are good codes, and of which model: measure perplexity")


def _check_tensor(checkpoint: Checkpoint, name: str, tensor: QuantizedTensor) -> Iterator[Finding]:
    if isinstance(tensor, UniformTensor):
        wanted = checkpoint.group_size or tensor.shape[1]
        if tensor.group_size != wanted:
            yield Finding(name, f"has groups of {tensor.group_size}, config.json says {wanted}")


# What the other version of GPTQ's layout is called, for a file that reads as if it were of it.
OTHER_VERSION = {"gptq": "version 2 (gptq_v2)", "gptq_v2": "version 1 (gptq)"}


def _judge_constant_zero_point(checkpoint: Checkpoint, result: Inspection, value: int) -> None:
    """All zero-points are read as `value`: grids are symmetric."""
    middle, layout = 2 ** (checkpoint.bits - 1), checkpoint.layout
    if value == middle:
        result.known.append(f"zero-points: all read as {middle}, the middle, as symmetric grids ask for")
        return
    stored = value - 1 & 2**checkpoint.bits - 1 if layout == "gptq" else value
    right = middle - 1 if layout == "gptq" else middle
    steps = f"{abs(middle - value)} step{'' if abs(middle - value) == 1 else 's'}"
    message = f"all are stored as {stored}, symmetric {layout} files store {right}: each weight is read {steps} off"
    if layout in OTHER_VERSION and value - middle == (1 if layout == "gptq" else -1):
        message += f". That is what {OTHER_VERSION[layout]} stores: the file has the wrong label, or was packed wrongly"
    result.findings.append(Finding("zero-points", message))


def _judge_zero_points(checkpoint: Checkpoint, result: Inspection, offset: Offset, zeros: int) -> None:
    """They differ. zeros: how many are read as 0."""
    layout, steps = checkpoint.layout, offset.whole_steps
    if checkpoint.quantization.get("sym"):
        result.findings.append(Finding("zero-points", "config.json says sym, and they differ"))
    figures = f"codes lie {offset.middle:+.2f} steps from them on average, from layer to layer {offset.scatter:.2f} more or less"
    if steps is None:
        error = f"with a standard error of {offset.error:.2f}"
        result.unknown.append(f"whether zero-points are one off: {figures}, {error}: too unlike, or too few, to tell")
    elif steps == 0:
        result.known.append(f"zero-points: {figures}; one too high or low would show as a whole step")
    else:
        message = f"are read {abs(steps)} too {'high' if steps < 0 else 'low'}: {figures}"
        if layout in OTHER_VERSION and steps == (-1 if layout == "gptq" else 1):
            message += f". So they would be if the file were {OTHER_VERSION[layout]}; the same bytes could be a packer's mistake"
        result.findings.append(Finding("zero-points", message, certain=False))
    if layout == "gptq" and zeros and steps in (0, None):
        highest = 2**checkpoint.bits
        message = f"{zeros} are 0, stored as {highest - 1}, which AutoGPTQ's and other kernels read as {highest}"
        result.findings.append(Finding("zero-points", message, certain=steps == 0))


def _judge_order(result: Inspection, order: Order) -> None:
    wrong = list(order.findings())
    result.findings += [Finding(part, message, certain=False) for part, message in wrong]
    if wrong:
        return
    if order.codes.best(-1) is None:
        result.unknown.append(f"in which order outputs stand in a word: scales and codes do not show it ({order.codes})")
    else:
        result.known.append(f"order of outputs in a word: scales go against the codes' spread {order.codes}")
