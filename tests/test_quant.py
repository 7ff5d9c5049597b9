"""Grids, packing and round-to-nearest, held to PyTorch's own quantizers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labsupport.quant import gptq, grid, rtn

ALL_BITS = range(2, 9)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), count=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_packing_is_a_stream_of_bits_lowest_first(bits, count, seed):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = grid.pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(count * bits / 8)
    assert torch.equal(grid.unpack_bits(packed, bits, count).long(), codes)
    # An independent reading of the same stream, as one large integer.
    number = int.from_bytes(bytes(packed.tolist()), "little")
    assert [(number >> (bits * i)) & (2**bits - 1) for i in range(count)] == codes.tolist()


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("group_size", [16, 32, 96, None])
@pytest.mark.parametrize("symmetric", [False, True])
def test_values_equal_torch_fake_quantize_exactly(bits, group_size, symmetric):
    torch.manual_seed(bits)
    weight = torch.randn(40, 96) * torch.logspace(-4, 2, 40)[:, None]
    q = rtn.quantize(weight, bits, group_size, symmetric, scale_dtype=torch.float32)
    groups = weight.reshape(-1, group_size or 96)
    scale, zero_point = q.scale.flatten(), q.zero_point.flatten().int()
    fake = torch.fake_quantize_per_channel_affine(groups, scale, zero_point, 0, 0, 2**bits - 1)
    assert torch.equal(q.dequantize(), fake.view_as(weight))


def test_codes_equal_torch_quantize_per_channel_but_at_ties():
    torch.manual_seed(0)
    weight = torch.randn(256, 512)
    q = rtn.quantize(weight, 8, None, scale_dtype=torch.float32)
    theirs = torch.quantize_per_channel(weight, q.scale[:, 0].double(), q.zero_point[:, 0].long(), 0, torch.quint8).int_repr()
    differ = theirs != q.codes
    # They add the zero-point before rounding: the sum has a magnitude of up to 2**8 and so is rounded to 2**-16, and a tie moves.
    steps = weight * (1 / q.scale)
    from_tie = ((steps - steps.floor()) - 0.5).abs()
    assert (from_tie[differ] <= 2**-15).all()
    assert (theirs.int() - q.codes.int()).abs().max() <= 1


def test_ties_go_to_the_even_neighbor_before_the_zero_point_is_added():
    weight = (torch.arange(-6, 6) + 0.5)[None] * 0.25
    codes = grid.quantize(weight, torch.tensor([[0.25]]), torch.tensor([[7.0]]), 4)
    assert codes.tolist() == [[1, 3, 3, 5, 5, 7, 7, 9, 9, 11, 11, 13]]


@settings(max_examples=80, deadline=None)
@given(
    bits=st.integers(2, 8), rows=st.integers(1, 9), groups=st.integers(1, 4), size=st.sampled_from([1, 3, 8, 20]),
    symmetric=st.booleans(), shift=st.sampled_from([-50.0, 0.0, 4.0]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_no_weight_moves_further_than_half_a_step(bits, rows, groups, size, symmetric, shift, seed):
    weight = torch.randn(rows, groups * size, generator=torch.Generator().manual_seed(seed)) + shift
    q = rtn.quantize(weight, bits, size, symmetric, scale_dtype=torch.float32)
    error = (q.dequantize() - weight).abs().view(rows, groups, size)
    # Half a step, and what float32 adds to a product and a division of this size.
    assert (error <= q.scale[..., None] / 2 + 4 * 2**-23 * weight.abs().view(rows, groups, size)).all()


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, None])
def test_bytes_are_those_of_the_stored_tensors(bits, symmetric, group_size):
    weight = torch.randn(24, 96)
    q = rtn.quantize(weight, bits, group_size, symmetric)
    groups = weight.numel() // (group_size or 96)
    expected = weight.numel() * bits / 8 + 2 * groups + (0 if symmetric else math.ceil(groups * bits / 8))
    stored = [q.packed_codes, q.scale] + ([] if symmetric else [q.packed_zero_points])
    assert q.nbytes == expected == sum(len(t.contiguous().numpy().tobytes()) for t in stored)
    assert q.bits_per_weight == 8 * expected / weight.numel()


def test_rows_in_blocks_give_the_same_as_rows_at_once(monkeypatch):
    weight = torch.randn(50, 24)
    whole = rtn.quantize(weight, 3, 8)
    monkeypatch.setattr(rtn, "BLOCK_BYTES", 8 * 24 * 4)
    assert torch.equal(rtn.quantize(weight, 3, 8).packed_codes, whole.packed_codes)


def test_input_is_not_changed_and_half_precision_is_read():
    weight = torch.randn(8, 32)
    before = weight.clone()
    rtn.quantize(weight, 4, 16)
    assert torch.equal(weight, before)
    half = weight.half()
    assert torch.equal(rtn.quantize(half, 4, 16).packed_codes, rtn.quantize(half.float(), 4, 16).packed_codes)


def test_codes_belong_to_the_scale_that_is_stored():
    """The scale is rounded to float16 first; choosing the codes on the unrounded one would be up to half a step worse at 8 bits."""
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    q = rtn.quantize(weight, 8, None)
    scale, zero = q.scale.float(), q.zero_point
    assert q.scale.dtype == torch.float16
    assert torch.equal(q.codes.float(), grid.quantize(weight, scale, zero, 8))


@pytest.mark.parametrize(
    ("weight", "wanted"),
    [
        (torch.zeros(2, 8), torch.zeros(2, 8)),
        (torch.full((2, 8), 3.0), torch.full((2, 8), 3.0)),
    ],
    ids=["zeros", "constant"],
)
def test_rows_without_range(weight, wanted):
    for symmetric in (False, True):
        got = rtn.quantize(weight, 4, None, symmetric).dequantize()
        # The scale, 3/15 or 6/15, is rounded to float16: relative 2**-11; the symmetric grid ends half a step before the value.
        allowed = 3 * 2**-11 + (0.2 if symmetric else 0)
        assert (got - wanted).abs().max() <= allowed


def test_a_scale_that_float16_cannot_hold_is_refused_on_either_side():
    """One group of many is enough: its weights would all become 0, or infinity."""
    for value, message in ((1e-7, "a scale of .* is less than torch.float16 holds"), (1e7, "is more than torch.float16 holds")):
        weight = torch.randn(4, 32)
        weight[2, 8:16] = value
        for symmetric in (False, True):
            with pytest.raises(ValueError, match=message):
                rtn.quantize(weight, 4, 8, symmetric)
            with pytest.raises(ValueError, match=message):
                gptq.quantize(weight, torch.eye(32), 4, 8, symmetric)
            wide = rtn.quantize(weight, 4, 8, symmetric, scale_dtype=torch.float32).dequantize()
            assert (wide[2, 8:16] - value).abs().max() <= 0.2 * value
    assert torch.equal(rtn.quantize(torch.zeros(2, 8), 4, 8).scale, torch.ones(2, 1).half())


def test_what_compensation_leaves_in_a_group_of_zeros_is_no_weight():
    """GPTQ moves later columns by what earlier ones lost: in a group of zeros that hardly share inputs, by next to nothing."""
    weight = torch.randn(4, 32)
    weight[:, 16:] = 0
    hessian = torch.eye(32)
    hessian[0, 20] = hessian[20, 0] = 1e-9
    assert gptq.quantize(weight, hessian, 4, 8).dequantize()[:, 16:].abs().max() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weight_that_is_not_finite(value, symmetric):
    weight = torch.randn(40, 16)
    weight[37, 3] = value
    with pytest.raises(ValueError, match=f"weight holds {'NaN' if math.isnan(value) else 'infinity'}: 1 of 640 values"):
        rtn.quantize(weight, 4, 8, symmetric)


@pytest.mark.parametrize(
    ("weight", "arguments", "error", "message"),
    [
        (torch.randn(0, 8), {}, ValueError, r"shape \[0, 8\]"),
        (torch.randn(8, 0), {}, ValueError, r"shape \[8, 0\]"),
        (torch.randn(8), {}, ValueError, r"shape \[8\]"),
        (torch.randn(2, 3, 4), {}, ValueError, r"shape \[2, 3, 4\]"),
        (torch.ones(4, 8, dtype=torch.int32), {}, TypeError, "weight is torch.int32"),
        ([[1.0]], {}, TypeError, "weight is list"),
        (torch.randn(4, 96), {"group_size": 64}, ValueError, "group_size 64 does not divide in_features 96"),
        (torch.randn(4, 96), {"group_size": 0}, ValueError, "group_size is 0"),
        (torch.randn(4, 96), {"group_size": -1}, ValueError, "group_size is -1"),
        (torch.randn(4, 96), {"group_size": 32.0}, ValueError, "group_size is 32.0"),
        (torch.randn(4, 96), {"bits": 1}, ValueError, "bits is 1, wanted a whole number from 2 to 8"),
        (torch.randn(4, 96), {"bits": 9}, ValueError, "bits is 9"),
        (torch.randn(4, 96), {"bits": 4.0}, ValueError, "bits is 4.0"),
        (torch.randn(4, 96) * 1e9, {"group_size": None}, ValueError, "is more than torch.float16 holds"),
    ],
)
def test_bad_input_names_the_argument(weight, arguments, error, message):
    with pytest.raises(error, match=message):
        rtn.quantize(weight, **({"group_size": None} | arguments))


def test_sqnr_and_best_clip():
    weight = torch.tensor([[3.0, 4.0]])
    assert grid.sqnr_db(weight, weight + torch.tensor([[0.3, 0.4]])) == pytest.approx(20, abs=1e-5)
    assert grid.sqnr_db(weight, weight) == math.inf
    torch.manual_seed(0)
    rows = torch.randn(5, 64)
    factors = torch.linspace(0.5, 1, 11)
    chosen = grid.best_clip(rows, 3, factors)
    for row, factor in zip(rows, chosen[:, 0], strict=True):
        errors = []
        for f in factors:
            s = (f * 2 * row.abs().max() / 7).item()
            errors.append(sum((min(max(round(w / s), -4), 3) * s - w) ** 2 for w in row.tolist()))
        assert errors[int((factors == factor).nonzero())] <= min(errors) * (1 + 1e-5)
