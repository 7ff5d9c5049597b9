"""Products with 4-bit weights: every backend against float64 within a bound derived here; bad input; Triton's two homes."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from labsupport import kernels
from labsupport.cli import app
from labsupport.evidence import bench, machine, timing
from labsupport.kernels import cpu, language, paper, w4a16
from labsupport.quant import gptq, grid, rtn

tl = language.tl  # the interpreter looks for it among the globals of a kernel
needs_triton = pytest.mark.skipif(not language.available(), reason="Triton has wheels for Linux only")
needs_cpu_product = pytest.mark.skipif(not cpu.available(), reason="torch 2.6 or later")

# What rounding to nearest can move a number by, relatively.
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


def exact(x: torch.Tensor, weight: grid.UniformTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and the same of magnitudes, by which rounding is measured."""
    scale = weight.scale.double().repeat_interleave(weight.group_size, 1)
    zero = weight.zero_point.double().repeat_interleave(weight.group_size, 1)
    values = (weight.codes.double() - zero) * scale
    return x.double() @ values.t(), x.double().abs() @ values.abs().t()


def bound(x: torch.Tensor, weight: grid.UniformTensor) -> torch.Tensor:
    """How far the kernels and the twin may be from the exact product.

    (code - zero_point) is exact, and so are x and scale in float32. A product rounds once, summing K of them at most K - 1 times in
    whatever order, scaling once more, and each of these moves the sum by at most 2^-24 of the magnitudes: (K + 1) * 2^-24, and 1 %
    for products of such factors. The output is then rounded once to its dtype.
    """
    value, magnitude = exact(x, weight)
    summing = 1.01 * (x.shape[-1] + 1) * 2.0**-24 * magnitude
    # The least numbers of fp16 lie 2^-24 apart, however small the value.
    return summing + UNIT[x.dtype] * (value.abs() + summing) + 2.0**-25


def make(rows: int, columns: int, group: int, symmetric: bool, scale_dtype: torch.dtype, seed: int) -> grid.UniformTensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] = weight[0].abs() + 1  # a row of one sign, whose zero-point is at the end
    if rows > 1:
        weight[1] = 0
    return rtn.quantize(weight, 4, group, symmetric, scale_dtype)


shapes = st.tuples(
    st.integers(1, 40),  # out_features
    st.integers(1, 5),  # groups
    st.sampled_from([2, 6, 10, 16, 32, 48, 64, 128, 130, 384]),  # group size
    st.sampled_from([1, 1, 2, 3, 16, 17, 33]),  # batch
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.booleans(),
    st.sampled_from([torch.float16, torch.float32]),
    st.integers(0, 2**20),
)


