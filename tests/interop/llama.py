"""GGUF files of the course model and of SmolLM2, written here and run by llama.cpp."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from interop import environment, load
from safetensors.torch import load_file, save_file
from torch import nn

from labsupport import checkpoint
from labsupport.model import fetched, models, text
from labsupport.quant import gguf_blocks

PERPLEXITY = 5e-3  # the share by which llama.cpp's may differ from that of our forward with inputs so rounded
# (method, settings): ggml's own rounding, and a method whose grid q4_0 has. SmolLM2 is 576 wide, which q4_k's 256 does not divide.
COURSE: dict[str, tuple[str, dict]] = {
    **{kind: (kind, {}) for kind in gguf_blocks.WEIGHTS},
    "gptq-q4_0": ("gptq", {"layout": "gguf", "samples": 16}),
    "bfloat16": ("q8_0", {"dtype": "bfloat16"}),
}
SMOLLM2 = {"q8_0": ("q8_0", {}), "q4_0": ("q4_0", {}), "q4_1": ("q4_1", {})}
# Where the tokenizers of GGUF and of transformers could part: digits, contractions, runs of spaces, lines, scripts, marks.
WORDS = (
    "def f(x):\n    return x**2 + 1234567.5e-10\n\n\n  if it's we'll they're I'VE:\tpass\n"
    "naïve café, 東京 και Москва 🙂 … «x» 10,000 km² \u00a0 end   \n\n a<|endoftext|>b\r\n"
)


def lines(threads: int, small: bool = False) -> Iterator[tuple[str, bool]]:
    """What llama.cpp makes of each file, beside our own forward of the values in it.

    llama.cpp rounds what goes into a linear to 8 bits, in blocks of 32 as q8_0 has them (ggml-cpu.c: vec_dot_type), and keeps keys
    and values in float16. How much that is, our own forward tells with inputs so rounded: log-probabilities may differ from ours in
    float32 by twice as much, and greedy tokens have to be ours until our two best lie within that of each other. Perplexity may
    differ by 0.5 % from that of our forward with inputs so rounded, and what it and llama.cpp's are beside ours in float32 is said
    as well: on SmolLM2 rounding inputs alone costs more than 0.5 %. A single window of it differs
    by more, either way, so 16 are taken. The tokens of a text have to be those of the tokenizer that the file was made from.
    """
    yield from _of_model(str(models.course_model_dir()), "code", COURSE, threads, 8)
    if small:
        return
    if fetched.place("smollm2").is_dir():
        yield from _of_model("smollm2", "wiki" if fetched.place("wiki").is_dir() else "prose", SMOLLM2, threads, 16)
    else:
        yield "llama.cpp smollm2: not tried, it was not fetched: labs fetch smollm2", True


def _of_model(name: str, words: str, cases: dict[str, tuple[str, dict]], threads: int, windows: int) -> Iterator[tuple[str, bool]]:
    _, tokenizer = models.load_model(name, device="cpu")
    heldout = text.load_text(tokenizer, words, "heldout")
    tokens = {
        "prompt": heldout.ids[: load.PROMPT][None].contiguous(),
        "text": heldout.ids[heldout.positions(load.LENGTH + 1, windows)],
    }
    wanted = tokenizer(WORDS)["input_ids"]
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        out = folder / "by-llama"
        out.mkdir()
        save_file(tokens, folder / "tokens.safetensors")
        (folder / "words.txt").write_bytes(WORDS.encode())
        for case, (method, settings) in cases.items():
            checkpoint.quantize(name, folder / case, method, windows=0, **settings)
            environment.LLAMA.run("run_llama", folder_name, str(out), case, threads=threads)
            what = f"llama.cpp {Path(name).name} {case}"
            refused = out / f"{case}.refused"
            if refused.exists():
                yield f"{what}: refused, {refused.read_text()}", False
                continue
            theirs = load_file(out / f"{case}.safetensors")
            cut = theirs.pop("words").tolist() == wanted
            model, _ = checkpoint.load(folder / case)
            ours = load.Ours(model, tokens, inputs_rounded, PERPLEXITY, coarse_text=True)
            said, good = ours.compare(theirs)
            exact = ours.measured["losses"]
            both = [f"{100 * load.more(losses, exact):+.3f}" for losses in (theirs["losses"], ours.losses)]
            said += f" (beside float32 inputs: llama.cpp's perplexity {both[0]} %, ours with inputs so rounded {both[1]} %)"
            yield f"{what}: {said}, text cut {'as' if cut else 'OTHERWISE than'} by the tokenizer", good and cut


def inputs_rounded(model: nn.Module) -> nn.Module:
    """The model with the inputs of its blocks' linears rounded to q8_0."""
    model = models.duplicate(model)
    for linear in models.linears(model).values():
        linear.register_forward_pre_hook(lambda layer, inputs: (_rounded(inputs[0]),))
    return model


def _rounded(inputs: torch.Tensor) -> torch.Tensor:
    return gguf_blocks.quantize_q8_0(inputs.flatten(0, -2)).dequantize().view_as(inputs)
