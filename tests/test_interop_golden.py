"""What AutoGPTQ and AutoAWQ made of given weights, Hessians and text, kept in tests/interop/golden: whole, and what it says it is.

`make interop` compares the files with the libraries themselves.
"""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from interop import cases, compare, environment, golden, layers, ours, tiny
from interop.golden import unpack_awq

from labsupport import install
from labsupport.quant import rtn

CASES = [(name, setting) for name, settings in layers.SETTINGS.items() for setting in settings]


def test_files_are_small_and_say_where_they_are_from():
    assert sum(path.stat().st_size for path in golden.FOLDER.iterdir()) < 2.1e6
    pins = environment.LEGACY.pins.read_text()
    for path in (golden.GPTQ, golden.AWQ):
        said = golden.about(path)
        assert said["command"] == golden.COMMAND
        assert said["threads"] == "1"
        versions = json.loads(said["versions"])
        assert {"torch", "transformers", "auto-gptq", "autoawq", "python"} <= versions.keys()
        assert all(install.pinned(pins, name) == version for name, version in versions.items() if name != "python")


def test_every_setting_is_there():
    """Bits, groups, grids, order and static groups in every combination, on two layers; a part of them on the course model's."""
    wanted = set(product((4, 3, 2), (32, 128, None), (False, True), (False, True), (False, True)))
    assert {(s.bits, s.group_size, s.symmetric, s.act_order, s.static_groups) for s in cases.ALL} == {
        fields for fields in wanted if fields[1] or not fields[4]
    }
    assert {name: tuple(layer.results) for name, layer in golden.read_gptq().items()} == layers.SETTINGS
    assert {name: tuple(model.results) for name, model in golden.read_awq().items()} == tiny.RUNS