def agrees(backend: str, shape: tuple) -> None:
    rows, groups, size, batch, dtype, symmetric, scale_dtype, seed = shape
    weight = make(rows, groups * size, size, symmetric, scale_dtype, seed)
    x = torch.randn(batch, groups * size, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    before = x.clone()
    found = kernels.matmul(x, kernels.prepare(weight, dtype, backend))
    assert found.dtype == dtype
    assert found.shape == (batch, rows)
    assert torch.equal(x, before)
    over = (found.double() - exact(x, weight)[0]).abs() - bound(x, weight)
    assert over.max() <= 0, f"{over.max().item():.3g} beyond the bound"


@needs_triton
@settings(max_examples=60, deadline=None)
@given(shapes)
@pytest.mark.slow
def test_triton_agrees_with_float64(shape):
    agrees("triton", shape)


@settings(max_examples=100, deadline=None)
@given(shapes)
def test_the_twin_agrees_with_float64(shape):
    agrees("twin", shape)


@needs_triton
@pytest.mark.parametrize("batch", [1, 2])
def test_triton_over_several_tiles_in_every_direction(batch):
    agrees("triton", (w4a16.ROWS * 3 + 1, 3, 128 * w4a16.UNITS // 2, batch, torch.float16, False, torch.float16, 5))


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_wrong_nibble_order_would_be_seen(backend, batch):
    """The bound is tight enough: with the codes of each byte exchanged every backend is far outside."""
    if backend == "triton" and not language.available():
        pytest.skip("Triton has wheels for Linux only")
    weight = make(16, 256, 32, False, torch.float16, 0)
    x = torch.randn(batch, 256, generator=torch.Generator().manual_seed(1))
    packed = weight.packed_codes
    turned = grid.UniformTensor(
        (packed & 15) << 4 | packed >> 4, weight.scale, weight.packed_zero_points, 4, weight.group_size, weight.shape
    )
    found = kernels.matmul(x, kernels.prepare(turned, torch.float32, backend))
    assert ((found.double() - exact(x, weight)[0]).abs() > 100 * bound(x, weight)).float().mean() > 0.5


@needs_triton
def test_triton_equals_the_twin_nearly_to_the_bit():
    """Both compute in one order of steps; what is left is the order within a group's sum."""
    weight = make(33, 512, 128, False, torch.float16, 2)
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(3)).half()
    ours, twin = (kernels.matmul(x, kernels.prepare(weight, torch.float16, b)).float() for b in ("triton", "twin"))
    spacing = 2.0**-10 * twin.abs().clamp(min=2.0**-14)
    assert ((ours - twin).abs() <= spacing * 1.01).all()


def cpu_bound(x: torch.Tensor, weight: grid.UniformTensor) -> torch.Tensor:
    """How far PyTorch's int4 product may be: as `bound`, but for a scale and a zero that are rounded to x's dtype.

    The rounded scale moves a weight by unit * |code - 8| * scale and, since zero = (8 - z) * scale is made from it, by
    unit * |8 - z| * scale more; rounding zero itself adds as much again. The weight is then rounded to x's dtype and multiplied.
    """
    value, _ = exact(x, weight)
    zero = weight.zero_point.double().repeat_interleave(weight.group_size, 1)
    scale = weight.scale.double().repeat_interleave(weight.group_size, 1)
    codes = weight.codes.double()
    moved = ((codes - 8).abs() + 2 * (8 - zero).abs() + (codes - zero).abs()) * scale * UNIT[x.dtype]
    weights_part = 1.02 * x.double().abs() @ moved.t()
    # (code - 8) * scale and zero may be far larger than their sum: float32 sums of them round accordingly.
    wide = x.double().abs() @ (((codes - 8).abs() + (8 - zero).abs()) * scale).t()
    summing = 1.01 * (x.shape[-1] + 3) * 2.0**-24 * wide
    return weights_part + summing + UNIT[x.dtype] * (value.abs() + weights_part + summing) + 2.0**-25


@needs_cpu_product
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 50), st.integers(1, 4), st.sampled_from([32, 64, 96, 128, 256, 512]), st.sampled_from([1, 2, 5, 17]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.booleans(), st.integers(0, 2**20),
)  # fmt: skip
def test_pytorchs_product_agrees_with_float64(rows, groups, size, batch, dtype, symmetric, seed):
    weight = make(rows, groups * size, size, symmetric, torch.float16, seed)
    x = torch.randn(batch, groups * size, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)
    found = kernels.matmul(x, kernels.prepare(weight, dtype, "cpu"))
    assert found.dtype == dtype
    assert found.shape == (batch, rows)
    over = (found.double() - exact(x, weight)[0]).abs() - cpu_bound(x, weight)
    assert over.max() <= 0, f"{over.max().item():.3g} beyond the bound"


def test_scales_and_zeros_stand_for_the_same_weights():
    weight = make(8, 64, 32, False, torch.float16, 4)
    grids = cpu.scales_and_zeros(weight.scale, weight.zero_point, torch.float32)
    assert grids.shape == (2, 8, 2)
    scale, zero = (part.t().repeat_interleave(32, 1) for part in grids.unbind(-1))
    values = (weight.codes.float() - 8) * scale + zero
    assert torch.allclose(values, weight.dequantize(), rtol=0, atol=1e-6)


def test_leading_axes_and_an_empty_batch_are_kept():
    weight = make(6, 64, 32, False, torch.float16, 0)
    ready = kernels.prepare(weight, torch.float32, "twin")
    x = torch.randn(2, 3, 64)
    assert torch.equal(kernels.matmul(x, ready), kernels.matmul(x.view(6, 64), ready).view(2, 3, 6))
    assert kernels.matmul(x[0, 0], ready).shape == (6,)
    assert kernels.matmul(torch.empty(0, 64), ready).shape == (0, 6)
    assert torch.equal(
        kernels.matmul(x[..., ::2].repeat_interleave(2, -1), ready)[0], kernels.matmul(x[0, :, ::2].repeat_interleave(2, -1), ready)
    )


def test_bytes_are_those_of_the_tensors():
    weight = make(32, 256, 128, False, torch.float16, 0)
    ready = kernels.prepare(weight, torch.bfloat16, "twin")
    assert ready.nbytes == 32 * 256 // 2 + 32 * 2 * (2 + 1)  # two codes a byte; a scale of two bytes, a zero-point of one
    if cpu.available():
        ours = kernels.prepare(weight, torch.bfloat16, "cpu")
        assert ours.nbytes == 32 * 256 // 2 + 32 * 2 * (2 + 2)


def test_the_backend_is_chosen_by_what_it_can_do():
    even, odd = make(16, 64, 32, False, torch.float16, 0), make(16, 48, 16, False, torch.float16, 0)
    assert kernels.prepare(odd).backend == "twin"
    assert kernels.prepare(even, torch.float32).backend == "twin"
    if cpu.available():
        assert kernels.prepare(even).backend == "cpu"


WEIGHT = make(16, 96, 48, False, torch.float16, 0)
READY = kernels.prepare(WEIGHT, torch.float32, "twin")
SCATTERED = gptq.quantize(torch.ones(4, 8), torch.diag(torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6])), 4, 4, act_order=True)


