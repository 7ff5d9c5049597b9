"""All that is looked at in one notebook, and the row that is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from browser import accessibility, controls
from browser.notebook import DARK, LIGHT, WINDOW, Opened, faults, in_theme, opened, picture, run_all
from browser.server import Server
from playwright.sync_api import Browser
from playwright.sync_api import Error as PlaywrightError

THEMES = {"light": LIGHT, "dark": DARK}
TABLE = ".jp-OutputArea-output table"


@dataclass
class Seen:
    """What one notebook was found to be. row: for the file of measurements. faults: a sentence each; empty where all is well."""

    row: dict[str, Any]
    faults: list[str] = field(default_factory=list)


def at(
    browser: Browser, server: Server, name: str, out: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> Seen:
    """Run a notebook and look at it in both themes; pictures of it go to `out`. say: what is going on, for whoever waits."""
    seen = Seen({"notebook": name})
    context = browser.new_context(viewport=WINDOW, reduced_motion="reduce")
    try:
        say("opening")
        notebook = opened(context, server, name)
        _at(notebook, seen, out and out / name.removesuffix(".ipynb"), say)
    except (TimeoutError, PlaywrightError) as error:  # the others are looked at all the same
        seen.faults.append(f"stopped: {error}")
    finally:
        context.close()
        server.stop_kernels()
    return seen


def _at(notebook: Opened, seen: Seen, out: Path | None, say: Callable[[str], None]) -> None:
    say("running")
    seen.row["seconds"] = round(run_all(notebook), 1)
    seen.row["cells"] = notebook.code_cells.count()
    seen.faults += faults(notebook)
    headings, pictures = accessibility.headings(notebook), accessibility.pictures(notebook)
    seen.faults += accessibility.heading_faults(headings)
    seen.faults += accessibility.picture_faults(pictures)
    boxes = controls.widgets(notebook)
    found = [len(controls.controls(notebook, box)) for box in boxes]
    seen.row |= {"headings": len(headings), "pictures": len(pictures), "widgets": len(boxes), "controls": sum(found)}
    for number, box in enumerate(boxes):
        say(f"moving {found[number]} controls, {2 * found[number]} moves")
        seen.faults += controls.faults(notebook, box)
    counted = {}
    for theme, name in THEMES.items():
        say(f"looking at it in the {theme} theme")
        in_theme(notebook, name)
        violations = accessibility.violations(notebook)
        worse = list(accessibility.violation_faults(violations, theme))
        seen.faults += worse
        counted[theme] = len(worse)
        if out:
            _pictures(notebook, out, theme)
    seen.row |= {"violations": counted}
    in_theme(notebook, LIGHT)
    seen.faults += notebook.complaints


def _pictures(notebook: Opened, out: Path, theme: str) -> None:
    """The top, each widget, each table and each figure."""
    notebook.panel.locator(".jp-Cell").first.scroll_into_view_if_needed()
    picture(notebook, None, out / f"{theme}-top.png")
    for kind, found in (
        ("widget", controls.widgets(notebook)),
        ("table", notebook.panel.locator(TABLE).all()),
        ("figure", notebook.panel.locator(".jp-OutputArea-output.jp-RenderedHTMLCommon > img").all()),
    ):
        for number, place in enumerate(found):
            picture(notebook, place, out / f"{theme}-{kind}-{number}.png")
