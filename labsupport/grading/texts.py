"""Texts that come from outside, made harmless: in a spreadsheet, on a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from labsupport.grading.records import GradingError
from labsupport.install import get_extra

FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four: full width
LONGEST = 4000  # characters of a text on a page


def visible(text: str, longest: int = LONGEST) -> str:
    """Without what a page or terminal obeys or hides:

    control characters and changes of direction become escapes. Cut at `longest`.
    """
    cut = text[:longest]
    shown = "".join(
        char if char.isprintable() or char == "\n" else char.encode("unicode_escape").decode() for char in cut.replace("\r\n", "\n")
    )
    return shown + (f" ... ({len(text) - longest} more characters)" if len(text) > longest else "")


def cell(value: object) -> object:
    """A spreadsheet's cell. A text that would be taken for a formula gets an apostrophe in front; a number stays a number.

    Spaces in front do not help a formula: they are looked past.
    """
    if not isinstance(value, str):
        return value
    text = visible(value)
    return f"'{text}" if value.startswith(FORMULAS) or text.lstrip().startswith(FORMULAS) else text


def table(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV (RFC 4180), each cell made harmless."""
    stream = io.StringIO()
    csv.writer(stream).writerows([cell(value) for value in row] for row in rows)
    return stream.getvalue()


def page(template: str, **values: object) -> str:
    """A page from a template in templates/, with everything escaped that is not marked as a picture."""
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise GradingError(f"this needs Jinja2: {get_extra('teach')}") from None
    environment = Environment(
        loader=PackageLoader("labsupport.grading"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    return environment.get_template(template).render(**values)
