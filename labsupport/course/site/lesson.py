"""A notebook as a page: Markdown for MyST with its stored outputs, every solution behind a click, and its pictures as files."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nbformat import NotebookNode

from labsupport.course.build import STUB
from labsupport.course.execute import WIDGET_TEXT

FENCE = "`" * 4  # longer than any inside a docstring


class SiteError(ValueError):
    """The site cannot be made. One line that says why."""


@dataclass
class Lesson:
    """The Markdown of a page, and its pictures: PNG by the name that the Markdown has for them, below `pictures/`."""

    markdown: str
    pictures: dict[str, bytes] = field(default_factory=dict)


def lesson(source: NotebookNode, learner: NotebookNode, name: str) -> Lesson:
    """source, learner: the two forms of one notebook, `name` their file without .ipynb.

    Raises SiteError where the learner's form lacks a cell, or where an output is of no kind that a page can show.
    """
    blank = {cell.id: cell.source for cell in learner.cells}
    if missing := [cell.id for cell in source.cells if cell.id not in blank]:
        raise SiteError(f"{name}: the learner's form has no cell {missing[0]}; run `labs build {name[:2]}`")
    made = Lesson("")
    blocks = [block for cell in source.cells for block in _cell(cell, blank[cell.id], name, made.pictures)]
    made.markdown = in_order("\n\n".join(blocks)) + "\n"
    return made


def in_order(markdown: str) -> str:
    """The same with no level of headings left out: "Predict" may stand before the first section, as small as later."""
    level = 0

    def one(found: re.Match[str]) -> str:
        nonlocal level
        if found["level"] is None:
            return found[0]  # a block of code, where # begins a comment, or what was printed
        level = min(len(found["level"]), level + 1)
        return "#" * level + " "

    return re.sub(
        r"^(?P<fence>`{3,}).*?^(?P=fence)`*$|^<pre.*?</pre>|^(?P<level>#+) ", one, markdown, flags=re.MULTILINE | re.DOTALL
    )


def figures(source: NotebookNode, name: str) -> Iterator[tuple[str, str, dict[str, bytes]]]:
    """Each figure of a notebook: the heading that it stands under, its Markdown, its pictures."""
    heading = ""
    for cell in source.cells:
        if cell.cell_type == "markdown":
            heading = next((line.lstrip("# ") for line in cell.source.split("\n") if line.startswith("## ")), heading)
            continue
        for number, output in enumerate(cell.outputs):
            if "image/png" in output.get("data", {}):
                pictures: dict[str, bytes] = {}
                yield heading, _output(output, f"{name}-{cell.id}-{number}", pictures), pictures


def _cell(cell: NotebookNode, blank: str, name: str, pictures: dict[str, bytes]) -> Iterator[str]:
    graded = cell.metadata.get("nbgrader", {})
    if cell.cell_type == "markdown":
        yield _hidden(cell.source) if graded.get("solution") else cell.source
        return
    yield code(blank)  # of a check, the line that a learner sees and not the hidden test
    if STUB in blank:
        yield _hidden(code(re.sub(r"^ *### (BEGIN|END) SOLUTION\n?", "", cell.source, flags=re.MULTILINE).rstrip()))
    for number, output in enumerate(cell.outputs):
        points = graded.get("grade") and output.output_type == "execute_result"  # what the hidden test returned
        if not points and output.get("data", {}).get("text/plain") != WIDGET_TEXT:
            yield _output(output, f"{name}-{cell.id}-{number}", pictures)


def code(text: str, language: str = "python") -> str:
    return f"{FENCE}{language}\n{text}\n{FENCE}"


def _hidden(markdown: str) -> str:
    return f'<details class="solution"><summary>Show the solution</summary>\n\n{markdown}\n\n</details>'


def _output(output: NotebookNode, name: str, pictures: dict[str, bytes]) -> str:
    data: Mapping[str, str] = output.get("data", {})
    if output.output_type == "stream" and output.name == "stdout":
        return _printed(output.text)
    if "image/png" in data:
        about = output.metadata.get("image/png", {})
        pictures[f"{name}.png"] = base64.b64decode(data["image/png"])
        return picture(f"{name}.png", data["text/plain"].removeprefix("Figure: "), about.get("width"), about.get("height"))
    if "text/html" in data:
        return f'<div class="scrolls">{_plain_table(data["text/html"])}</div>'
    if set(data) == {"text/plain"}:
        return _printed(data["text/plain"])
    raise SiteError(f"{name}: an output of {output.output_type} {', '.join(data)} has no form on a page")


def _printed(text: str) -> str:
    return f'<pre class="printed">{html.escape(text.rstrip())}</pre>'


def _plain_table(table: str) -> str:
    """A table whose looks are the page's: a blank line would end the HTML in Markdown."""
    return re.sub(r"\n\s*\n", "\n", table)


def picture(name: str, alt: str, width: int | None, height: int | None) -> str:
    """With its size, so that a page does not jump while it loads."""
    size = f' width="{width}" height="{height}"' if width and height else ""
    return f'<img class="figure" src="../pictures/{name}" alt="{html.escape(alt)}"{size} loading="lazy">'
