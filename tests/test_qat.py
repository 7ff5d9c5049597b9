"""Fake quantizers: against torchao's, against finite differences and written-out derivatives, and against what is stored."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from labsupport.model import models
from labsupport.quant import qat, rtn

WEIGHT = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))


def gradient(function, weight, *learned):
    """The gradient of sum(c * function(weight)) with fixed random c: for the weight, and for what is learned beside it."""
    leaves = [tensor.clone().requires_grad_() for tensor in (weight, *learned)]
    values = function(*leaves)
    c = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    (c * values).sum().backward()
    return values.detach(), c, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gives_what_rounding_stores_and_a_gradient_where_nothing_is_clipped(bits, symmetric):
    values, c, (found,) = gradient(lambda w: qat.fake_quantize(w, bits, 32, symmetric), WEIGHT)
    stored = qat.uniform(WEIGHT, bits=bits, group_size=32, symmetric=symmetric)
    assert torch.equal(values, stored.dequantize())
    assert torch.equal(stored.codes, rtn.quantize(WEIGHT, bits, 32, symmetric, torch.float32).codes)
    scale, zero_point = (part[..., None] for part in (stored.scale, stored.zero_point))
    beyond = (WEIGHT.unflatten(1, (-1, 32)) * (1 / scale)).round() + zero_point
    inside = ((beyond >= 0) & (beyond < 2**bits)).flatten(1)
    assert symmetric == bool((~inside).any())  # the largest of a symmetric group may be clipped
    # (1 / scale) * scale is 1 but for two roundings.
    assert torch.allclose(found, c * inside, rtol=2 * 2.0**-23, atol=0)


def test_equals_torchao():
    """Its values to the last bit, its gradient within one rounding of float32. tests/interop/run_torchao.py writes the file."""
    theirs = load_file(models.data_dir() / "golden" / "torchao.safetensors")
    weight = theirs["weight"].requires_grad_()
    values = qat.fake_quantize(weight, 4, 32)
    assert torch.equal(values, theirs["values"])
    (theirs["factors"] * values).sum().backward()
    wanted = theirs["gradient"]
    assert ((weight.grad - wanted).abs() <= 2.0**-23 * wanted.abs()).all()
    assert (wanted == 0).any()


def test_rounding_passes_a_gradient_and_soft_rounding_has_one_of_its_own():
    x = torch.linspace(-3, 3, 97, dtype=torch.float64, requires_grad=True)
    qat.round_through(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(qat.round_through(x), x.round())
    between = (x.detach() + 0.013).requires_grad_()  # not on a whole number, where the stairs meet
    assert torch.autograd.gradcheck(lambda t: qat.soft_round(t, 6.0), between)
    assert (qat.soft_round(between, 500.0) - between.round()).abs().max() < 0.01
    assert (qat.soft_round(between, 1e-3) - between).abs().max() < 1e-6
    steepness = torch.autograd.grad(qat.soft_round(between, 8.0).sum(), between)[0]
    assert steepness.max() > 3
    assert steepness.min() < 0.05


def test_learned_steps_have_the_derivative_of_the_paper():
    bits, step = 3, qat.first_steps(WEIGHT, 3, 64)
    values, c, (of_weight, of_step) = gradient(lambda w, s: qat.learned_step(w, s, bits), WEIGHT, step)
    ratio = WEIGHT.unflatten(1, (-1, 64)) / step[..., None]
    low, high = -4, 3
    slope = torch.where(ratio <= low, low, torch.where(ratio >= high, high, ratio.round() - ratio))
    wanted = (c.unflatten(1, (-1, 64)) * slope).sum(2) / math.sqrt(64 * high)
    assert ((ratio < low) | (ratio > high)).any()
    # Sums of 64 products of float32, whose quotients are rounded: 70 units in the last place of the sizes that are added.
    sizes = (c.unflatten(1, (-1, 64)).abs() * (ratio.abs() + slope.abs())).sum(2) / math.sqrt(64 * high)
    assert ((of_step - wanted).abs() <= 70 * 2.0**-24 * sizes).all()
    inside = ((ratio >= low) & (ratio <= high)).flatten(1)
    assert torch.allclose(of_weight, c * inside, rtol=2 * 2.0**-23, atol=0)
    stored = qat.uniform(WEIGHT, step, bits)
    assert torch.equal(stored.dequantize(), values)
    assert stored.bits_per_weight == 3 + 32 / 64


@pytest.mark.parametrize("group_size", [None, 32])
def test_ternary_weights(group_size):
    values, c, (found,) = gradient(lambda w: qat.ternary(w, group_size), WEIGHT)
    groups = WEIGHT.reshape(-1, group_size or WEIGHT.numel())
    scale = groups.abs().mean(1, keepdim=True)
    wanted = torch.where(groups.abs() / scale > 0.5, groups.sign() * scale, torch.zeros(()))
    assert torch.equal(values, wanted.view_as(WEIGHT))
    assert torch.allclose(found, c, rtol=2 * 2.0**-23, atol=0)
    stored = qat.ternary_tensor(WEIGHT, group_size)
    assert torch.equal(stored.dequantize(), values)
    assert stored.packed_codes.numel() == -(-WEIGHT.numel() // 5)
    assert stored.bits_per_weight == pytest.approx(1.6 + 32 / groups.shape[1], abs=1e-3)


def test_a_group_of_zeros_stays_zero():
    zeros = torch.zeros(2, 64)
    step = qat.first_steps(zeros, 4, 32)
    for values in (
        qat.fake_quantize(zeros),
        qat.ternary(zeros),
        qat.ternary_tensor(zeros).dequantize(),
        qat.learned_step(zeros, step),
    ):
        assert torch.equal(values, zeros)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: qat.fake_quantize(WEIGHT, 4, 48), "group_size 48 does not divide in_features 256"),
        (lambda: qat.fake_quantize(WEIGHT * math.inf), "not finite"),
        (lambda: qat.learned_step(WEIGHT, torch.ones(64, 3)), "step has shape"),
        (lambda: qat.learned_step(WEIGHT, torch.ones(32, 4)), "step has shape"),
        (lambda: qat.learned_step(WEIGHT, -torch.ones(64, 4)), "step holds 256 values that are not finite numbers above 0"),
        (lambda: qat.soft_round(WEIGHT, 0), "sharpness is 0"),
        (lambda: qat.ternary(WEIGHT, 48), "group_size 48 does not divide in_features 256"),
        (lambda: qat.ternary(WEIGHT[0]), "weight has shape"),
    ],
)
def test_bad_input_is_named(work, message):
    with pytest.raises(ValueError, match=message):
        work()
