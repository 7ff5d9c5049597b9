"""What the notebooks show of the golden files is what those hold, and a lesson's plain method gives labsupport's codes."""

import json

import pytest
import torch
from interop import golden, lessons, tiny
from safetensors import safe_open
from safetensors.torch import load_file

from labsupport.exercises import gptq as exercises
from labsupport.exercises import packing_and_checkpoints as files
from labsupport.exercises.form import generator
from labsupport.quant import gptq, grid


@pytest.mark.parametrize("name", lessons.FILES)
def test_copies_are_the_originals(name):
    wanted, about = lessons.FILES[name]()
    kept = load_file(lessons.path(name))
    assert kept.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert kept[key].dtype == tensor.dtype, key
        assert torch.equal(kept[key], tensor), key
    with safe_open(lessons.path(name), "pt") as file:
        said = file.metadata()
    assert said == {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}


@pytest.mark.parametrize("name", lessons.FILES)
def test_copies_are_small(name):
    assert lessons.path(name).stat().st_size <= 200 * 1024


def test_all_copies_are_tested():
    # torchao's is made by interop/run_torchao.py and tested by test_qat.py.
    assert {path.stem for path in lessons.path("any").parent.iterdir()} == {*lessons.FILES, "torchao"}


def test_autoawqs_copy_was_made_with_the_repaired_search():
    assert [name for name, run in lessons.AWQ_RUNS.items() if not run.patched] == ["stock"]
    stored = load_file(lessons.path("autoawq"))
    assert stored["stock/logits_change"] > 0.01 > 1e-5 > stored["scaled/logits_change"]


def test_autoawqs_copy_holds_the_weights_of_the_tiny_model():
    floats = tiny.floats(golden.read_awq()[lessons.AWQ_MODEL].weights)
    stored = load_file(lessons.path("autoawq"))
    for name, weight in floats.items():
        raw = stored[f"weights/{name}"]
        assert torch.equal(raw.float() * tiny.STEP if raw.dtype == torch.int8 else raw, weight), name


@pytest.mark.slow
def test_the_loop_of_exercise_6_5_gives_labsupports_codes():
    for seed in range(20):
        given = exercises.loop_inputs(seed)
        fast = gptq.quantize(given["weight"], given["hessian"], 3, None, damping=0.0, scale_dtype=torch.float32)
        assert torch.equal(exercises.gptq_loop(**given), fast.codes.float())
    g = generator(0)  # the notebook has more columns than the exercise
    weight, inputs = torch.randn(12, 48, generator=g), torch.randn(400, 48, generator=g)
    hessian = inputs.T @ inputs / 200
    scale, zero_point = grid.scale_and_zero_point(weight, 3)
    fast = gptq.quantize(weight, hessian, 3, None, damping=0.0, scale_dtype=torch.float32)
    assert torch.equal(exercises.gptq_loop(weight, hessian, scale, zero_point, 3), fast.codes.float())


def test_the_loop_of_exercise_6_5_takes_the_grid_that_it_is_given():
    given = exercises.loop_inputs(0)
    scale = grid.symmetric_scale(given["weight"], 3)
    codes = exercises.gptq_loop(given["weight"], given["hessian"], scale, torch.full_like(scale, 4), 3)
    fast = gptq.quantize(given["weight"], given["hessian"], 3, None, symmetric=True, damping=0.0, scale_dtype=torch.float32)
    assert torch.equal(codes, fast.codes.float())


@pytest.mark.parametrize("fault", files.FAULTS)
@pytest.mark.slow
def test_the_diagnosis_of_exercise_10_7_is_what_was_done_to_the_file(fault):
    for seed in range(100):
        assert files.diagnose(**files._sick(generator(seed), fault)) == fault
