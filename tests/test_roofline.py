"""Rates on paper: the limits of a roofline, at both ends and where they meet."""

import pytest

from labsupport.evidence import planner, roofline
from labsupport.evidence.planner import LLAMA_7B
from labsupport.evidence.roofline import A100, GPUS


def test_intensity_of_extremes():
    assert roofline.intensity(1, 4096, 4096, 16) == pytest.approx(1, rel=1e-3)  # two operations for each two-byte weight
    assert roofline.intensity(1, 4096, 4096, 4) == pytest.approx(4, rel=1e-2)
    assert roofline.intensity(4096, 4096, 4096, 16) == pytest.approx(4096 / 3)


@pytest.mark.parametrize("device", GPUS, ids=lambda d: d.name)
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_crossover_is_the_first_batch_limited_by_operations(device, bits):
    batch = roofline.crossover_batch(device.bandwidth, device.rate, bits)
    weights = 10**9

    def memory_bound(n: int) -> bool:
        return weights * bits / 8 / device.bandwidth > 2 * weights * n / device.rate

    assert memory_bound(batch - 1)
    assert not memory_bound(batch)


def test_decode_rate_below_and_above_the_crossover():
    read, weights = planner.step_bytes(LLAMA_7B, 16), 6.6e9
    rate = [roofline.decode_rate(read, weights, n, A100.bandwidth, A100.rate) for n in (1, 2, 10**4, 10**5)]
    assert rate[0] == A100.bandwidth / read
    assert rate[1] == pytest.approx(2 * rate[0])
    assert rate[2] == pytest.approx(A100.rate / (2 * weights))
    assert rate[3] == pytest.approx(rate[2])


def test_matmul_seconds_is_the_longer_of_the_two():
    assert roofline.matmul_seconds(4096, 4096, 4096, 16, A100) == 2 * 4096**3 / A100.rate
    moved = 4096 * 4096 * 2 + 2 * (4096 + 4096)
    assert roofline.matmul_seconds(1, 4096, 4096, 16, A100) == pytest.approx(moved / A100.bandwidth)


def test_what_limits():
    assert roofline.what_limits(1, 80, 10, 100, 100) == "memory"
    assert roofline.what_limits(1, 10, 80, 100, 100) == "compute"
    assert roofline.what_limits(1, 30, 33, 100, 100) == "overhead"
    assert roofline.what_limits(1, 30, 34, 100, 100) == "compute"


def test_every_gpu_names_its_source_and_is_plausible():
    for device in GPUS:
        assert "NVIDIA" in device.source
        assert 100 < device.ridge < 400  # a misplaced power of ten, or a figure with sparsity, falls outside
        assert 100e9 < device.bandwidth < 10e12
