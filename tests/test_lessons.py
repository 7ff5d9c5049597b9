"""What notebooks carry of the golden files is what those hold, and a lesson's plain method gives labsupport's codes."""

import torch
from interop import golden, lessons
from safetensors.torch import load_file

from labsupport.exercises import gptq as exercises
from labsupport.quant import gptq, grid


def test_copies_are_the_originals():
    kept, wanted = load_file(lessons.GPTQ), lessons.gptq_tensors()
    assert kept.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert kept[name].dtype == tensor.dtype
        assert torch.equal(kept[name], tensor), name
    assert golden.about(lessons.GPTQ) == lessons.gptq_about()


def test_copies_are_small():
    assert lessons.GPTQ.stat().st_size < 200e3


def test_the_loop_of_exercise_6_5_gives_labsupports_codes():
    for seed in range(20):
        given = exercises.loop_inputs(seed)
        fast = gptq.quantize(given["weight"], given["hessian"], 3, None, damping=0.0, scale_dtype=torch.float32)
        assert torch.equal(exercises.gptq_loop(**given), fast.codes.float())


def test_the_loop_of_exercise_6_5_takes_the_grid_that_it_is_given():
    given = exercises.loop_inputs(0)
    scale = grid.symmetric_scale(given["weight"], 3)
    codes = exercises.gptq_loop(given["weight"], given["hessian"], scale, torch.full_like(scale, 4), 3)
    fast = gptq.quantize(given["weight"], given["hessian"], 3, None, symmetric=True, damping=0.0, scale_dtype=torch.float32)
    assert torch.equal(codes, fast.codes.float())
