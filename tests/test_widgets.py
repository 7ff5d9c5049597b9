"""Controls: moving one changes the picture to what the figure function draws. tests/browser moves them in a real browser."""

from xml.etree import ElementTree

import ipywidgets
import pytest
import torch

from labsupport.evidence import tables
from labsupport.figures import groups, levels, planning, widgets

pytestmark = pytest.mark.slow


@pytest.fixture
def row():
    return torch.randn(256, generator=torch.Generator().manual_seed(0))


def parts(box):
    menu, picture = box.children
    assert isinstance(menu, ipywidgets.Dropdown)
    assert isinstance(picture, ipywidgets.HTML)
    return menu, picture


def test_group_size_starts_with_the_figure_below_it(row):
    menu, picture = parts(widgets.group_size(row, bits=3, start=64))
    assert menu.value == 64
    assert picture.value == groups.row_in_groups(row, 64, 3).html()


def test_another_size_redraws(row):
    menu, picture = parts(widgets.group_size(row, bits=3, start=64))
    first = picture.value
    menu.value = 16
    assert picture.value.startswith('<img alt="')
    assert picture.value != first
    assert picture.value == groups.row_in_groups(row, 16, 3).html()
    menu.value = 64
    assert picture.value == first


def test_sizes_that_do_not_divide_the_row_are_left_out():
    menu, _ = parts(widgets.group_size(torch.randn(96), start=32))
    assert tuple(menu.options) == (8, 16, 32)


def test_start_must_fit():
    with pytest.raises(ValueError, match="start is 64"):
        widgets.group_size(torch.randn(96), start=64)


def test_the_row_is_left_alone(row):
    before = row.clone()
    menu, _ = parts(widgets.group_size(row))
    menu.value = 8
    assert torch.equal(row, before)


@pytest.fixture
def values():
    return torch.rand(512, generator=torch.Generator().manual_seed(0)) * 2 - 1


PRESETS = {"even": torch.linspace(-1, 1, 16), "middle": torch.linspace(-0.5, 0.5, 16)}


def test_levels_start_with_the_figure_below_them(values):
    buttons, fields, picture = widgets.levels(values, PRESETS).children
    assert [button.description for button in buttons.children] == ["even", "middle"]
    assert len(fields.children) == 16
    assert picture.value == levels.on_values(values, PRESETS["even"], "even").html()


def test_dragging_a_level_redraws_with_it(values):
    _, fields, picture = widgets.levels(values, PRESETS).children
    fields.children[3].value = 0.25
    moved = PRESETS["even"].clone()
    moved[3] = 0.25
    assert picture.value == levels.on_values(values, moved, "your levels").html()


def test_a_preset_moves_all_levels_and_comes_back(values):
    buttons, fields, picture = widgets.levels(values, PRESETS).children
    first = picture.value
    buttons.children[1].click()
    assert torch.equal(torch.tensor([field.value for field in fields.children]), PRESETS["middle"])
    assert all(len(str(field.value)) <= 12 for field in fields.children)  # a field shows every digit, so it holds few
    assert picture.value == levels.on_values(values, PRESETS["middle"], "middle").html()
    fields.children[0].value = -1.0
    buttons.children[0].click()
    assert picture.value == first


@pytest.mark.parametrize("presets", [{}, {"one": torch.zeros(16), "other": torch.zeros(8)}])
def test_presets_must_be_of_one_length(values, presets):
    with pytest.raises(ValueError, match="presets hold"):
        widgets.levels(values, presets)


def leaves(box):
    return [leaf for child in box.children for leaf in (leaves(child) if isinstance(child, ipywidgets.Box) else [child])]


def test_every_control_can_be_named_by_a_screen_reader(row, values):
    for box in (widgets.group_size(row), widgets.levels(values, PRESETS), widgets.planner()):
        *controls, picture = leaves(box)
        assert {type(control) for control in controls} <= {ipywidgets.Dropdown, ipywidgets.BoundedFloatText, ipywidgets.Button}
        names = [control.description for control in controls]
        assert all(names)
        assert len(set(names)) == len(names)
        assert isinstance(picture, ipywidgets.HTML)
        assert len(ElementTree.fromstring(picture.value.removesuffix(">") + "/>").get("alt").split()) >= 6


def test_the_planner_starts_with_its_figure_and_redraws():
    box = widgets.planner("Llama-2-7B", "T4", "w4a16-g128", 2048, 2)
    picture = box.children[-1]
    controls = {control.description: control for row in box.children[:-1] for control in row.children}
    shape, card = tables.architectures()["Llama-2-7B"].shape, tables.cards()["T4"]
    first = planning.bytes_on_card(widgets.compared(shape, card, 2048, 2, "w4a16-g128"))
    assert picture.value == first.html()
    assert "does not fit" in first.alt  # in 16 bits
    controls["cache"].value = "fp8"
    controls["users"].value = 16
    assert picture.value == planning.bytes_on_card(widgets.compared(shape, card, 2048, 16, "w4a16-g128", "fp8")).html()


def test_the_planner_starts_with_what_there_is():
    with pytest.raises(ValueError, match="users is 3, wanted one of 1, 2, 4"):
        widgets.planner(users=3)
    with pytest.raises(ValueError, match="of several models, cards"):
        planning.bytes_on_card([])
