"""What chapter 12 asks for is what labsupport stores and does: bytes of a packed base, weights that a merge moves, the picture."""

from __future__ import annotations

import torch

from labsupport.evidence.planner import LLAMA_7B
from labsupport.evidence.training_memory import Step, count
from labsupport.exercises.finetune_merge_requantize import fates, moves, moves_inputs, qlora_bytes, survivor_inputs
from labsupport.figures import merging
from labsupport.quant import nf4, old_grid


def test_the_bytes_asked_for_are_those_of_tensors_and_of_the_count():
    shapes = [(48, 80), (33, 71), (300, 331)]
    weights = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes]
    assert qlora_bytes(shapes, 4)[0] == sum(nf4.quantize(weight, double_quant=True).nbytes for weight in weights)
    linears = list(LLAMA_7B.block_linears.values()) * LLAMA_7B.layers
    parts = count(LLAMA_7B, Step("qlora", rank=16))
    base = sum(
        part.nbytes for part in parts if part.kind == "weights" and any(name in part.name for name in ("codes", "magni", "theirs"))
    )
    learned = sum(part.nbytes for part in parts if part.kind in ("gradients", "states") or part.name.startswith(("A of", "B of")))
    steps = sum(part.nbytes for part in parts if part.name == "counts of steps")
    assert qlora_bytes(linears, 16) == (base, learned - steps)


def test_what_moves_is_what_rounding_to_the_old_grid_moves():
    for seed in range(5):
        given = moves_inputs(seed)
        codes, absmax, levels, update = given.values()
        packed = nf4.pack_nibbles(codes.flatten())
        stored = nf4.BlockTensor(packed, absmax.flatten(), tuple(levels.tolist()), "nf4", 5, tuple(codes.shape))
        before = stored.dequantize()
        # The nearest levels lie 0.08 of a magnitude above 0.2 apart; float rounding is far smaller.
        moved = (old_grid.values(before + update, stored) - before).abs() > 1e-3
        assert torch.equal(moves(**given)[1], moved)
        assert 0.2 < moved.float().mean() < 0.8


def test_an_update_below_half_a_step_is_lost_on_one_base_and_kept_on_the_other():
    given = survivor_inputs(0)
    scale = given["scale"].expand_as(given["weight"])
    for share in (0.1, 0.4):
        moved, left = fates(**given, update=share * scale)
        # Each of 7,680 weights jumps by a step with probability `share`: six deviations, and 0.02 for weights that are clipped.
        assert moved == 0
        assert abs(left - 1) < 6 * (share * (1 - share) / scale.numel()) ** 0.5 / share + 0.02
    assert fates(**given, update=0.6 * scale)[0] > 0.9 * scale.numel()


def test_the_picture_counts_those_beyond_a_middle():
    after = torch.tensor([0.0, 0.49, 0.51, -0.6])
    assert "50 % pass a middle" in merging.places({"one": (0 * after, after)}, "A linear").alt
    assert "100 % stand on a level" in merging.places({"one": (0 * after, after)}, "A linear").alt
