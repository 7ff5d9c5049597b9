"""What a reader who does not see the page, or sees little, gets of a notebook's own content.

Looked at is what the course makes: rendered prose, and what cells show. JupyterLab's menus, editors and side bars are not ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from axe_playwright_python.sync_playwright import Axe
from browser.notebook import Opened

PANEL = ".jp-NotebookPanel:not(.lm-mod-hidden)"
OURS = (f"{PANEL} .jp-RenderedMarkdown", f"{PANEL} .jp-OutputArea-output")
SERIOUS = ("serious", "critical")
STAND_INS = ("", "Image", "No description has been provided for this image")  # JupyterLab's own, where there are no words
SHOWN = 3  # of the places where a rule is broken


def headings(notebook: Opened) -> list[tuple[int, str]]:
    """Level and words of each heading on the page, in order."""
    found = notebook.panel.locator(":is(.jp-RenderedMarkdown, .jp-OutputArea-output) :is(h1, h2, h3, h4, h5, h6)")
    return found.evaluate_all("all => all.map(h => [Number(h.tagName[1]), h.textContent.replace('¶', '').trim()])")


def heading_faults(found: list[tuple[int, str]]) -> Iterator[str]:
    """One heading of level 1, the first; none goes down more than one level at once."""
    titles = [words for level, words in found if level == 1]
    if len(titles) != 1 or found[0][0] != 1:
        yield f"headings of level 1: {titles}, wanted one, before all others"
    for (above, _), (level, words) in pairwise(found):
        if level > above + 1:
            yield f"heading {words!r} of level {level} comes after one of level {above}"


def pictures(notebook: Opened) -> list[str | None]:
    """The alternative text of each picture on the page, None for one that has none."""
    found = notebook.panel.locator(":is(.jp-RenderedMarkdown, .jp-OutputArea-output) :is(img, svg, canvas)")
    return found.evaluate_all("all => all.map(i => i.getAttribute('alt') ?? i.getAttribute('aria-label'))")


def picture_faults(found: list[str | None]) -> Iterator[str]:
    for place, words in enumerate(found):
        if (words or "").strip() in STAND_INS:
            yield f"picture {place} of {len(found)} has no alternative text"


def violations(notebook: Opened) -> list[dict[str, Any]]:
    """What axe finds in our content, each with its rule, impact and places, in the theme that the page is in."""
    return Axe().run(notebook.page, {"include": list(OURS)}).response["violations"]


def violation_faults(found: list[dict[str, Any]], theme: str) -> Iterator[str]:
    """Those that are serious or worse."""
    for broken in found:
        if broken["impact"] in SERIOUS:
            places = "; ".join(node["html"][:120] for node in broken["nodes"][:SHOWN])
            reason = broken["nodes"][0]["failureSummary"].replace("\n", " ")[:200]
            yield f"{theme}: {broken['id']} ({broken['impact']}), {len(broken['nodes'])} places: {places}. {reason}"
