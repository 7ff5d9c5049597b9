"""Outputs set beside each other: what is compared, and how a difference reads."""

import math

import pytest
import torch

from labsupport.exercises.compare import difference, first_difference, first_place, got_and_wanted, leaves, within

WANT = {"codes": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "name": "memory"}


def with_codes(*values):
    return WANT | {"codes": torch.tensor(values).view(2, 2)}


def test_the_largest_difference_and_its_limit():
    assert difference(with_codes(1.0, 2.5, 3.0, 4.25), WANT, {"codes": 0.5, "name": 0.0}) == (0.5, 0.5, True)
    assert difference(with_codes(1.0, 2.5, 3.0, 4.25), WANT, {"codes": 0.4, "name": 0.0}) == (0.5, 0.4, False)
    assert difference(WANT | {"name": "compute"}, WANT)[2] is False


def test_an_entry_whose_limit_is_infinite_is_not_compared():
    limits = {"codes": torch.tensor([[0.0, math.inf], [0.0, 0.0]]), "name": 0.0}
    assert difference(with_codes(1.0, 77.0, 3.0, 4.0), WANT, limits) == (0.0, 0.0, True)
    assert difference(with_codes(1.0, 77.0, 3.0, 5.0), WANT, limits)[2] is False
    assert first_difference(with_codes(1.0, 77.0, 3.0, 5.0), WANT, limits) == ("codes[1, 1]", 5.0, 4.0)


def test_other_forms_differ_and_nan_is_no_number():
    assert difference({"codes": torch.ones(4)}, {"codes": torch.ones(2, 2)})[2] is False
    assert difference({"codes": [1.0]}, {"codes": [1.0, 2.0]})[2] is False
    assert difference(with_codes(1.0, math.nan, 3.0, 4.0), WANT, 1e9)[2] is False


@pytest.mark.parametrize("limit", [0.0, 0.5, math.inf])
@pytest.mark.parametrize("value", [2.0, 2.5, 3.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("wanted", [2.0, math.nan, math.inf])
def test_within_is_what_difference_says(value, wanted, limit):
    have, want = with_codes(1.0, value, 3.0, 4.0), with_codes(1.0, wanted, 3.0, 4.0)
    same = value == wanted or (math.isnan(value) and math.isnan(wanted))
    fits = same or limit == math.inf or abs(value - wanted) <= limit
    assert within(have, want, limit) is difference(have, want, limit)[2] is fits
    assert within(have | {"name": "compute"}, want, limit) is (fits and limit == math.inf)
    assert not within({"codes": have["codes"]}, want, limit)


def test_the_first_place_is_of_the_first_output_that_differs():
    have = {"name": "compute", "codes": with_codes(1.0, 2.0, 3.5, 4.0)["codes"]}
    assert first_place(have, {name: WANT[name] for name in have}) == ("name", (), "compute", "memory")
    assert first_place({"codes": have["codes"]}, {"codes": WANT["codes"]}) == ("codes", (1, 0), 3.5, 3.0)


def test_leaves_know_the_output_that_they_are_in():
    assert leaves({"a[0]": [1, {"b": (2, "c")}], "d": 3}) == [
        ("a[0]", "a[0][0]", 1), ("a[0]", "a[0][1]['b'][0]", 2), ("a[0]", "a[0][1]['b'][1]", "c"), ("d", "d", 3)
    ]  # fmt: skip


def test_there_is_no_first_difference_where_nothing_differs():
    with pytest.raises(ValueError, match="differ nowhere"):
        first_difference(WANT, WANT)


@pytest.mark.parametrize(
    ("have", "want", "text"),
    [
        (1.5, 2.25, "got 1.5, wanted 2.25"),
        (0.33333, 0.33334, "got 0.33333, wanted 0.33334"),
        (1.0, 1.0 + 2**-52, "got 1, wanted 1.0000000000000002"),
        (24545, 24544, "got 24545, wanted 24544"),
        (2**31, 2**31 - 1, "got 2147483648, wanted 2147483647"),
        (3.0, 4, "got 3, wanted 4"),
        (28224.61, 42088.4, "got 28224.6, wanted 42088.4"),
        (2.5e9, 3.25e9, "got 2.5e+09, wanted 3.25e+09"),
        ("memory", "compute", "got 'memory', wanted 'compute'"),
    ],
)
def test_got_and_wanted_never_read_the_same(have, want, text):
    assert got_and_wanted(have, want) == text
