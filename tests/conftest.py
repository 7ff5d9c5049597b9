"""What every test may rely on: no setting of the user's reaches it, nothing is downloaded, property tests repeat themselves.

Every test and what it starts keep to one thread, so that workers can run beside each other and no result depends on the cores.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported, by the processes that tests start as well

import pytest
import torch
from hypothesis import settings
from scheduling import pytest_xdist_make_scheduler  # noqa: F401  # a hook

# nbformat's checker of JSON makes 38 grammars of addresses when it is imported: three seconds a worker, and no notebook needs one.
sys.modules.setdefault("rfc3987_syntax", None)
# nbgrader calls `alembic` by name: the environment need not be activated for the tests to find its commands.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

# Deadlines are off: a busy machine is not a wrong answer.
settings.register_profile("labs", deadline=None, derandomize=True)
settings.load_profile("labs")


def pytest_configure(config: pytest.Config) -> None:
    """A cache of the run's own, which its workers and what they start share; `labs test` gives one to all its parts."""
    if "LABS_CACHE" not in os.environ:
        os.environ["LABS_CACHE"] = tempfile.mkdtemp(prefix="labs-cache-")
        config.add_cleanup(partial(shutil.rmtree, os.environ["LABS_CACHE"], ignore_errors=True))


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("LABS_") and name != "LABS_CACHE"]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def course():
    """The course model and its tokenizer. Whoever changes the model works on a copy."""
    from labsupport.model import models

    return models.load_model(str(models.course_model_dir()), device="cpu")


@pytest.fixture(scope="session")
def held_out(course):
    """Held-out code in the course model's tokens."""
    from labsupport.model import text

    return text.load_text(course[1], "code")


@pytest.fixture(scope="session")
def tiny():
    """A Llama of three blocks with grouped-query attention and random weights. Whoever changes it works on a copy."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
