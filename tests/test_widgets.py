"""Controls, without a browser: moving one changes the picture to what the figure function draws."""

import ipywidgets
import pytest
import torch

from labsupport import widgets
from labsupport.figures import groups

PNG = b"\x89PNG"


@pytest.fixture
def row():
    return torch.randn(256, generator=torch.Generator().manual_seed(0))


def parts(box):
    slider, picture = box.children
    assert isinstance(slider, ipywidgets.SelectionSlider)
    assert isinstance(picture, ipywidgets.Image)
    return slider, picture


def test_group_size_starts_with_the_figure_below_it(row):
    slider, picture = parts(widgets.group_size(row, bits=3, start=64))
    assert slider.value == 64
    assert bytes(picture.value) == groups.row_in_groups(row, 64, 3).png()


def test_moving_the_slider_redraws(row):
    slider, picture = parts(widgets.group_size(row, bits=3, start=64))
    first = bytes(picture.value)
    slider.value = 16
    assert bytes(picture.value).startswith(PNG)
    assert bytes(picture.value) != first
    assert bytes(picture.value) == groups.row_in_groups(row, 16, 3).png()
    slider.value = 64
    assert bytes(picture.value) == first


def test_sizes_that_do_not_divide_the_row_are_left_out():
    slider, _ = parts(widgets.group_size(torch.randn(96), start=32))
    assert tuple(slider.options) == (8, 16, 32)


def test_start_must_fit():
    with pytest.raises(ValueError, match="start is 64"):
        widgets.group_size(torch.randn(96), start=64)


def test_the_row_is_left_alone(row):
    before = row.clone()
    slider, _ = parts(widgets.group_size(row))
    slider.value = 8
    assert torch.equal(row, before)
