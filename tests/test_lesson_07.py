"""data/golden/autogptq.safetensors, which notebook 07 reads, is what the golden file of the real library holds."""

from __future__ import annotations

import json

import torch
from interop import lesson_07 as lesson
from safetensors import safe_open


def test_the_lesson_shows_what_the_golden_file_holds():
    wanted, about = lesson.excerpt()
    with safe_open(lesson.PATH, "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        said = file.metadata()
    assert found.keys() == wanted.keys()
    assert {"weight", "inputs"} < found.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
        assert found[key].dtype == tensor.dtype, key
    assert json.loads(said["settings"]) == about["settings"]
    assert len(about["settings"]) == 12
    assert said["versions"] == about["versions"]
    assert said["command"] == lesson.COMMAND


def test_the_lesson_is_small():
    assert lesson.PATH.stat().st_size <= 200_000
