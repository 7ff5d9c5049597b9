"""The notebooks on a model that is not the course's: LABS_MODEL and LABS_TEXT name it and its text, LABS_QUICK keeps it short.

What is computed there is not compared with anything; that every cell comes to its end is what is tested. A group size of 128 that
does not divide, a layer of a certain name, or a text that is taken for granted would stop one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from nbformat import NotebookNode

from labsupport.course import build, execute
from labsupport.model import files, models, quick, text

ROOT = Path(__file__).resolve().parents[1]
ON_SMOLLM2 = ("02", "03")  # of the shorter ones
pytestmark = pytest.mark.slow


def printed(number: str, settings: Mapping[str, str]) -> str:
    """Run a solved notebook with these LABS_ variables and return what it printed. BuildError where a cell fails."""
    (source,) = build.sources(ROOT, [number])
    ran: NotebookNode = execute.execute(build.read(source), source.name, False, settings={quick.VARIABLE: "1", **settings})
    outputs = (output for cell in ran.cells for output in cell.get("outputs", []) if output.output_type == "stream")
    return "".join(output.text for output in outputs)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """A Llama as wide as a third of SmolLM2-135M, 192, with three heads of queries to each of keys; its weights are random.

    64 divides the inputs of all its linears, and 128 does not. It reads the course model's tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, course = tmp_path_factory.mktemp("models") / "narrow", models.course_model_dir()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
        pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in course.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def articles(tmp_path_factory):
    """A directory with a text of its own: some topics of the language reference, in the two splits."""
    folder = tmp_path_factory.mktemp("texts") / "articles"
    for split in text.SPLITS:
        (folder / split).mkdir(parents=True)
        for document in text.documents("prose", split):
            (folder / split / f"{document.name.partition(':')[2]}.txt").write_text(document.text, "utf-8")
    return folder


@pytest.mark.parametrize("number", ["08", "10"])
def test_a_model_that_128_does_not_divide(number, narrow, articles):
    said = printed(number, {"LABS_MODEL": str(narrow), "LABS_TEXT": str(articles)})
    assert "21 linear layers" in said
    if number == "08":
        assert "The stored rows of 'awq' are of the course-model on code/heldout; what is measured live is of narrow." in said
        assert "groups of narrow that lie to one side of 0" in said


@pytest.fixture(scope="module")
def real():
    """LABS_ variables for SmolLM2 and Wikipedia: from the user's own cache, or fetched into that of this run."""
    from labsupport.model import fetch, fetched
    from labsupport.model.download import FetchError

    own = os.environ.pop(files.CACHE, None)
    try:
        there = [fetched.place(name) for name in (fetched.SMOLLM2, fetched.WIKI)]
    finally:
        if own is not None:
            os.environ[files.CACHE] = own
    if not all(place.is_dir() for place in there):
        try:
            there = [fetch.fetch(name) for name in (fetched.SMOLLM2, fetched.WIKI)]
        except FetchError as error:
            pytest.skip(f"neither fetched nor to be had: {error}")
    return dict(zip(("LABS_MODEL", "LABS_TEXT"), map(str, there), strict=True))


@pytest.mark.parametrize("number", ON_SMOLLM2)
def test_smollm2_and_wikipedia(number, real):
    said = printed(number, real)
    assert "210 linear layers" in said
    assert "what is measured live is of smollm2" in said