@pytest.mark.parametrize(
    ("action", "error", "words"),
    [
        (lambda: kernels.prepare(rtn.quantize(torch.ones(4, 8), 3, 8)), ValueError, "weight has 3 bits"),
        (lambda: kernels.prepare(SCATTERED), ValueError, r"the groups of weight are scattered over its rows \(g_idx\)"),
        (lambda: kernels.prepare(WEIGHT, torch.float64), ValueError, "dtype is torch.float64, wanted one of"),
        (lambda: kernels.prepare(WEIGHT, backend="marlin"), ValueError, "backend is 'marlin', wanted one of triton, cpu, twin"),
        (lambda: kernels.prepare(WEIGHT, backend="cpu"), ValueError, "group_size is 48, .* wants a multiple of 32"),
        (lambda: kernels.prepare(rtn.quantize(torch.ones(4, 9), 4, 3)), ValueError, "group_size is 3, wanted an even number"),
        (lambda: kernels.prepare(WEIGHT, backend="cpu", device="meta"), ValueError, "device is meta"),
        (lambda: kernels.matmul(torch.ones(2, 96).half(), READY), TypeError, "x is torch.float16, .* prepared for torch.float32"),
        (lambda: kernels.matmul(torch.ones(96, 2), READY), ValueError, r"x has shape \[96, 2\], wanted a last axis of 96"),
        (lambda: kernels.matmul(torch.tensor(1.0), READY), ValueError, r"x has shape \[\], wanted a last axis of 96"),
        (lambda: kernels.matmul(torch.ones(2, 96, device="meta"), READY), ValueError, "x is on meta, the weight on cpu"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(action, error, words):
    with pytest.raises(error, match=words):
        action()


def test_without_triton_all_but_its_kernels_work(monkeypatch):
    monkeypatch.setattr(language, "triton", None)
    assert kernels.prepare(WEIGHT).backend == "twin"
    with pytest.raises(RuntimeError, match="Triton is not installed here"):
        kernels.prepare(WEIGHT, backend="triton")
    for launch in (language.launch, language.interpret):
        with pytest.raises(RuntimeError, match="Triton is not installed here"):
            launch(w4a16.matvec, (1,))
    with pytest.raises(RuntimeError, match="Triton is not installed here"):
        language.assembly(w4a16.matvec, {}, {})


@pytest.mark.slow
def test_kernels_can_be_imported_where_triton_cannot():
    code = "import sys; sys.modules['triton'] = None; from labsupport import kernels; print(kernels.language.available())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


SIGNATURE = {"x": "*{}", "packed": "*u8", "scale": "*fp16", "zero_point": "*u8", "out": "*{}"}
COMPILED = {
    "matvec": (("rows", "units", "per_group"), {"UNIT": 128, "BYTES": 64, "ROWS": w4a16.ROWS, "UNITS": w4a16.UNITS}),
    "small_batch": (("batch", "rows", "units", "per_group"), {"UNIT": 128, "BYTES": 64, "BATCH": 16, "ROWS": 16}),
}


def ptx(name: str, dtype: str) -> str:
    sizes, constants = COMPILED[name]
    signature = {k: v.format(dtype) for k, v in SIGNATURE.items()} | dict.fromkeys(sizes, "i32")
    return language.assembly(getattr(w4a16, name), signature | dict.fromkeys(constants, "constexpr"), constants)


@needs_triton
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_kernels_compile_for_a_gpu_that_is_not_there(dtype):
    """Sixteen bytes of codes in one load of a thread; tensor cores in 16 bits for a batch."""
    assert "ld.global.v4.b32" in ptx("matvec", dtype)
    kind = {"bf16": "bf16.bf16", "fp16": "f16.f16"}[dtype]
    assert f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.f32" in ptx("small_batch", dtype)


def add_up(values, total, count, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        sums += tl.load(values + place, mask=place < count, other=0)
    tl.store(total, tl.sum(sums, 0))


@needs_triton
def test_a_loop_up_to_an_argument_is_interpreted_whatever_triton_does_with_its_end(monkeypatch):
    """As Triton before 3.7 has it: an array of one number is handed to int(), which NumPy refuses from 2.4 on."""
    from triton.runtime import interpreter

    real = interpreter._patch_lang_tensor

    def older(tensor, *scope):
        real(tensor, *scope)
        tensor.__index__ = lambda self: [].__getitem__(self.handle.data)  # refused by every NumPy

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", older)
    total = torch.zeros(1)
    language.interpret(add_up, (1,), torch.arange(100.0), total, 100, BLOCK=16)
    assert total.item() == 4950
    assert interpreter._patch_lang_tensor is older


@needs_triton
def test_after_interpreting_triton_is_as_before():
    """One process interprets and compiles in turn: the interpreter's changes to triton.language must not stay."""
    weight = make(5, 32, 16, False, torch.float16, 0)
    places = (language.tl, language.tl.core, language.tl.math, language.tl.tensor)
    before = [dict(vars(place)) for place in places]
    kernels.matmul(torch.ones(1, 32), kernels.prepare(weight, torch.float32, "triton"))
    assert [dict(vars(place)) for place in places] == before
    with pytest.raises(ZeroDivisionError):
        language.interpret(fails, (1,), torch.ones(1))
    assert [dict(vars(place)) for place in places] == before


def fails(x):
    tl.load(x)
    raise ZeroDivisionError


def past_the_end(x, out, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(out + place, tl.load(x + place))


@needs_triton
@pytest.mark.parametrize(("read", "written", "words"), [(7, 8, "tl.load reads outside"), (8, 7, "tl.store writes outside")])
def test_the_interpreter_notices_what_lies_outside(read, written, words):
    tensors = torch.ones(16)[:read], torch.zeros(16)[:written]
    with pytest.raises(IndexError, match=words):
        language.interpret(past_the_end, (1,), *tensors, COUNT=8)
    out = torch.zeros(8)
    language.interpret(past_the_end, (1,), torch.ones(8), out, COUNT=8)
    assert (out == 1).all()


def test_bytes_on_paper_are_those_that_are_stored():
    weight = rtn.quantize(torch.randn(64, 256), 4, 32)
    assert paper.bytes_moved(3, 256, 64, 4, 32) == weight.nbytes + 3 * 2 * (256 + 64)
    assert paper.bytes_moved(3, 256, 64, 4, 32, kept_width=16) == weight.nbytes + 2 * 2 * 256 * 64 + 3 * 2 * (256 + 64)


@given(
    st.floats(1e6, 1e9), st.floats(0.2, 0.9), st.floats(1e6, 1e9), st.floats(1e9, 1e12), st.floats(1e11, 1e14), st.floats(0.05, 1.0)
)  # fmt: skip
def test_the_crossover_is_where_the_two_times_meet(read, narrower, operations, bandwidth, rate, slower):
    narrow_rate = rate * slower
    found = paper.crossover(read, operations, bandwidth, rate, narrow_rate)

    def behind(batch: float) -> float:
        wide = max(read / bandwidth, batch * operations / rate)
        return max(read * narrower / bandwidth, batch * operations / narrow_rate) / wide

    assert behind(found) >= 1 - 1e-9
    if found > 1:
        assert behind(found - 1) <= 1 + 1e-9


def test_a_kernel_that_computes_faster_never_falls_behind():
    assert paper.crossover(4e6, 1e6, 1e10, 1e12, 2e12) is None


# Timing: what is counted, on a clock that is made up. ------------------------------------------------------------------


def test_copies_reach_past_the_cache():
    assert timing.copies(2**20, 2**25) == 64  # no more than that
    assert timing.copies(2**25, 2**25) == 4
    assert timing.copies(2**25 + 1, 2**25) == 4
    assert timing.copies(2**40, 2**25) == 2
    assert timing.copies(2**25, None) == 4 * machine.USUAL_CACHE // 2**25


@pytest.mark.parametrize(("budget", "made", "least"), [(1.0, 3, 3.0), (17.5, 4, 2.0)])
def test_seconds_is_the_least_of_calls_made_in_turn(monkeypatch, budget, made, least):
    """One call that is not timed, then in turn until the budget is over; three times at least, and no more for what is slow."""
    now, order, durations = [0.0], [], iter([1.0, 9.0, 5.0, 3.0, 2.0, 0.5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name):
        order.append(name)
        now[0] += next(durations)

    taken = timing.seconds([partial(call, "a"), partial(call, "b")], torch.device("cpu"), budget)
    assert order == ["a", "b", "a", "b", "a"][: 1 + made]
    assert taken == least


def test_bandwidth_counts_a_copy_twice(monkeypatch):
    monkeypatch.setattr(machine, "SMALLEST_BUFFER", 8000)
    monkeypatch.setattr(timing, "PIECE", 4000)
    taken = iter([1.0, 4.0])
    monkeypatch.setattr(timing, "seconds", lambda *_: next(taken))
    assert timing.bandwidth() == 8000
    taken = iter([4.0, 1.0])
    assert timing.bandwidth() == 4000


@pytest.mark.parametrize("backend", [b for b in kernels.BACKENDS if b != "triton"])
def test_a_rotation_holds_weights_of_its_own(backend):
    weight = make(16, 128, 32, False, torch.float16, 0)
    ready = kernels.prepare(weight, torch.bfloat16, backend)
    multiplies, read = timing.int4(ready, 3)
    assert read == ready.nbytes
    held = [multiply.args[0] for multiply in multiplies]
    places = {t.data_ptr() for w in (ready, *held) for t in (w.codes, *w.grids)}
    assert len(places) == 4 * (1 + len(ready.grids))
    x = torch.randn(2, 128).bfloat16()
    assert all(torch.equal(multiply(x), kernels.matmul(x, ready)) for multiply in multiplies)


@pytest.mark.parametrize(("method", "allowed"), [("nf4", 0.2), ("int8", 0.03), ("int8 mixed", 0.03)])
@pytest.mark.slow
def test_the_peers_layers_multiply_by_the_weight(method, allowed):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    multiplies, read = timing.bitsandbytes(weight, method, 2)
    want = x.float() @ weight.float().t()
    with torch.no_grad():
        for multiply in multiplies:
            assert (multiply(x).float() - want).norm() < allowed * want.norm()
    assert read == (64 * 128 // 2 + 64 * 128 // 64 * 4 if method == "nf4" else 64 * 128 + 4 * 64)


def test_products_cover_every_kernel_and_batch_and_survive_a_file(tmp_path):
    rows = list(bench.products([(32, 128), (24, 128)], (1, 3), budget=0.001, device="cpu"))
    assert [(r.kernel, r.batch) for r in rows][:4] == [("bf16", 1), ("bf16", 3), ("int4", 1), ("int4", 3)]
    assert {r.kernel for r in rows} >= {"bf16", "int4", "int4, unfused", "bitsandbytes nf4", "bitsandbytes int8 mixed"}
    assert {r.kernel for r in rows if r.out_features == 24} == {"bf16", "int4", "int4, unfused"}
    assert all(r.seconds > 0 and r.read > 0 for r in rows)
    bench.write(tmp_path / "a" / "x.json", {"threads": 2}, rows)
    assert bench.read(tmp_path / "a" / "x.json") == ({"threads": 2}, rows)


def test_a_weight_larger_than_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(bench, "_free", lambda device: 2**20)
    assert list(bench.products([(4096, 4096)], device="cpu")) == []


def test_the_made_up_weight_is_one():
    weight = bench._made_up(6, 256, "cpu")
    assert weight.codes.shape == (6, 256)
    assert len(weight.codes.unique()) == 16
    assert (weight.zero_point == 8).all()
    assert weight.dequantize().std() > 0


def test_a_device_has_a_file_of_its_own():
    path = bench.measurements_path(machine.Machine("cuda", "NVIDIA A100-SXM4-80GB", 8, 2**36, None, {}))
    assert path.name == "nvidia-a100-sxm4-80gb.json"


def test_processors_of_one_name_and_other_instructions_have_files_of_their_own(monkeypatch):
    here = machine.Machine("cpu", "AMD EPYC", 2, 2**34, 2**25, {})
    names = set()
    for capability in ("AVX2", "AVX512"):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        names.add(bench.measurements_path(here).name)
    assert names == {"amd-epyc-avx2.json", "amd-epyc-avx512.json"}


@pytest.mark.parametrize("name", ["amd-epyc-avx512", "amd-epyc-avx2"])
def test_machines_that_claims_are_settled_from(name):
    about, rows = bench.load(name)
    assert about["name"] == "AMD EPYC"
    assert about["instructions"] == name.rpartition("-")[2].upper()
    found = {(r.kernel, r.batch) for r in rows if (r.out_features, r.in_features) == (4096, 4096)}
    assert found >= {(kernel, batch) for kernel in ("bf16", "int4", "int4, unfused", "bitsandbytes nf4") for batch in (1, 64)}


@pytest.mark.slow
def test_labs_bench_writes_what_it_measured(tmp_path):
    asked = [
        "bench",
        "--only",
        "products",
        "--rows",
        "32",
        "--columns",
        "128",
        "--budget",
        "0.01",
        "--out",
        str(tmp_path / "x.json"),
    ]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 0, result.output
    assert "32 x 128" in result.output
    about, rows = bench.read(tmp_path / "x.json")
    assert len(rows) == 6 * len(bench.BATCHES)
    assert about["bandwidth"] > 0
    assert about["command"] == "labs bench --only products --budget 0.01 --rows 32 --columns 128"
    refused = CliRunner().invoke(app, ["bench", "--only", "everything"])
    assert refused.exit_code == 1
    assert "--only is 'everything', wanted quantizers or products" in refused.output


@pytest.mark.parametrize("inside", [True, False])
def test_labs_bench_says_at_once_where_it_cannot_write(tmp_path, monkeypatch, inside):
    """Before it measures, which takes minutes."""
    monkeypatch.setattr(bench, "about", lambda *_: pytest.fail("it measured"))
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / "x.json" if inside else tmp_path
    done = CliRunner().invoke(app, ["bench", "--only", "products", "--rows", "32", "--columns", "128", "--out", str(out)])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert len(done.stderr.splitlines()) == 1
    assert ("a directory: wanted a JSON file" in done.stderr) != inside
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_measurements_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    bench.write(path, {"threads": 1}, [])
    kept = path.read_text()

    def full(self, *_):
        self.touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        bench.write(path, {"threads": 2}, [])
    assert path.read_text() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
