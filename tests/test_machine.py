"""What the machine module counts. Nothing here depends on how fast anything is: where time matters, the clock is made up."""

import time

import pytest
import torch

from labsupport.evidence import machine
from labsupport.model import memory


def test_describe_names_everything():
    found = machine.describe("cpu")
    assert found.device == "cpu"
    assert found.name
    assert found.cores >= 1
    assert found.memory == memory.here().total
    assert found.versions["torch"] == torch.__version__ or found.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert all(part in str(found) for part in (found.name, "GiB", found.versions["Python"]))


def test_a_package_that_is_missing_is_said_to_be():
    assert machine._version("surely-not-a-package") == "not installed"


def test_cache_is_the_largest_that_is_listed(tmp_path, monkeypatch):
    for i, size in enumerate(("48K", "1024K", "32M", "odd")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path)
    assert machine._cache() == 32 * 2**20


def test_cache_is_none_where_nothing_is_listed(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "nowhere")
    assert machine._cache() is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still unless told; returns the function that moves it."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_median_seconds_leaves_the_first_call_out_and_takes_the_median(clock):
    durations = iter([100.0, 1.0, 9.0, 2.0])
    assert machine.median_seconds(lambda: clock(next(durations)), "cpu", budget=10) == 2.0
    assert next(durations, None) is None, "wanted one call to warm up and three to measure"


def test_median_seconds_stops_when_its_budget_is_over(clock):
    calls = []
    machine.median_seconds(lambda: (calls.append(1), clock(0.125)), "cpu", budget=1.0)
    assert len(calls) == 1 + 8


def test_median_seconds_times_work_longer_than_its_budget_once(clock):
    calls = []
    assert machine.median_seconds(lambda: (calls.append(1), clock(7.0)), "cpu", budget=1.0) == 7.0
    assert len(calls) == 2


def test_median_seconds_stops_where_work_takes_no_time(clock):
    assert machine.median_seconds(lambda: None, "cpu") == 0


@pytest.fixture
def in_two_seconds(monkeypatch):
    def took(work, device=None, budget=0.5):
        work()
        return 2.0

    monkeypatch.setattr(machine, "median_seconds", took)
    monkeypatch.setattr(machine, "_buffer_bytes", lambda device: 4000)


def test_copy_counts_bytes_read_and_written(in_two_seconds):
    assert machine.copy_bandwidth("cpu") == (4000 + 4000) / 2


def test_reading_counts_bytes_read(in_two_seconds):
    assert machine.read_bandwidth("cpu") == 4000 / 2


def test_a_multiplication_and_an_addition_are_two_operations(in_two_seconds):
    # Two seconds are long enough that no larger size is tried.
    assert machine.matmul_rate(torch.float32, "cpu") == 2 * machine.SQUARES[0] ** 3 / 2


def test_matmul_rate_is_the_best_of_the_sizes(monkeypatch):
    monkeypatch.setattr(machine, "SQUARES", (2, 4, 8))
    taken = iter([0.001, 0.002, 0.03])
    monkeypatch.setattr(machine, "median_seconds", lambda *_: next(taken))
    assert machine.matmul_rate(torch.float32, "cpu") == 2 * 4**3 / 0.002


def test_buffers_are_larger_than_the_cache_and_leave_room(monkeypatch):
    monkeypatch.setattr(machine, "_cache", lambda: 2**27)
    monkeypatch.setattr(memory, "here", lambda: memory.Memory(2**40, 2**40))
    assert machine._buffer_bytes(torch.device("cpu")) == 4 * 2**27
    monkeypatch.setattr(memory, "here", lambda: memory.Memory(2**40, 2**24))
    assert machine._buffer_bytes(torch.device("cpu")) == 2**20
