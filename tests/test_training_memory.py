"""Bytes of a training step: the count against real steps, against bitsandbytes' optimizer, and against published totals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from labsupport.evidence import planner
from labsupport.evidence.planner import LLAMA_7B
from labsupport.evidence.training_memory import Part, Step, count, measure_step, totals
from labsupport.model import models
from labsupport.model.peers import bitsandbytes
from labsupport.pipeline import lora
from labsupport.pipeline.quantize import quantize_model

ROOT = Path(__file__).parents[1]
BATCH, LENGTH, RANK = 3, 24, 4
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}


def small(tied: bool = True, kv_heads: int = 2) -> LlamaForCausalLM:
    """No two of its sizes are equal."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
            head_dim=32, vocab_size=320, tie_word_embeddings=tied, max_position_embeddings=128,
        )
    )  # fmt: skip


def tuned(model: LlamaForCausalLM, tuning: str) -> LlamaForCausalLM:
    stored = {}
    if tuning == "qlora":
        quantize_model(model, "nf4", double_quant=True, stored=stored, in_place=True)
    return model if tuning == "full" else lora.add(model, stored or None, rank=RANK)


def both(model: LlamaForCausalLM, step: Step, optimizer=torch.optim.AdamW) -> tuple[dict[str, int], dict[str, int]]:
    """The count, and a step measured."""
    window = torch.randint(0, 320, (step.batch, step.length + 1), generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(BACKENDS[step.attention]):
        measured = measure_step(model, window, optimizer)
    counted = totals(count(planner.shape_of(model.config, "small"), step))
    return {kind: counted[kind] for kind in measured}, measured


@pytest.mark.parametrize("tuning", ["full", "lora", "qlora"])
@pytest.mark.parametrize("attention", ["flash", "math"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_count_is_what_a_step_holds_to_the_byte(tuning, attention, dtype):
    model = tuned(small().to(getattr(torch, dtype)), tuning)
    counted, measured = both(model, Step(tuning, BATCH, LENGTH, RANK, dtype, attention=attention))
    if tuning == "full" and dtype != "float32":
        # PyTorch's AdamW has its states in the dtype of the parameters, the count has float32.
        learned = 2 * sum(parameter.numel() for parameter in model.parameters())
        measured["states"] += (4 - 2) * learned
    assert measured == counted


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_heads_of_their_own_and_a_head_that_is_not_tied(tuning):
    model = tuned(small(tied=False, kv_heads=4), tuning)
    counted, measured = both(model, Step(tuning, BATCH, LENGTH, RANK, "float32"))
    assert measured == counted


@pytest.mark.parametrize("tuning", ["full", "qlora"])
def test_with_checkpointing(tuning):
    model = tuned(small(), tuning)
    model.gradient_checkpointing_enable()
    counted, measured = both(model, Step(tuning, BATCH, LENGTH, RANK, "float32", checkpointing=True))
    # The blocks hold sine and cosine in the call that is to be repeated, which autograd's hooks do not see.
    measured["activations"] += 2 * LENGTH * 32 * 4
    assert measured == counted
    assert counted["activations"] < both(tuned(small(), tuning), Step(tuning, BATCH, LENGTH, RANK, "float32"))[1]["activations"] / 3


@pytest.mark.parametrize(("tuning", "rank"), [("full", RANK), ("lora", 48)])
def test_states_in_eight_bits_are_those_of_bitsandbytes(tuning, rank):
    """Some tensors are below 4,096 values here and some above."""
    model = small() if tuning == "full" else lora.add(small(), rank=rank)
    counted, measured = both(
        model, Step(tuning, BATCH, LENGTH, rank, "float32", optimizer="adamw-8bit"), bitsandbytes().optim.AdamW8bit
    )
    assert measured == counted


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own record of the peak is read")
def test_the_peak_of_a_step_at_the_width_of_a_1b_model_is_what_is_counted():
    done = subprocess.run([sys.executable, "tests/training_peak.py", "--length", "128"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_paged_on_a_7b_model():
    def pageable(rank: int) -> int:
        return sum(part.nbytes for part in count(LLAMA_7B, Step("qlora", rank=rank, paged=True)) if part.pageable)

    # A of down_proj has 11008 r values, B of gate_proj too, and the others 4096 r: from 100,000 on a tensor is paged.
    assert pageable(8) == 0
    assert pageable(16) == 32 * 3 * 2 * 4 * 11008 * 16
    assert pageable(64) == totals(count(LLAMA_7B, Step("qlora", rank=64, paged=True)))["states"]


def test_published_figures():
    """QLoRA (arXiv:2305.14314): section 1, more than 780 GB for 65B parameters in 16 bits; section 3, 0.127 bits for magnitudes."""
    full = totals(count(LLAMA_7B, Step("full")))
    assert full["weights"] == full["gradients"] == 2 * LLAMA_7B.parameters
    assert (full["weights"] + full["gradients"] + full["states"]) / LLAMA_7B.parameters == pytest.approx(780 / 65, rel=1e-6)
    eight = totals(count(LLAMA_7B, Step("full", optimizer="adamw-8bit")))["states"]
    assert eight == pytest.approx((2 + 2 * 4 / 256) * LLAMA_7B.parameters, rel=1e-6)
    packed = sum(part.nbytes for part in count(LLAMA_7B, Step("qlora")) if part.kind == "weights" and "proj, " in part.name)
    assert 8 * packed / LLAMA_7B.linear_parameters == pytest.approx(4.127, abs=5e-4)


def test_the_course_model():
    model = tuned(models.load_model(str(models.course_model_dir()))[0], "qlora")
    window = torch.randint(0, 4096, (2, 65), generator=torch.Generator().manual_seed(0))
    counted = totals(count(planner.shape_of(model.config, "course"), Step("qlora", 2, 64, RANK, "float32")))
    assert measure_step(model, window) == {kind: counted[kind] for kind in ("weights", "gradients", "states", "activations")}


def test_a_step_that_does_not_exist_is_refused():
    for wrong, words in (
        ({"tuning": "dora"}, "tuning is 'dora', wanted one of full, lora, qlora"),
        ({"tuning": "lora", "rank": 0}, "rank is 0"),
        ({"tuning": "lora", "dtype": "int8"}, "dtype is 'int8'"),
        ({"tuning": "lora", "optimizer": "sgd"}, "optimizer is 'sgd'"),
    ):
        with pytest.raises(ValueError, match=words):
            Step(**wrong)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        measure_step(small().requires_grad_(False), torch.zeros(1, 3, dtype=torch.int64))
    assert Part("weights", "x", "bfloat16", 3, 2).nbytes == 12
