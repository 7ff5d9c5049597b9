"""What labs quantize holds on to does not grow with the number of blocks: live tensors are counted, so that it costs seconds.

`python tests/checkpoint_memory.py` measures the same on a process of real size.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from test_checkpoint import WORDS, make, run

from labsupport.checkpoint.skeleton import Skeleton
from labsupport.model import text

pytestmark = pytest.mark.slow

BLOCKS = 4
SLACK = 400  # bytes: counters and ids. The norms of one block are 512, its smallest matrix packed to 4 bits is 1024


@pytest.fixture(autouse=True)
def nothing_older() -> Iterator[None]:
    """What was there before a test is not looked at: libraries hold a million objects, which would be gone through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def alive() -> int:
    """Bytes of all tensors made since the test began that Python can reach, each memory once."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            memory = thing.untyped_storage()
            found[memory.data_ptr()] = memory.nbytes()
    return sum(found.values())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "deep", num_hidden_layers=BLOCKS)


@pytest.mark.parametrize("method", ["gptq", "awq", "rtn", "nf4"])
def test_what_is_kept_does_not_grow_with_the_blocks(source, tmp_path, monkeypatch, method):
    words = tmp_path / "words.txt"
    words.write_text(WORDS)
    monkeypatch.setattr(text, "documents", lambda domain="code", split="heldout": [text.Document("words", WORDS)])
    seen, real = [], Skeleton.block

    def counted(self, index):
        seen.append((index, alive()))
        return real(self, index)

    monkeypatch.setattr(Skeleton, "block", counted)
    run(source, tmp_path / "out", method, words, windows=2)
    # Passes: the comparison, quantizing, perplexity before and after. What the first block leaves may stay until the next.
    assert [index for index, _ in seen] == [*range(BLOCKS)] * 4
    for (before, first), (index, then) in pairwise(seen):
        assert index == 0 or before == 0 or then <= first + SLACK, seen
