"""Stored layouts: the bytes of AutoGPTQ and AutoAWQ, by golden files; the way back; what cannot be stored or read."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interop import environment, golden, pack

from labsupport import install
from labsupport.quant import gptq, grid, packing, rtn

BITS = st.sampled_from([2, 3, 4, 8])


def random_tensor(rows, groups, size, bits, seed, symmetric=False, order=False):
    generator = torch.Generator().manual_seed(seed)
    columns = groups * size
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator)
    zeros = torch.randint(0, 2**bits, (rows, groups), generator=generator)
    return gptq.GPTQTensor(
        packed_codes=grid.pack_bits(codes, bits),
        scale=torch.rand(rows, groups, generator=generator).half() + 0.01,
        packed_zero_points=None if symmetric else grid.pack_bits(zeros, bits),
        bits=bits,
        group_size=size,
        shape=(rows, columns),
        g_idx=(torch.randperm(columns, generator=generator) // size).to(torch.int32) if order else None,
        damping=0.0,
    )


def assert_same(one, other):
    assert (one.bits, one.group_size, one.shape) == (other.bits, other.group_size, other.shape)
    for part in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(one, part), getattr(other, part)), part
    assert torch.equal(packing.groups_of(one), packing.groups_of(other))
    assert torch.equal(one.dequantize(), other.dequantize())


@pytest.mark.parametrize("case", pack.KEPT, ids=lambda case: case.name)
def test_packed_tensors_are_the_bytes_of_the_peers(case):
    theirs, mine = pack.read()[case], pack.ours(case)
    if not case.zero:
        assert pack.differences(mine, theirs) == ""
        read = packing.read_awq(theirs) if case.peer == "autoawq" else packing.read_gptq(theirs, case.bits)
        if case.peer == "autogptq":
            assert_same(read, pack.tensor(case))
        assert torch.equal(read.dequantize(), pack.tensor(case).dequantize())
        assert (read.packed_zero_points is None) == case.symmetric
        return
    # AutoGPTQ turns a zero-point of 0 into -1 and does not cut it: the word is ones from there up, and the neighbors are lost.
    assert pack.differences(mine, theirs).endswith("values of qzeros")
    zeros = pack.tensor(case).zero_point.to(torch.uint8)
    assert torch.equal(packing.unpack_gptq_zeros(mine["qzeros"], case.bits), zeros)
    lost = (zeros == 0).view(-1, 8, zeros.shape[1]).cumsum(1).view_as(zeros) > 0
    assert torch.equal(packing.unpack_gptq_zeros(theirs["qzeros"], case.bits), zeros.masked_fill(lost, 0))


def test_the_golden_file_says_where_it_is_from_and_holds_every_layout():
    said = golden.about(pack.PATH)
    assert said["command"] == golden.COMMAND
    pins = environment.LEGACY.pins.read_text()
    assert all(install.pinned(pins, name) == version for name, version in json.loads(said["versions"]).items() if name != "python")
    kept = {(case.peer, case.bits, case.symmetric, case.order) for case in pack.read()}
    assert {(bits, order) for peer, bits, _, order in kept if peer == "autogptq"} == {
        (bits, order) for bits in (2, 3, 4, 8) for order in (False, True)
    }
    assert {(bits, symmetric) for peer, bits, symmetric, _ in kept if peer == "autogptq"} == {
        (bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)
    }
    assert {symmetric for peer, _, symmetric, _ in kept if peer == "autoawq"} == {False, True}


def test_what_autoawq_makes_of_whole_models_reads_and_packs_the_same():
    count = 0
    for model in golden.read_awq().values():
        for found in model.results.values():
            for key in (key for key in found.tensors if key.endswith("/qweight")):
                name = key.removesuffix("/qweight")
                theirs = {part: found.tensors[f"{name}/{part}"] for part in ("qweight", "qzeros", "scales")}
                read = packing.read_awq(theirs)
                assert torch.equal(read.codes.int(), golden.unpack_awq(theirs["qweight"]))
                assert pack.differences(packing.write_awq(read), theirs) == ""
                count += 1
    assert count == 21


@settings(max_examples=60, deadline=None)
@given(
    bits=BITS, rows=st.integers(1, 5), groups=st.integers(1, 4), size=st.sampled_from([8, 32, 96]), version=st.integers(1, 2),
    symmetric=st.booleans(), order=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
@pytest.mark.slow
def test_gptq_there_and_back(bits, rows, groups, size, version, symmetric, order, seed):
    tensor = random_tensor(32 * rows, 4 * groups, size, bits, seed, symmetric, order)
    state = packing.write_gptq(tensor, version)
    assert_same(packing.read_gptq(state, bits, version), tensor)
    assert state["qweight"].shape == (tensor.shape[1] // 32 * bits, tensor.shape[0])
    assert state["qzeros"].shape == (4 * groups, tensor.shape[0] // 32 * bits)
    assert state["scales"].shape == (4 * groups, tensor.shape[0])
    assert all(value.is_contiguous() for value in state.values())
    assert pack.differences(packing.write_gptq(packing.read_gptq(state, bits, version), version), state) == ""


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 5), size=st.sampled_from([1, 16, 40]), seed=st.integers(0, 2**31))
@pytest.mark.slow
def test_awq_there_and_back(rows, groups, size, seed):
    tensor = random_tensor(8 * rows, groups, size, 4, seed)
    state = packing.write_awq(tensor)
    assert torch.equal(packing.read_awq(state).dequantize(), tensor.dequantize())
    assert pack.differences(packing.write_awq(packing.read_awq(state)), state) == ""


@settings(max_examples=40, deadline=None)
@given(bits=BITS, seed=st.integers(0, 2**31))
def test_gptq_is_one_stream_of_bits_along_each_input_row(bits, seed):
    """An independent reading: the words of an output, as one large integer."""
    codes = torch.randint(0, 2**bits, (3, 64), generator=torch.Generator().manual_seed(seed))
    words = packing.pack_gptq(codes, bits)
    assert words.dtype == torch.int32
    for row in range(3):
        number = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words[:, row].tolist()))
        assert [number >> bits * i & 2**bits - 1 for i in range(64)] == codes[row].tolist()


def test_a_word_of_awq_by_hand():
    """Codes 0 to 7 of eight outputs: from the lowest nibble up 0 2 4 6 1 3 5 7, so 0x75316420."""
    assert packing.pack_awq(torch.arange(8)[:, None]).tolist() == [[0x75316420]]
    assert packing.pack_gptq(torch.arange(8)[None], 4).tolist() == [[0x76543210]]


def test_version_1_stores_one_less_and_keeps_neighbors():
    zero_point = torch.tensor([[8, 0], [1, 15]]).repeat(4, 1)
    one, two = (packing.unpack_rows(packing.pack_gptq_zeros(zero_point, 4, version), 4).t() for version in (1, 2))
    assert one[:2].tolist() == [[7, 15], [0, 14]]
    assert torch.equal(two.long(), zero_point)
    symmetric = rtn.quantize(torch.randn(32, 64), 4, 32, symmetric=True)
    assert packing.write_gptq(symmetric)["qzeros"].unique().tolist() == [0x77777777]
    assert packing.write_gptq(symmetric, 2)["qzeros"].unique().tolist() == [0x88888888 - 2**32]


def test_what_is_packed_is_the_stream_that_was_stored():
    q = rtn.quantize(torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), 3, 32)
    assert torch.equal(packing.write_gptq(q)["qweight"], packing.pack_gptq(q.codes, 3))


@pytest.mark.parametrize(
    ("rows", "columns", "bits", "message"),
    [
        (32, 40, 4, "in_features 40 is not a multiple of 32"),
        (40, 32, 4, "out_features 40 is not a multiple of 32"),
        (32, 32, 5, "bits is 5, GPTQ's layout has 2, 3, 4, 8"),
    ],
)
def test_what_gptq_cannot_store(rows, columns, bits, message):
    with pytest.raises(ValueError, match=message):
        packing.write_gptq(rtn.quantize(torch.randn(rows, columns), bits, 8))


def test_what_awq_cannot_store():
    with pytest.raises(ValueError, match="bits is 3, AWQ's layout has 4"):
        packing.write_awq(rtn.quantize(torch.randn(8, 8), 3, 8))
    with pytest.raises(ValueError, match="out_features 12 is not a multiple of 8"):
        packing.write_awq(rtn.quantize(torch.randn(12, 8), 4, 8))
    with pytest.raises(ValueError, match="quantize without act_order"):
        packing.write_awq(random_tensor(8, 2, 8, 4, 0, order=True))
    with pytest.raises(ValueError, match="3 codes of 4 bits do not fill 32-bit words: wanted a multiple of 8"):
        packing.pack_rows(torch.zeros(2, 3), 4)
    with pytest.raises(ValueError, match="version is 3, wanted 1 or 2"):
        packing.write_gptq(random_tensor(32, 1, 32, 4, 0), 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qzeros": None}, "the layer lacks qzeros"),
        ({"qweight": torch.zeros(8, 32)}, "qweight is torch.float32, wanted torch.int32"),
        ({"scales": torch.zeros(2, 32, dtype=torch.int32)}, "scales is torch.int32, wanted floating point"),
        ({"scales": torch.ones(2, 40)}, r"scales has shape \[2, 40\], wanted groups that divide 64 inputs, and 32 outputs"),
        ({"scales": torch.ones(3, 32)}, r"scales has shape \[3, 32\]"),
        ({"qzeros": torch.zeros(2, 5, dtype=torch.int32)}, r"qzeros has shape \[2, 5\], wanted \[2, 4\]"),
        ({"qweight": torch.zeros(8, dtype=torch.int32)}, r"qweight has shape \[8\], wanted two axes"),
        ({"g_idx": torch.zeros(63, dtype=torch.int32)}, r"g_idx has shape \[63\], wanted \[64\]"),
        ({"g_idx": torch.full((64,), 2, dtype=torch.int32)}, "g_idx names groups 2 to 2, scales holds 2"),
        *(
            (
                {"scales": torch.ones(2, 32).index_fill(1, torch.tensor([31]), bad)},
                "^scales holds 2 values that are not finite numbers above 0",
            )
            for bad in (float("nan"), float("inf"), 0.0, -1.0)
        ),
    ],
)
def test_what_cannot_be_read(change, message):
    state = packing.write_gptq(random_tensor(32, 2, 32, 4, 0)) | change
    with pytest.raises((ValueError, TypeError), match=message):
        packing.read_gptq({key: value for key, value in state.items() if value is not None}, 4)
    if "g_idx" not in change and change.keys() != {"qweight"}:
        awq = packing.write_awq(random_tensor(32, 2, 32, 4, 0)) | change
        with pytest.raises((ValueError, TypeError), match=message):
            packing.read_awq({key: value for key, value in awq.items() if value is not None})


@pytest.mark.parametrize(("code", "said"), [(16, "codes reach from 0 to 16, wanted 0 to 15"), (-1, "codes reach from -1 to 0")])
def test_a_code_that_would_spill_into_its_neighbors(code, said):
    codes = torch.zeros(32, 32, dtype=torch.int64)
    codes[3, 5] = code
    for pack_codes in (lambda: packing.pack_gptq(codes, 4), lambda: packing.pack_awq(codes)):
        with pytest.raises(ValueError, match=said):
            pack_codes()
