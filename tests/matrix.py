"""The table of models and methods that README.md shows: `python tests/matrix.py` computes it and writes it there.

Each tiny model of architectures.py goes through each method: quantized from its directory block by block, written, read back by
`checkpoint.load`, and held to `quantize_model` on the whole model in memory; NF4 also to what transformers loads. A cell is
computed or the run fails: only a CheckpointError or a ModelError, which `labs quantize` prints in one line, becomes "no".
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from architectures import CONFIGS, VOCABULARY, write
from torch import nn

from labsupport import checkpoint, quantize_model
from labsupport.checkpoint import CheckpointError, card
from labsupport.model import files, models, peers, text
from labsupport.pipeline import calibrate
from labsupport.pipeline.methods import stored_methods

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- models -->", "<!-- /models -->"
WORDS = "def f(x):\n    return x + 1\n\nA longer line of prose, so that there is something to read.\n" * 20
IDS = torch.arange(2 * 24).view(2, 24) * 37 % VOCABULARY
SAMPLES, LENGTH = 4, 32
# Of labs quantize, and the same of quantize_model.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rtn": ({"group_size": -1}, {"group_size": None}),
    "gptq": ({"group_size": -1}, {**stored_methods()["gptq"].settings, "group_size": None}),
    "awq": ({"group_size": -1}, {"group_size": None}),
    "nf4": ({"group_size": 64}, {"block_size": 64, "double_quant": True}),
}
COLUMNS = {"rtn": "RTN", "gptq": "GPTQ", "awq": "AWQ", "nf4": "NF4", "int8": "int8"}
# Of the logits' size. Sums in another order, and ties of a grid that fall the other way for it; what AWQ folds into norms is
# stored in float16, 2**-11 of each value; transformers computes in float16.
ALIKE = {"rtn": 1e-5, "nf4": 1e-5, "gptq": 2e-2, "awq": 2e-2}
IN_FLOAT16 = 1e-2


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS, use_cache=False).logits.float()


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def row(name: str, folder: Path) -> dict[str, str]:
    """What works for a model: "yes", "labs" where labsupport alone reads the checkpoint, "no". `folder`: an empty one."""
    source, words = write(name, folder / "model", torch.float16), folder / "words.txt"
    words.write_text(WORDS)
    model, tokenizer = models.load_model(str(source), device="cpu")
    stream = text.tokenize(tokenizer, [text.Document("words.txt", WORDS)], "words")
    ids = calibrate.windows(stream, SAMPLES, LENGTH)
    cells = {method: _stored(name, method, source, words, model, ids) for method in METHODS}
    eight, _ = quantize_model(model, "int8")
    assert off(logits(eight), logits(model)) < 0.1, f"{name}: int8 changes the logits by {off(logits(eight), logits(model)):.2g}"
    return cells | {"int8": "yes"}


def _stored(name: str, method: str, source: Path, words: Path, model: nn.Module, ids: torch.Tensor) -> str:
    asked, given = METHODS[method]
    out = source.with_name(method)
    try:
        checkpoint.quantize(
            source, out, method, calibration=str(words), samples=SAMPLES, length=LENGTH, windows=0, device="cpu", **asked
        )
    except CheckpointError as error:
        if "\n" in str(error) or out.exists():
            raise AssertionError(f"{name} {method} is refused in several lines, or left something: {error}") from error
        return "no"
    loaded, _ = checkpoint.load(out)
    if method in ("gptq", "nf4"):  # the layouts whose names differ
        assert not checkpoint.inspect(out).findings, f"{name} {method}: {checkpoint.inspect(out).findings[0]}"
    text_of = {"calibration": ids} if method in ("gptq", "awq") else {}
    quantized, _ = quantize_model(model, method, **text_of, **given)
    got, want = logits(loaded), logits(quantized)
    assert off(got, want) < ALIKE[method], f"{name} {method}: what is read back is {off(got, want):.2g} off"
    assert off(got, logits(model)) > 1e-3, f"{name} {method}: nothing was quantized"
    settings = checkpoint.read(out)
    report = card.read_report(out)
    cell = "yes" if report["read_by"].startswith(card.LOADERS[settings.layout]) else "labs"
    if method == "nf4":
        by_transformers = _as_transformers(out)
        read = by_transformers is not None and off(by_transformers, got) < IN_FLOAT16
        split = any(linear.in_features % given["block_size"] for linear in models.linears(model).values())
        assert cell != "yes" or ("AVX-512" in report["read_by"]) == split, f"{name}: the card says {report['read_by']!r}"
        assert read == (cell == "yes"), f"{name}: the card says {report['read_by']!r}, and transformers reads it: {read}"
    shutil.rmtree(out)
    return cell


def _as_transformers(directory: Path) -> torch.Tensor | None:
    """The logits of the model that transformers makes of a checkpoint; None where it refuses to."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float16, device_map="cpu").eval()
    except RuntimeError:
        return None
    # What they hold, read as one row: their code for AVX-512 misreads rows that are not whole blocks, and in evaluation a layer may
    # repack its weight for the processor and round it again.
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            shape, state.shape = state.shape, torch.Size([1, state.shape.numel()])
            plain = nn.Linear(module.in_features, module.out_features, bias=False, dtype=torch.float16)
            plain.weight.data, plain.bias = (
                peers.bitsandbytes().functional.dequantize_4bit(module.weight, state).view(shape),
                module.bias,
            )
            model.set_submodule(name, plain)
    return logits(model)


def block(rows: dict[str, dict[str, str]]) -> str:
    """The table: models for which the same works share a row."""
    together: dict[tuple[str, ...], list[str]] = {}
    for name, cells in rows.items():
        together.setdefault(tuple(cells[method] for method in COLUMNS), []).append(name)
    lines = [f"| models | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    lines += [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in together.items()]
    return "\n".join(lines) + "\n"


def shown(readme: str) -> dict[str, dict[str, str]]:
    """The table in README.md, a row for each model."""
    table = readme.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    rows = {}
    for line in table:
        names, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        rows |= {name: dict(zip(COLUMNS, cells, strict=True)) for name in names.split(", ")}
    return rows


def main() -> int:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = {}
    for name in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = row(name, Path(folder))
        print(f"{name}: {', '.join(f'{method} {cell}' for method, cell in rows[name].items())}", flush=True)
    before, rest = README.read_text("utf-8").split(BEGIN)
    files.write_text(README, f"{before}{BEGIN}\n{block(rows)}{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
