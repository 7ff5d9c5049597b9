"""Weights that lie on a 4-bit lattice are noticed, and no others."""

from __future__ import annotations

import pytest
import torch

from labsupport.model import opened
from labsupport.quant import int8, lattice, nf4, rtn
from labsupport.quant.lattice import Lattice

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def weight() -> torch.Tensor:
    return 0.05 * torch.randn(24, 768, generator=torch.Generator().manual_seed(0))


def with_float_minimum(weight: torch.Tensor, size: int) -> torch.Tensor:
    """As GGUF's Q4_1: 16 values from the lowest to the highest of each group; scale and minimum are float16."""
    groups = weight.view(-1, size)
    low = groups.amin(1, keepdim=True).half().float()
    step = ((groups.amax(1, keepdim=True) - low) / 15).half().float()
    return (step * ((groups - low) / step).round().clamp(0, 15) + low).view_as(weight)


def with_zero_in_the_middle(weight: torch.Tensor, size: int) -> torch.Tensor:
    """As GGUF's Q4_0: the value furthest from 0 gets the code -8, and 0 the code 0."""
    groups = weight.view(-1, size)
    furthest = groups.gather(1, groups.abs().argmax(1, keepdim=True))
    step = (furthest / -8).half().float()
    return (step * (groups / step).round().clamp(-8, 7)).view_as(weight)


@pytest.mark.parametrize("size", lattice.SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dequantized_weight_is_noticed(weight, size, dtype):
    assert lattice.find(with_float_minimum(weight, size).to(dtype)) == Lattice(size, has_zero=False)
    assert lattice.find(with_zero_in_the_middle(weight, size).to(dtype)) == Lattice(size, has_zero=True)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_our_own_rounding_leaves_has_its_zero(weight, symmetric):
    rounded = rtn.quantize(weight, bits=4, group_size=64, symmetric=symmetric).dequantize()
    assert lattice.find(rounded) == Lattice(64, has_zero=True)


def test_a_file_may_hold_in_float32_what_was_rounded_to_bfloat16(weight):
    assert lattice.find(with_float_minimum(weight, 32).bfloat16().float()) == Lattice(32, has_zero=False)


def test_the_largest_group_that_divides_the_width_is_named(weight):
    dequantized = with_float_minimum(weight[:, :128].contiguous(), 128)
    assert lattice.find(dequantized) == Lattice(128, has_zero=False)
    assert lattice.find(dequantized[:, :96]) == Lattice(32, has_zero=False)  # 128 and 64 do not divide 96; parts lie there, too
    assert lattice.find(dequantized[:, :80]) is None


def test_rows_of_zeros_between_do_not_hide_it(weight):
    dequantized = with_float_minimum(weight, 32)
    dequantized[::3] = 0
    assert lattice.find(dequantized) == Lattice(32, has_zero=False)
    dequantized[:-4] = 0
    assert lattice.find(dequantized) is None  # too few groups that show anything


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_that_is_off_is_enough(weight, dtype):
    dequantized = with_float_minimum(weight, 32).to(dtype)
    group = dequantized[5, 32:64].float()
    step, inside = (group.max() - group.min()) / 15, int(group.argsort()[16])
    dequantized[5, 32 + inside] = (group[inside] + 0.4 * step).to(dtype)
    assert lattice.find(dequantized) is None


def spread(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return rtn.quantize(weight, bits=bits, group_size=32).dequantize()


def uneven_levels(weight: torch.Tensor) -> torch.Tensor:
    """16 values in each row, anywhere from 0.3 to 1: fewer of bfloat16's units apart than would show whether they are even."""
    generator = torch.Generator().manual_seed(2)
    levels = 0.3 + 0.7 * torch.rand(len(weight), 16, generator=generator)
    return levels.gather(1, torch.randint(16, weight.shape, generator=generator))


OTHERS = {
    "random": lambda weight: weight,
    "uniform": lambda weight: torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) - 0.5,
    "heavy tails": lambda weight: weight**3,
    "near 1": lambda weight: 1 + weight,
    "just above 1": lambda weight: 1 + 0.1 * torch.rand(weight.shape),  # 14 values in bfloat16, evenly spaced: its own grid
    "uneven levels": uneven_levels,
    "near a lattice": lambda weight: with_float_minimum(weight, 32) * (1 + 0.004 * torch.sign(weight.roll(1))),
    "one large value": lambda weight: torch.cat([100 + weight[:, ::32, None], weight.view(24, -1, 32)[:, :, 1:]], 2).view(24, -1),
    "constant": lambda weight: torch.full_like(weight, 0.3),
    "zero": torch.zeros_like,
    "constant groups": lambda weight: weight[:, ::32].repeat_interleave(32, dim=1),
    "binary": torch.sign,
    "ternary": lambda weight: 0.013 * torch.sign(weight) * (weight.abs() > 0.03),
    "2 bits": lambda weight: spread(weight, 2),
    "3 bits": lambda weight: spread(weight, 3),
    "5 bits": lambda weight: spread(weight, 5),
    "8 bits": lambda weight: spread(weight, 8),
    "int8": lambda weight: int8.quantize(weight).dequantize(),
    "nf4": lambda weight: nf4.quantize(weight, block_size=64).dequantize(),
    "sparse": lambda weight: weight * (weight > 0.08),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_other_weight_is_taken_for_one(weight, kind, dtype):
    other = OTHERS[kind](weight).to(dtype)
    assert other.shape == weight.shape
    assert lattice.find(other) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_course_model_is_not_taken_for_one(course, dtype):
    for name, linear in opened.linears(course[0]).items():
        assert lattice.find(linear.weight[:16].to(dtype)) is None, name


def test_bad_input(weight):
    with pytest.raises(ValueError, match="weight holds NaN"):
        lattice.find(weight * torch.nan)
    with pytest.raises(TypeError, match=r"weight is torch\.int64"):
        lattice.find(weight.long())
