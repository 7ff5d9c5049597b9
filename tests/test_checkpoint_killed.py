"""labs quantize killed at random moments: what is there afterwards is whole or not there, and the next run ends the same."""

from __future__ import annotations

import json
import multiprocessing
import random
import sys
import time
from pathlib import Path

import pytest
from test_checkpoint import GROUP, TEXTS, WORDS, make

from labsupport import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")]
KILLS = 10


def work(source: str, out: str, method: str, words: str) -> None:
    import torch

    torch.set_num_threads(1)
    checkpoint.quantize(source, out, method, calibration=words, group_size=GROUP, **TEXTS)


def whole(directory: Path) -> dict[str, bytes]:
    """What a directory holds, dates aside; that it can be read is tested on the way."""
    checkpoint.load(directory)
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.name not in ("README.md", "quantization_report.json")
    }


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_killed_at_random_moments(tmp_path, method):
    source = make(tmp_path / "source", num_hidden_layers=4)
    (tmp_path / "words.txt").write_text(WORDS)
    # A process that has all libraries loaded, and no threads, makes the ones that are killed.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["labsupport.checkpoint", "transformers.models.llama.modeling_llama", "test_checkpoint_killed"])

    def start(out: Path) -> multiprocessing.Process:
        process = context.Process(target=work, args=(str(source), str(out), method, str(tmp_path / "words.txt")))
        process.start()
        return process

    process = start(tmp_path / "first")
    process.join()
    before = time.monotonic()
    process = start(tmp_path / "undisturbed")
    process.join()
    assert process.exitcode == 0
    seconds, wanted = time.monotonic() - before, whole(tmp_path / "undisturbed")

    out, dice, stages = tmp_path / "out", random.Random(method), []
    partial = tmp_path / "out.partial"
    for number in range(KILLS):
        process = start(out)
        if number % 2:  # at any time; the others while blocks are at work, which on a busy machine may be a short while of it
            time.sleep(dice.uniform(0.1, 1) * seconds)
        else:
            wanted_blocks = dice.randint(1, 3)
            while process.is_alive() and len(list(partial.glob("run/block-*.json"))) < wanted_blocks:
                time.sleep(1e-3)
            time.sleep(dice.uniform(0, 0.05) * seconds)
        process.kill()  # SIGKILL
        process.join()
        if out.exists():  # it was quicker: whole, and the next one starts anew
            assert whole(out) == wanted
            out.rename(tmp_path / f"done-{number}")
        stages.append(len(list(partial.glob("run/block-*.json"))))
        for path in partial.glob("run/block-*.json"):
            json.loads(path.read_text())
    assert max(stages) > 0, "every kill came before the first block was done: nothing was tried"
    process = start(out)
    process.join()
    assert process.exitcode == 0
    assert whole(out) == wanted
    assert not partial.exists()