@pytest.mark.parametrize(("name", "setting"), CASES, ids=[f"{name}-{setting.name}" for name, setting in CASES])
def test_gptq_results_are_whole(name, setting):
    layer = golden.read_gptq()[name]
    solved, (rows, columns) = layer.results[setting], layer.weight.shape
    size = setting.group_size or columns
    groups = columns // size
    assert solved.codes.shape == (rows, columns)
    assert solved.codes.max() < 2**setting.bits
    assert solved.scale.shape == solved.zero_point.shape == (rows, groups)
    assert (solved.scale > 0).all()
    assert solved.zero_point.max() < 2**setting.bits
    if setting.symmetric:
        assert (solved.zero_point == 2 ** (setting.bits - 1)).all()
    assert solved.g_idx.bincount().tolist() == [size] * groups
    if setting.static_groups or not setting.act_order:
        assert torch.equal(solved.g_idx, torch.arange(columns, dtype=torch.int16) // size)


@pytest.mark.parametrize("name", list(layers.SETTINGS))
def test_gptq_results_belong_to_their_weight_and_hessian(name):
    """Static grids are those of the weight; the output error is smaller than that of rounding to grids of the same kind."""
    layer = golden.read_gptq()[name]
    weight, hessian = layer.weight.clone(), layer.hessian
    weight[:, hessian.diagonal() == 0] = 0
    for setting, solved in layer.results.items():
        if setting.static_groups and not setting.symmetric:
            groups = weight.unflatten(1, (-1, setting.group_size))
            low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
            empty = (low == 0) & (high == 0)
            assert torch.equal(solved.scale, torch.where(empty, 2.0, high - low) / (2**setting.bits - 1)), setting.name
        if not setting.symmetric:
            rounded = rtn.quantize(weight, setting.bits, setting.group_size, scale_dtype=torch.float32).dequantize()
            error = rounded.double() - weight.double()
            rounding = ((error @ hessian.double()) * error).sum()
            assert compare.loss(weight, hessian, solved) < rounding, setting.name


def test_hessians_are_exact():
    """In whatever order the inputs are added: they are whole numbers, and so are all sums."""
    for layer in golden.read_gptq().values():
        order = torch.randperm(len(layer.inputs), generator=torch.Generator().manual_seed(0))
        x = layer.inputs[order].float()
        assert torch.equal(x.T @ x * (2 / len(x)), layer.hessian)
        energy = layer.hessian.diagonal()
        assert len(energy.unique()) == len(energy), "act_order would depend on how a sort breaks ties"
    with pytest.raises(ValueError, match=r"wanted below 2\*\*24"):
        cases.exact_hessian(torch.full((2048, 1), 127, dtype=torch.int8))


@pytest.mark.parametrize(("name", "run"), [(name, run) for name, runs in tiny.RUNS.items() for run in runs], ids=str)
def test_awq_scales_follow_the_rule(name, run):
    found = golden.read_awq()[name].results[run]
    for group in range(len(found.groups)):
        x, w, scale = (found.tensors[f"group.{group}/{part}"] for part in ("x_mean", "w_mean", "scale"))
        ratio = found.ratio(group)
        wanted = x.pow(ratio) / (w.pow(1 - ratio) + 1e-4) if run.duo_scaling else x.pow(ratio)
        wanted = wanted.clamp(min=1e-4)
        # Two powers, a quotient and a square root in float32; how a power is rounded differs between processors.
        assert torch.allclose(scale, wanted / (wanted.max() * wanted.min()).sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", list(tiny.SHAPES))
def test_awq_codes_are_those_of_the_scaled_and_clipped_weight(name):
    model = golden.read_awq()[name]
    weights = tiny.floats(model.weights)
    run = next(run for run in model.results if run.quantize)
    found = model.results[run]
    for number, group in enumerate(found.groups):
        scale = found.tensors[f"group.{number}/scale"]
        for linear in group["linears"]:
            weights[f"{linear}.weight"] *= scale
        after = weights[f"{group['after']}.weight"]
        after.div_(scale if after.ndim == 1 else scale[:, None])
    linears = [key.removesuffix("/qweight") for key in found.tensors if key.endswith("/qweight")]
    assert len(linears) == 7 * tiny.SHAPES[name].blocks
    for linear in linears:
        groups = weights[f"{linear}.weight"].unflatten(1, (-1, run.group_size))
        clip = found.tensors.get(f"{linear}/clip")
        assert (clip is None) == linear.endswith(("q_proj", "k_proj"))
        if clip is not None:
            groups = groups.clamp(-clip[..., None], clip[..., None])
        groups = groups.half()  # their last step is in float16
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / 15
        zero = (-torch.round(low / scale)).clamp(0, 15)
        codes = (torch.round(groups / scale) + zero).clamp(0, 15).flatten(1)
        assert torch.equal(unpack_awq(found.tensors[f"{linear}/qweight"]), codes.int()), linear
        assert torch.equal(unpack_awq(found.tensors[f"{linear}/qzeros"]), zero[..., 0].int()), linear
        assert torch.equal(found.tensors[f"{linear}/scales"].T, scale[..., 0]), linear
    for key, weight in weights.items():
        if key.endswith("layernorm.weight"):
            assert torch.equal(found.tensors[f"{key.removesuffix('.weight')}/weight"], weight), key


def test_groups_of_linears():
    grouped, plain = (golden.read_awq()[name].results[tiny.RUNS[name][0]] for name in ("gqa", "mha"))
    assert not any(group["after"].endswith("v_proj") for group in grouped.groups), "grouped-query attention: v does not fit o"
    assert [group["after"].split(".", 3)[3] for group in plain.groups] == [
        "input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj",
    ]  # fmt: skip


def test_scaling_changes_no_logit_once_patched():
    """As published AutoAWQ restores the weights from an alias of themselves, and leaves them scaled on a CPU."""
    changes = {}
    for run, found in golden.read_awq()["mha"].results.items():
        if not run.clip and not run.quantize:
            changes[run.patched] = found.tensors["logits_change"].item()
    assert changes[True] < 1e-5
    assert changes[False] > 0.01


@pytest.fixture
def one_thread():
    """What the golden files were made with: the number of threads decides the order of sums in a factorization."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", list(layers.SETTINGS))
@pytest.mark.slow
def test_gptq_equals_autogptq(name, one_thread):
    """Bit for bit, given the same Hessian; on a machine whose factorization rounds otherwise row by row, but for a few."""
    layer = golden.read_gptq()[name]
    hessian = layer.hessian
    same_rounding = cases.rounding_of(hessian) == layer.rounding
    for setting, solved in layer.results.items():
        verdict = compare.verdict(ours.by_gptq(layer.weight, hessian, setting), solved, same_rounding)
        assert verdict.good, f"{setting.name}: {verdict.said}"


def test_a_comparison_can_fail():
    solved = next(iter(golden.read_gptq()["correlated"].results.values()))

    def judged(codes, scale, same_rounding):
        other = golden.Solved(codes, scale, solved.zero_point, solved.g_idx)
        return compare.verdict(other, solved, same_rounding)

    codes, scale = solved.codes.clone(), solved.scale
    assert judged(codes, scale, True).said == "equal"
    assert judged(codes, scale.nextafter(torch.tensor(9.0)), False).good
    assert not judged(codes, scale.nextafter(torch.tensor(9.0)), True).good
    assert not judged(codes, scale * 1.002, False).good
    codes[3, 5] ^= 1
    assert judged(codes, scale, True).said == "differs in 1 of 8192 values of codes"
    assert not judged(codes, scale, True).good
    assert judged(codes, scale, False).good
    codes[:3, 5] ^= 1
    assert not judged(codes, scale, False).good
