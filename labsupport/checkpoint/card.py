"""What is written about a checkpoint beside it: README.md, its card, for people; quantization_report.json for programs."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from labsupport import __version__
from labsupport.checkpoint.gguf_file import GGUFWeights
from labsupport.checkpoint.weights import Weights
from labsupport.pipeline.linear import LayerReport
from labsupport.quant import gguf_blocks

ENDINGS = {
    ".qweight": "codes", ".scales": "scales", ".qzeros": "zero-points", ".g_idx": "group of each column",
    ".absmax": "scales", ".nested_absmax": "scales", ".quant_map": "tables", ".nested_quant_map": "tables",
    ".quant_state.bitsandbytes__nf4": "tables", ".quant_state.bitsandbytes__fp4": "tables",
    ".weight_packed": "codes", ".weight_scale": "scales", ".weight_zero_point": "zero-points", ".weight_shape": "tables",
    **{f".{kind}": "blocks of scales and codes" for kind in gguf_blocks.WEIGHTS},
}  # fmt: skip
REPORT = "quantization_report.json"
KINDS = ("codes", "scales", "zero-points", "group of each column", "tables", "blocks of scales and codes", "not quantized")
LOADERS = {
    "gptq": "transformers with gptqmodel; AutoGPTQ; vLLM, if 4 bits, symmetric and in column order",
    "gptq_v2": "gptqmodel, and transformers with it",
    "awq": "transformers with gptqmodel; AutoAWQ; vLLM",
    "bitsandbytes": "transformers with bitsandbytes",
    "compressed-tensors": "transformers with compressed-tensors; vLLM",
    "compressed-tensors-w8a8": "transformers with compressed-tensors; vLLM",
    "gguf": "llama.cpp, and what is built on it; labsupport.checkpoint.load",
}


@cache
def versions() -> dict[str, str]:
    """Of the packages that a checkpoint is made with, and of Python. Looking them up takes longer than a small checkpoint."""
    packages = {name: version(name) for name in ("torch", "transformers", "safetensors")}
    return {"labsupport": __version__} | packages | {"python": platform.python_version()}


def kind_of(name: str, dtype: str) -> str:
    """What a stored tensor is for, one of KINDS. dtype: as safetensors names it."""
    for ending, kind in ENDINGS.items():
        if name.endswith(ending):
            return kind
    return "codes" if name.endswith(".weight") and dtype in ("U8", "I8") else "not quantized"


def sizes(weights: Weights | GGUFWeights) -> dict[str, int]:
    """Bytes of the tensors of a checkpoint, by what they are for."""
    nbytes = dict.fromkeys(KINDS, 0)
    for name in weights:
        nbytes[kind_of(name, weights.kind(name))] += weights.nbytes(name)
    return {kind: size for kind, size in nbytes.items() if size}


def in_short(names: Iterable[str]) -> str:
    """Full names, those together that differ in numbers alone: "model.layers.*.mlp.gate.weight (32)"."""
    counts = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    return ", ".join(f"{name} ({count})" for name, count in counts.items())


def bits_of_blocks(bits: float, weights: int, left_in_float: Mapping[str, int]) -> float:
    """For each weight of all matrices of the blocks: those of quantized linears with `bits`, those left in float with 16."""
    floats = sum(left_in_float.values())
    return (bits * weights + 16 * floats) / (weights + floats)


@dataclass(frozen=True)
class Facts:
    """What is known of a checkpoint when it is complete.

    source: name of the model. settings: Recipe.about. weights: how many the quantized linears hold. left_in_float: how many values
    the other matrices of the blocks hold, by name, as they are stored. layers: what became of each linear.
    texts: what it was calibrated on. measured: perplexity "before" and "after", and on what text; or why it "failed"; "compared":
    a sentence about transformers' own reading of the model. on_lattice: rounded_before.remark. readers: what loads it.
    group_size_why: a few words on a group size that nobody named.
    """

    source: str
    settings: Mapping[str, Any]
    weights: int
    left_in_float: Mapping[str, int] = field(default_factory=dict)
    layers: Mapping[str, LayerReport] = field(default_factory=dict)
    texts: Mapping[str, Any] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    on_lattice: str = ""
    readers: str = ""
    group_size_why: str = ""

    def bits_per_weight(self, sizes: Mapping[str, int]) -> float:
        """Of the quantized linears."""
        return 8 * sum(size for kind, size in sizes.items() if kind != "not quantized") / self.weights

    def bits_of_blocks(self, sizes: Mapping[str, int]) -> float:
        return bits_of_blocks(self.bits_per_weight(sizes), self.weights, self.left_in_float)

    @property
    def rounded(self) -> list[str]:
        """Experts that too few tokens reached."""
        return [name for name, layer in self.layers.items() if layer.rounded]

    def report(self, sizes: Mapping[str, int]) -> dict[str, Any]:
        return {
            "source": self.source,
            "settings": dict(self.settings),
            "group_size_why": self.group_size_why,
            "calibration": dict(self.texts),
            "perplexity": dict(self.measured),
            "bytes": dict(sizes),
            "bits_per_weight": self.bits_per_weight(sizes),
            "bits_per_weight_of_blocks": self.bits_of_blocks(sizes),
            "left_in_float": dict(self.left_in_float),
            "rounded_for_want_of_tokens": self.rounded,
            "on_a_lattice_before": self.on_lattice,
            "read_by": self.readers,
            "versions": versions(),
            "date": date.today().isoformat(),
            "layers": {name: asdict(report) for name, report in self.layers.items()},
        }

    def text(self, sizes: Mapping[str, int]) -> str:
        shown = {key.replace("_", " "): value for key, value in self.settings.items() if key not in ("method", "layout", "dtype")}
        layout, size = self.settings["layout"], shown.pop("group size") or "the whole row"
        why = f" ({self.group_size_why})" if self.group_size_why else ""
        shown["block size" if layout == "bitsandbytes" else "group size"] = f"{size}{why}"
        tags = dict.fromkeys((self.settings["method"], layout, "4-bit" if shown["bits"] == 4 else "quantized"))
        lines = [
            "---", "library_name: transformers", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]",
            "---", "",
            f"# {self.source or 'A model'}, {self.settings['method'].upper()} at {shown['bits']} bits", "",
            "Written by `labs quantize`. The linear layers of its blocks are quantized; embedding, norms and head are not.", "",
            "| setting | |", "|---|---|", *(f"| {name} | {_word(value)} |" for name, value in shown.items()),
            f"| layout | {layout} |", f"| other weights | {self.settings['dtype']} |",
        ]  # fmt: skip
        if self.texts:
            taken = f"{self.texts['samples']} windows of {self.texts['length']} tokens"
            lines.append(f"| calibration text | {self.texts['calibration']}, {taken} |")
        lines += ["", "| stored | bytes |", "|---|---:|", *(f"| {kind} | {size:,} |" for kind, size in sizes.items())]
        lines += ["", f"{self.bits_per_weight(sizes):.3f} bits for each of {self.weights:,} quantized weights, all counted."]
        if self.left_in_float:
            floats = sum(self.left_in_float.values())
            lines += [
                "", f"Left in {self.settings['dtype']}: {in_short(self.left_in_float)}, {floats:,} values. "
                f"With them it is {self.bits_of_blocks(sizes):.3f} bits for each weight of the blocks.",
            ]  # fmt: skip
        if self.rounded:
            lines += [
                "",
                f"Rounded to nearest, since too few tokens of the calibration text reached them: {', '.join(self.rounded)}.",
            ]
        if self.on_lattice:
            lines += ["", f"Of the unquantized model, {self.on_lattice}."]
        if layout == "compressed-tensors-w8a8":
            lines += [
                "",
                "Who runs it rounds what goes into a linear to 8 bits, each token by itself: so did the measurement.",
            ]
        if layout == "gguf":
            lines += ["", "Everything is in model.gguf: weights, tokenizer, what config.json said. Vectors are float32 there."]
        if "compared" in self.measured:
            lines += ["", self.measured["compared"]]
        if "failed" in self.measured:
            lines += ["", f"Perplexity could not be measured: {self.measured['failed']}."]
        elif "before" in self.measured:
            before, after = self.measured["before"], self.measured["after"]
            lines += [
                "", f"Perplexity {after:.4f}, unquantized {before:.4f} ({100 * (after / before - 1):+.2f} %), on "
                f"{self.measured['windows']} windows of {self.measured['length']} tokens of {self.measured['text']} "
                f"(sha256 {self.measured['sha256'][:12]}), products in float32.",
            ]  # fmt: skip
        else:
            lines += ["", "Perplexity was not measured."]
        packages = ", ".join(f"{name} {number}" for name, number in versions().items())
        return "\n".join([*lines, "", f"Read by: {self.readers}.", "", f"Made with {packages}, {date.today().isoformat()}.", ""])


def _word(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def read_report(directory: Path) -> dict[str, Any]:
    """What Facts.report gave for a checkpoint."""
    return json.loads((directory / REPORT).read_text("utf-8"))


def remarks(directory: Path) -> Iterator[str]:
    """What a user should know of a checkpoint that `labs quantize` wrote, and would not expect: a line each."""
    report = read_report(directory)
    if "failed" in report["perplexity"]:
        yield f"perplexity could not be measured: {report['perplexity']['failed']}"
    if report["read_by"] != LOADERS[report["settings"]["layout"]]:
        yield f"read by {report['read_by']}"
    if report["settings"].get("token_weights") == "attention" and not any(layer["weighed"] for layer in report["layers"].values()):
        yield "all tokens count alike: in this model's attention it cannot be seen how much each token gets"
    if left := report["left_in_float"]:
        bits = f"{report['bits_per_weight_of_blocks']:.3f} bits a weight of the blocks with them"
        yield f"left in {report['settings']['dtype']}: {in_short(left)}, {sum(left.values()):,} values; {bits}"
    if rounded := report["rounded_for_want_of_tokens"]:
        count = f"{len(rounded)} linears of experts saw too few tokens and were rounded to nearest: {in_short(rounded)}"
        yield f"{count}; {REPORT} names them, more --samples reach more"
