"""The notebooks on a model that is not the course's: LABS_MODEL and LABS_TEXT name it and its text, LABS_QUICK keeps it short.

What is computed there is not compared with anything; that every cell comes to its end is what is tested. A group size of 128 that
does not divide, a layer of a certain name, or a text that is taken for granted would stop one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import other_models
import pytest
from nbformat import NotebookNode

from labsupport.course import build, execute
from labsupport.model import files, quick

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
def articles(tmp_path_factory):
    return other_models.write_articles(tmp_path_factory.mktemp("texts") / "articles")


# The notebooks that look into a block, each on another architecture. `make models` runs all ten on all four.
LOOKS_INSIDE = [
    ("opt-576", "09", ["3 layers,", "There are no keys before RoPE to look at: found no rotary embedding in a OPTForCausalLM"]),
    (
        "qwen3-960",
        "08",
        ["21 linear layers", "v_proj gives 128 channels, o_proj reads 384", "groups of narrow that lie to one side"],
    ),
    ("llama-960", "10", ["21 linear layers", "bitsandbytes max difference of logits"]),
]


@pytest.mark.parametrize(("name", "number", "wanted"), LOOKS_INSIDE, ids=[row[0] for row in LOOKS_INSIDE])
def test_a_model_as_the_hub_has_them(name, number, wanted, articles, tmp_path):
    """Narrow ones, random weights: every cell comes to its end. 64 divides the inputs of their linears, and 128 does not."""
    model = other_models.write(name, tmp_path / "narrow", narrow=True)
    said = printed(number, {"LABS_MODEL": str(model), "LABS_TEXT": str(articles)})
    for words in wanted:
        assert words in said
    if number == "08":
        assert "The stored rows of 'awq' are of the course-model on code/heldout; what is measured live is of narrow." in said


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
