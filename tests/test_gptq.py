"""GPTQ: the fast solver against algorithm 1 in float64, both against OBQ and rounding. Against AutoGPTQ: test_interop_golden.py."""

import math

import pytest
import torch

from labsupport.quant import gptq, gptq_fast, grid, obq, products, rtn
from labsupport.quant.gptq_grids import GridRule, Grids


def correlated(rows, columns, seed=0, tokens=None):
    """A weight, and the Hessian of inputs that share directions and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * columns, columns, generator=generator)
    x = x @ torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.3 * torch.randn(x.shape, generator=generator)
    x = x * torch.exp(0.5 * torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), x.T @ x * (2 / len(x))


def by_algorithm_1(weight, hessian, bits, group_size, block_size, symmetric=False, damping=0.01):
    """Codes and scales by the readable form in float64; scales in float32."""
    rows, columns = weight.shape
    grids = Grids(GridRule(bits, symmetric, False, torch.float32, False), group_size, torch.arange(columns) // group_size, rows)
    hessian = hessian.double()
    factor = gptq.autogptq_factor(hessian.diagonal_scatter(gptq.damped(hessian.diagonal(), damping)))
    codes = gptq.algorithm_1(weight.double(), factor, grids, block_size)
    return codes, grids.scale.t()


def share_equal(a, b):
    return (a.double() == b.double()).double().mean().item()


@pytest.mark.parametrize("rho", [0.9, -0.6])
def test_two_columns_by_hand(rho):
    """Once w_1 has become q_1, the loss a e1^2 + 2 b e1 e2 + c e2^2 is least at e2 = -b e1 / c."""
    a, c = 2.0, 0.5
    b = rho * math.sqrt(a * c)
    weight = torch.tensor([[0.37, -0.81]])
    q = gptq.quantize(weight, torch.tensor([[a, b], [b, c]]), 3, None, damping=0.0, scale_dtype=torch.float32)
    scale, zero = q.scale.item(), q.zero_point.item()
    first = min(max(round(0.37 / scale) + zero, 0), 7) - zero
    target = -0.81 - b / c * (first * scale - 0.37)
    second = min(max(round(target / scale) + zero, 0), 7) - zero
    assert torch.allclose(q.dequantize(), torch.tensor([[first * scale, second * scale]]), rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, None])
def test_obq_in_column_order_gives_the_same_codes(bits, symmetric, group_size):
    weight, hessian = correlated(6, 48)
    slow = obq.quantize(weight, hessian, bits, group_size, symmetric)
    fast = gptq.quantize(weight, hessian, bits, group_size, symmetric, static_groups=True)
    assert torch.equal(slow.scale, fast.scale)
    assert torch.equal(slow.zero_point, fast.zero_point)
    assert torch.equal(slow.codes, fast.codes)


def test_greedy_obq_takes_the_cheapest_weight_next():
    """Restated without an inverse that shrinks: at every step that of what is left of H is computed anew."""
    weight, hessian = correlated(5, 24)
    greedy = obq.quantize(weight, hessian, 3, None, greedy=True, damping=0.0, scale_dtype=torch.float32)
    for row, (scale, zero) in enumerate(zip(greedy.scale[:, 0].double(), greedy.zero_point[:, 0].double(), strict=True)):
        w, left = weight[row].double(), torch.arange(24)
        while len(left):
            inverse = torch.linalg.inv(hessian.double()[left][:, left])
            codes = (torch.round(w[left] / scale) + zero).clamp(0, 7)
            error = w[left] - (codes - zero) * scale
            place = (error**2 / inverse.diagonal()).argmin()
            assert greedy.codes[row, left[place]] == codes[place]
            w[left] -= error[place] / inverse[place, place] * inverse[place]
            left = torch.cat([left[:place], left[place + 1 :]])
    assert not torch.equal(greedy.codes, obq.quantize(weight, hessian, 3, None, damping=0.0).codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"static_groups": True}, {"act_order": True, "static_groups": True}, {"stale_grids": True}]
)
def test_where_inputs_are_not_correlated_gptq_is_rounding(bits, symmetric, settings):
    torch.manual_seed(bits)
    weight, hessian = torch.randn(20, 192), torch.diag(torch.rand(192) + 0.1)
    q = gptq.quantize(weight, hessian, bits, 32, symmetric, **settings)
    nearest = rtn.quantize(weight, bits, 32, symmetric)
    assert torch.equal(q.codes, nearest.codes)
    assert torch.equal(q.scale, nearest.scale)
    assert torch.equal(q.dequantize(), nearest.dequantize())
    assert q.nbytes == nearest.nbytes


def test_weights_end_further_off_and_outputs_nearer():
    weight, hessian = correlated(64, 256)
    for bits in (2, 3, 4):
        values, nearest = (m.quantize(weight, *h, bits=bits).dequantize() for m, h in ((gptq, [hessian]), (rtn, [])))
        assert (values - weight).norm() > (nearest - weight).norm()
        assert gptq.output_error(weight, values, hessian) < 0.8 * gptq.output_error(weight, nearest, hessian)


@pytest.mark.parametrize("group_size", [1, 16, 48, 64, 96, 192, 384])
@pytest.mark.parametrize("block_size", [128, 100, 7])
def test_grids_are_taken_from_the_weights_as_they_are_when_a_group_is_reached(group_size, block_size):
    weight, hessian = correlated(24, 384)
    q = gptq.quantize(weight, hessian, 3, group_size, scale_dtype=torch.float32, block_size=block_size)
    codes, scale = by_algorithm_1(weight, hessian, 3, group_size, block_size=group_size)
    # Float32 against float64: a tie that falls the other way runs on along its row, so a row or two of 24 may part ways.
    assert share_equal(q.codes, codes) > 0.93
    same = (q.codes == codes).all(1)
    assert same.double().mean() > 0.9
    assert torch.allclose(q.scale[same], scale[same], rtol=1e-4)


@pytest.mark.parametrize("group_size", [16, 48, 128, 192])
def test_stale_grids_are_taken_from_the_weights_as_they_were_when_the_block_began(group_size):
    weight, hessian = correlated(24, 384)
    q = gptq.quantize(weight, hessian, 3, group_size, scale_dtype=torch.float32, stale_grids=True)
    codes, scale = by_algorithm_1(weight, hessian, 3, group_size, block_size=128)
    same = (q.codes == codes).all(1)
    assert same.double().mean() > 0.9
    assert torch.allclose(q.scale[same], scale[same], rtol=1e-4)
    fresh = gptq.quantize(weight, hessian, 3, group_size, scale_dtype=torch.float32)
    # Where a group is a whole block there is nothing to be stale.
    agree = (q.codes == fresh.codes).all(1).double().mean()
    assert agree > 0.9 if group_size % 128 == 0 else agree < 0.5


@pytest.mark.parametrize("settings", [{}, {"act_order": True}, {"act_order": True, "static_groups": True}, {"mse": True}], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_fast_way_agrees_with_autogptqs(settings, bits):
    weight, hessian = correlated(256, 512)
    peer = gptq.quantize(weight, hessian, bits, 128, autogptq=True, **settings)
    fast = gptq.quantize(weight, hessian, bits, 128, stale_grids=True, scale_dtype=torch.float32, **settings)
    assert share_equal(fast.codes, peer.codes) >= 0.995
    a, b = (gptq.output_error(weight, q.dequantize(), hessian) for q in (fast, peer))
    assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.parametrize("group_size", [32, None])
def test_act_order_is_column_order_of_the_sorted_columns(group_size):
    weight, hessian = correlated(24, 96)
    order = hessian.diagonal().argsort(descending=True)
    inverse = order.argsort()
    q = gptq.quantize(weight, hessian, 3, group_size, act_order=True)
    of_sorted = gptq.quantize(weight[:, order], hessian[order][:, order], 3, group_size)
    assert torch.equal(q.codes, of_sorted.codes[:, inverse])
    assert torch.equal(q.dequantize(), of_sorted.dequantize()[:, inverse])
    if group_size is None:
        assert q.g_idx is None
    else:
        assert torch.equal(q.g_idx[order], torch.arange(96, dtype=torch.int32) // 32)
        assert q.nbytes == of_sorted.nbytes + 4 * 96  # where each column's group is has to be stored


def test_static_groups_stay_neighbors_under_act_order():
    weight, hessian = correlated(24, 96)
    q = gptq.quantize(weight, hessian, 4, 32, act_order=True, static_groups=True)
    nearest = rtn.quantize(weight, 4, 32)
    assert q.g_idx is None
    assert torch.equal(q.scale, nearest.scale)
    assert torch.equal(q.zero_point, nearest.zero_point)


def test_a_factor_on_the_hessian_changes_nothing():
    weight, hessian = correlated(24, 96)
    q = gptq.quantize(weight, hessian, 3, 32)
    assert torch.equal(q.codes, gptq.quantize(weight, 2**-20 * hessian, 3, 32).codes)


def test_inputs_are_not_changed_and_half_precision_is_read():
    weight, hessian = correlated(24, 96)
    hessian[:, 5] = hessian[5] = 0
    before = weight.clone(), hessian.clone()
    gptq.quantize(weight, hessian, 4, 32, act_order=True)
    obq.quantize(weight, hessian, 4, 32)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    half = weight.half()
    assert torch.equal(gptq.quantize(half, hessian, 4, 32).codes, gptq.quantize(half.float(), hessian, 4, 32).codes)


def test_columns_that_were_never_fed_become_zero_and_leave_no_trace():
    weight, hessian = correlated(24, 96)
    dead = torch.tensor([3, 40, 95])
    kept = torch.ones(96, dtype=torch.bool).index_fill(0, dead, False)
    hessian[dead], hessian[:, dead] = 0, 0
    weight[:, dead] = 100.0
    q = gptq.quantize(weight, hessian, 4, None)
    assert (q.dequantize()[:, dead] == 0).all()
    # The damping is a share of a mean, over 96 columns with a one for each dead one, so it is handed over.
    alone = hessian[kept][:, kept]
    damping = 0.01 * ((alone.diagonal().sum() + len(dead)) / 96 / alone.diagonal().mean()).item()
    assert torch.equal(q.codes[:, kept], gptq.quantize(weight[:, kept], alone, 4, None, damping=damping).codes)


@pytest.mark.parametrize("symmetric", [False, True])
def test_searched_grids_have_the_least_error_of_all_that_were_tried(symmetric):
    torch.manual_seed(0)
    weight = torch.randn(4, 2048)  # in 2 bits the best ranges are about half of the whole
    q = gptq.quantize(weight, torch.eye(2048), 2, None, symmetric, mse=True, scale_dtype=torch.float32)
    error = (q.dequantize() - weight).abs().pow(2.4).sum(1)
    best = torch.full((4,), math.inf)
    for shrink in range(80):
        share = 1 - shrink / 100
        low, high = share * weight.amin(1, keepdim=True), share * weight.amax(1, keepdim=True)
        scale, zero = grid.grids(low, high, 2, symmetric)
        values = grid.dequantize(grid.quantize(weight, scale, zero, 2), scale, zero)
        best = torch.minimum(best, (values - weight).abs().pow(2.4).sum(1))
    assert torch.allclose(error, best, rtol=1e-4)
    nearest = rtn.quantize(weight, 2, None, symmetric, torch.float32).dequantize()
    assert (error < (nearest - weight).abs().pow(2.4).sum(1)).all()


def test_autogptq_clips_symmetric_groups_without_a_negative_weight():
    torch.manual_seed(0)
    weight = torch.rand(8, 64) + 0.1
    theirs = gptq.quantize(weight, torch.eye(64), 4, None, symmetric=True, autogptq=True).dequantize()
    ours = gptq.quantize(weight, torch.eye(64), 4, None, symmetric=True).dequantize()
    largest = weight.amax(1)
    assert torch.allclose(theirs.amax(1), 7 / 15 * largest)
    # The grid ends half a step short of the largest weight; its scale is rounded to float16.
    assert ((ours.amax(1) / largest - 14 / 15).abs() < 2**-10).all()


@pytest.mark.parametrize("columns", [1, 2, 255, 600])
def test_factors(columns):
    _, hessian = correlated(1, columns)
    hessian.diagonal().add_(0.1 * hessian.diagonal().mean())
    order = torch.randperm(columns)
    root = gptq_fast.reverse_cholesky(hessian, hessian.diagonal()[order], order).tril().t().double()
    hessian = hessian[order][:, order]
    inverse = gptq.autogptq_factor(hessian).double()
    for upper in (root, inverse):
        assert torch.equal(upper, upper.triu())
        assert (upper.diagonal() > 0).all()
    # Float32 rounding, 6e-8, times what sums of 600 terms add; for what has been inverted, times the condition of H, some 1e3 here.
    assert torch.allclose(root @ root.T, hessian.double(), atol=1e-5 * hessian.diagonal().max().item())
    assert torch.allclose(inverse @ root, torch.eye(columns, dtype=torch.float64), atol=2e-3)
    assert gptq_fast.reverse_cholesky(hessian, -hessian.diagonal()) is None
    assert gptq.autogptq_factor(-hessian) is None


@pytest.mark.parametrize("without_onednn", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 0, 5), (33, 70, 129), (256, 512, 300)], ids=str)
def test_add_product(shape, without_onednn, monkeypatch):
    if without_onednn:
        monkeypatch.setattr(products, "_onednn", None)
    m, k, n = shape
    start, left, right = torch.randn(m, n), torch.randn(m, k), torch.randn(k, n)
    wanted = start.double() + left.double() @ right.double()
    # k products and k sums, each within half a unit in the last place of the terms' sum (Higham 2002, section 3.1).
    bound = (k + 1) * torch.finfo(torch.float32).eps / 2 * (start.abs() + left.abs() @ right.abs())
    wide = torch.randn(k, 2 * n)
    wide[:, ::2] = right
    for piece in (right, right.t().contiguous().t(), wide[:, ::2]):
        assert ((products.add_product(start, left, piece) - wanted).abs() <= bound + 1e-12).all()
    doubles = products.add_product(start.double(), left.double(), right.double())
    assert doubles.dtype == torch.float64
    assert torch.allclose(doubles, wanted, rtol=1e-12)


def test_damping_is_raised_until_the_hessian_can_be_factorized_and_no_further():
    weight, hessian = correlated(8, 64, tokens=4)
    assert gptq.quantize(weight, hessian, 4, 32).damping == 0.01
    # Of rank 4: without damping there is no inverse.
    q = gptq.quantize(weight, hessian, 4, 32, damping=0.0)
    assert q.damping == 0.001
    assert torch.equal(q.codes, gptq.quantize(weight, hessian, 4, 32, damping=0.001).codes)
    # As sums in half precision leave it: what should be 0 is a little below.
    negative = hessian - 5e-4 * hessian.diagonal().mean() * torch.eye(64)
    raised = gptq.quantize(weight, negative, 4, 32, damping=1e-4)
    assert raised.damping > 1e-4
    assert torch.equal(raised.codes, gptq.quantize(weight, negative, 4, 32, damping=raised.damping).codes)
    mirror = torch.full((64, 64), -1.0).fill_diagonal_(1.0)
    with pytest.raises(ValueError, match="hessian is not positive definite even with damping 10: it cannot be a sum of x x"):
        gptq.quantize(weight, mirror, 4, 32)


WEIGHT, HESSIAN = correlated(4, 32)


def changed(row, column, value):
    h = HESSIAN.clone()
    h[row, column] = value
    return h


@pytest.mark.parametrize(
    ("weight", "hessian", "settings", "error", "message"),
    [
        (WEIGHT, HESSIAN[:31], {}, ValueError, r"hessian has shape \[31, 32\], wanted \[32, 32\] for in_features 32"),
        (WEIGHT, HESSIAN[:16, :16], {}, ValueError, r"hessian has shape \[16, 16\], wanted \[32, 32\]"),
        (WEIGHT, HESSIAN[0], {}, ValueError, r"hessian has shape \[32\], wanted \[in_features, in_features\]"),
        (WEIGHT, HESSIAN.int(), {}, TypeError, "hessian is torch.int32"),
        (WEIGHT, None, {}, TypeError, "hessian is NoneType"),
        (WEIGHT, changed(2, 3, float("nan")), {}, ValueError, "hessian holds NaN: 1 of 1024 values"),
        (WEIGHT, changed(4, 4, float("inf")), {}, ValueError, "hessian holds infinity: 1 of 1024 values"),
        (WEIGHT, HESSIAN.triu(), {}, ValueError, "hessian is not symmetric: entries differ from their mirror image by up to"),
        (WEIGHT, HESSIAN.roll(1, 0), {}, ValueError, "hessian is not symmetric"),
        (WEIGHT, changed(5, 5, -1.0), {}, ValueError, "hessian has -1 on its diagonal, wanted sums of squares"),
        (WEIGHT, torch.zeros(32, 32), {}, ValueError, "hessian is zero: the layer never saw an input"),
        (WEIGHT, HESSIAN, {"group_size": 128}, ValueError, "group_size 128 does not divide in_features 32"),
        (WEIGHT, HESSIAN, {"bits": 9}, ValueError, "bits is 9, wanted a whole number from 2 to 8"),
        (WEIGHT, HESSIAN, {"damping": -0.1}, ValueError, "damping is -0.1, wanted a share of the mean diagonal"),
        (WEIGHT, HESSIAN, {"damping": float("nan")}, ValueError, "damping is nan"),
        (WEIGHT, HESSIAN, {"block_size": 0}, ValueError, "block_size is 0, wanted a positive whole number"),
        (WEIGHT.clone().fill_(float("nan")), HESSIAN, {}, ValueError, "weight holds NaN: 128 of 128 values"),
        (WEIGHT.int(), HESSIAN, {}, TypeError, "weight is torch.int32"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(weight, hessian, settings, error, message):
    with pytest.raises(error, match=message):
        gptq.quantize(weight, hessian, **({"group_size": None} | settings))


def test_bad_input_to_obq():
    with pytest.raises(ValueError, match=r"hessian has shape \[16, 16\], wanted \[32, 32\]"):
        obq.quantize(WEIGHT, HESSIAN[:16, :16], group_size=None)
    with pytest.raises(ValueError, match="hessian is not positive definite with damping 0"):
        obq.quantize(WEIGHT, torch.ones(32, 32), group_size=None, damping=0)
    with pytest.raises(ValueError, match="hessian holds NaN"):
        obq.quantize(WEIGHT, changed(1, 1, float("nan")), group_size=None)
