"""How much memory `labs quantize` takes: `python tests/checkpoint_memory.py`, on Linux. Minutes, and some gigabytes of disk.

Models of the width of a 1B-parameter Llama with 4, 8 and 16 blocks of random weights are made in a temporary directory and
quantized in a process of their own, whose anonymous memory is read every 20 ms. Mapped files do not count: the system takes
their pages back when it needs them. The exit code is 1 where the peaks are more than 10 % apart or above 2.5 GB.

The calibration text is short here, to be done in minutes. With `--full` it is what `labs quantize` takes when nothing is said,
64 windows of 512 tokens, whose hidden states are then much of what is held; take `--blocks 4`, it needs ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, VOCABULARY = 2048, 5632, 32, 4, 4096
LIMIT, FLAT = 2.5e9, 0.1


def make(directory: Path, blocks: int) -> None:
    """One file for each block, so that the directory is written as it is read: a block at a time. float16."""
    from labsupport.model import models

    generator = torch.Generator().manual_seed(0)
    width = HIDDEN // HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (KEY_HEADS * width, HIDDEN),
        "self_attn.v_proj": (KEY_HEADS * width, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN), "mlp.up_proj": (INTERMEDIATE, HIDDEN), "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    }  # fmt: skip
    directory.mkdir()
    placed = {}

    def write(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, directory / file, {"format": "pt"})
        placed.update(dict.fromkeys(tensors, file))

    for block in range(blocks):
        start = f"model.layers.{block}"
        norms = {f"{start}.{name}.weight": torch.ones(HIDDEN).half() for name in ("input_layernorm", "post_attention_layernorm")}
        linears = {f"{start}.{k}.weight": (torch.randn(shape, generator=generator) / 50).half() for k, shape in shapes.items()}
        write(f"block-{block}.safetensors", norms | linears)
    embedding = (torch.randn(VOCABULARY, HIDDEN, generator=generator) / 50).half()
    write("outside.safetensors", {"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(HIDDEN).half()})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": blocks,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 512,
        "tie_word_embeddings": True, "torch_dtype": "float16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models.course_model_dir() / name, directory / name)


def anonymous(pid: int) -> int:
    """Bytes of a process that no file backs."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0


def peak(arguments: list[str]) -> tuple[int, float]:
    """The largest anonymous memory of `labs quantize` with these arguments, and its seconds."""
    start, most = time.monotonic(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "labsupport.cli", "quantize", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    while process.poll() is None:
        try:
            most = max(most, anonymous(process.pid))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(process.stderr.read().decode()[-2000:])
    return most, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--full", action="store_true", help="64 x 512 tokens, as by default")
    options = parser.parse_args()
    if options.full:
        options.samples, options.length = 64, 512
    peaks = []
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder) / "model", blocks)
            texts = ["--samples", options.samples, "--length", options.length, "--windows", options.windows]
            given = [f"{folder}/model", "--out", f"{folder}/out", "--method", options.method, *map(str, texts)]
            most, seconds = peak(given)
        peaks.append(most)
        print(
            f"{options.method}, {blocks} blocks, {options.samples} x {options.length} tokens: {most / 1e9:.3f} GB, {seconds:.0f} s",
            flush=True,
        )
    spread = max(peaks) / min(peaks) - 1
    print(f"largest over smallest: {100 * spread:+.1f} %, at most {100 * FLAT:.0f} % is wanted; {LIMIT / 1e9} GB is the limit")
    return int(spread > FLAT or max(peaks) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
