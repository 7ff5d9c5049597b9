"""The file that notebook 08 compares with is the golden file of AutoAWQ, no more and no less than the part it names."""

from __future__ import annotations

import json

import torch
from interop import golden, lesson_awq, tiny
from safetensors import safe_open
from safetensors.torch import load_file


def test_is_what_the_golden_file_holds():
    tensors, about = lesson_awq.contents()
    stored = load_file(lesson_awq.PATH)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype, name
        assert torch.equal(stored[name], tensor), name
    with safe_open(lesson_awq.PATH, "pt") as file:
        said = file.metadata()
    assert said == {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}


def test_is_small_and_made_with_the_repaired_search():
    assert lesson_awq.PATH.stat().st_size <= 200 * 1024
    assert [name for name, run in lesson_awq.RUNS.items() if not run.patched] == ["stock"]
    stored = load_file(lesson_awq.PATH)
    assert stored["stock/logits_change"] > 0.01 > 1e-5 > stored["scaled/logits_change"]


def test_weights_are_those_of_the_tiny_model():
    kept = golden.read_awq()[lesson_awq.MODEL]
    floats = tiny.floats(kept.weights)
    stored = load_file(lesson_awq.PATH)
    for name, weight in floats.items():
        raw = stored[f"weights/{name}"]
        assert torch.equal(raw.float() * tiny.STEP if raw.dtype == torch.int8 else raw, weight), name
