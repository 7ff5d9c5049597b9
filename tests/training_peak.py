"""How much memory a step of LoRA on a 4-bit base takes: `python tests/training_peak.py`, on Linux. Half a minute.

A model of the width of a 1B-parameter Llama with 4 blocks of random weights is quantized to NF4 and takes three steps in a process
of its own. The kernel keeps the largest resident memory of the last two; what was resident before the model was made is taken off.
The exit code is 1 where the peak is more than 10 % above the bytes that labsupport.evidence.training_memory counts, or 20 % below.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from labsupport.evidence import planner
from labsupport.evidence.training_memory import Step, count, totals
from labsupport.model import memory
from labsupport.pipeline import lora, training
from labsupport.pipeline.quantize import quantize_model

ABOVE, BELOW = 0.1, 0.2


def model_of(
    hidden: int, intermediate: int, blocks: int, heads: int, kv_heads: int, vocabulary: int, rank: int
) -> LlamaForCausalLM:
    """Random weights, packed, with adapters."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model, stored = LlamaForCausalLM(config), {}
    quantize_model(model, "nf4", double_quant=True, stored=stored, in_place=True)
    return lora.add(model, stored, rank=rank)


def resident(peak: bool = False) -> int:
    """Bytes of this process in memory: now, or the most since `forget_peak`."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        if line.startswith("VmHWM" if peak else "VmRSS")
    )
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def take_steps(model: LlamaForCausalLM, step: Step, checkpointing: bool = False) -> int:
    """Three steps. The peak of the last two, when the optimizer has its states."""
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    parameters = training.trainable(model).values()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    for number in range(3):
        window = torch.randint(0, model.config.vocab_size, (step.batch, step.length + 1))
        training.loss_of(model, window).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            forget_peak()
    return resident(peak=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true")
    options = parser.parse_args()
    step = Step("qlora", options.batch, options.length, options.rank, "float32", checkpointing=options.checkpointing)
    memory.return_freed(2**18)
    take_steps(model_of(64, 96, 2, 4, 2, 128, 2), Step("qlora", 1, 16, 2, "float32"))  # what the libraries set up once
    gc.collect()
    before = resident()
    model = model_of(2048, 5632, 4, 32, 4, 4096, options.rank)
    gc.collect()
    measured = take_steps(model, step, options.checkpointing) - before
    counted = totals(count(planner.shape_of(model.config, "1B wide"), step))
    everything = sum(counted.values())
    for kind, nbytes in counted.items():
        print(f"{kind:12} {nbytes / 1e6:8.1f} MB")
    print(f"{'counted':12} {everything / 1e6:8.1f} MB")
    print(f"{'peak':12} {measured / 1e6:8.1f} MB, {100 * (measured / everything - 1):+.1f} %")
    return int(not 1 - BELOW <= measured / everything <= 1 + ABOVE)


if __name__ == "__main__":
    sys.exit(main())
