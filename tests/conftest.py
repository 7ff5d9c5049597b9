"""What every test may rely on: no setting of the user's reaches it, nothing is downloaded, property tests repeat themselves."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# nbgrader calls `alembic` by name: the environment need not be activated for the tests to find its commands.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

# Deadlines are off: a busy machine is not a wrong answer.
settings.register_profile("labs", deadline=None, derandomize=True)
settings.load_profile("labs")


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LABS_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def tiny():
    """A Llama of three blocks with grouped-query attention and random weights. Whoever changes it works on a copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
