"""`make browser`'s own checks: a notebook that is well made passes them in a real browser, and each kind of fault is noticed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

pytest.importorskip("playwright", reason="Playwright is not installed")
pytest.importorskip("jupyterlab", reason="JupyterLab is not installed")

from browser import accessibility, controls, look
from browser.chromium import NoChromium, chromium
from browser.server import Server, jupyterlab
from playwright.sync_api import Browser

DOT = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PICTURE = f'import ipywidgets\npicture = \'<img alt="{{}}" src="data:image/png;base64,{DOT}#{{}}">\''
# A menu, a field and a button over a picture whose address says what was chosen: no figure, so no PyTorch in the kernel.
WIDGET = """
menu = ipywidgets.Dropdown(options=[1, 2, 3], description="size")
field = ipywidgets.BoundedFloatText(description="level", min=0, max=1, step=0.1)
button = ipywidgets.Button(description="back")
shown = ipywidgets.HTML(picture.format("a dot", "start"))
def redraw(change): shown.value = picture.format("a dot", f"{menu.value} {field.value}")
def back(button): menu.value, field.value = 1, 0; shown.value = picture.format("a dot", "back to the start")
for control in (menu, field): control.observe(redraw, names="value")
button.on_click(back)
ipywidgets.VBox([button, menu, field, shown])"""
GOOD = ["# Title", PICTURE, "## Section", WIDGET.strip()]
BAD = [
    "# Title",
    PICTURE,
    "### Too deep",
    "from IPython.display import HTML; HTML(picture.replace('alt=\"{}\"', '').format(1))",
    'HTML(\'<img alt="elsewhere" src="http://course.invalid/dot.png">\')',
    "ipywidgets.VBox([ipywidgets.FloatSlider(description='level'), ipywidgets.HTML(picture.format('a dot', 2))])",
    "ipywidgets.VBox([ipywidgets.Dropdown(options=[1, 2]), ipywidgets.HTML(picture.format('a dot', 3))])",
    "import sys; print('warned', file=sys.stderr)",
    "1 / 0",
    "print('not reached')",
]
NOTICED = [
    "code cell 5: stderr: warned",
    r"(?s)code cell 6: (error|stderr): .*ZeroDivisionError",
    r"code cell 7 did not run: \[ \]:",
    "heading 'Too deep' of level 3 comes after one of level 1",
    "picture 0 of 4 has no alternative text",
    "a widget has 2 controls of a kind that is not moved here",
    "a combobox named '' in a widget",
    "the picture does not answer to combobox '' by keyboard",
    "the picture does not answer to combobox '' by mouse",
    r"light: aria-input-field-name \(serious\)",
    r"dark: select-name \(critical\)",
    "asks another server: http://course.invalid/dot.png",
    "console: Failed to load resource",
]


def write(path: Path, sources: list[str]) -> None:
    cells = [new_markdown_cell(text) if text.startswith("#") else new_code_cell(text) for text in sources]
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Browser, Server]]:
    folder = tmp_path_factory.mktemp("notebooks")
    write(folder / "00_good.ipynb", GOOD)
    write(folder / "01_bad.ipynb", BAD)
    try:
        with chromium() as browser, jupyterlab(folder) as server:
            yield browser, server
    except NoChromium as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_good_notebook_has_no_fault(places: tuple[Browser, Server], tmp_path: Path) -> None:
    seen = look.at(*places, "00_good.ipynb", tmp_path)
    assert seen.faults == []
    assert {key: seen.row[key] for key in ("cells", "headings", "pictures", "widgets", "controls")} == {
        "cells": 2, "headings": 2, "pictures": 1, "widgets": 1, "controls": 3,
    }  # fmt: skip
    assert seen.row["violations"] == {"light": 0, "dark": 0}
    kept = {path.name for path in (tmp_path / "00_good").iterdir()}
    assert kept == {f"{theme}-{what}.png" for theme in ("light", "dark") for what in ("top", "widget-0")}


@pytest.mark.slow
def test_each_kind_of_fault_is_noticed(places: tuple[Browser, Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controls, "ANSWER_SECONDS", 1)
    faults = look.at(*places, "01_bad.ipynb").faults
    for pattern in NOTICED:
        assert any(re.search(pattern, fault) for fault in faults), (pattern, faults)


def test_headings_are_in_order() -> None:
    good = [(1, "Title"), (2, "a"), (3, "b"), (2, "c")]
    assert list(accessibility.heading_faults(good)) == []
    assert len(list(accessibility.heading_faults([*good, (1, "another title")]))) == 1
    assert len(list(accessibility.heading_faults([*good, (4, "deep")]))) == 1
    assert len(list(accessibility.heading_faults(good[1:]))) == 1
    assert len(list(accessibility.heading_faults([]))) == 1


def test_a_picture_without_words_is_noticed() -> None:
    assert len(list(accessibility.picture_faults(["a dot", None, "", " ", "Image"]))) == 4
