"""Formulas as MathML, which browsers draw themselves: no script, no font, no other host. A Sphinx extension."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

# How many parts these have: a browser draws nothing sensible where one is missing.
PARTS = {"mfrac": 2, "msub": 2, "msup": 2, "mover": 2, "munder": 2, "mroot": 2, "msubsup": 3, "munderover": 3}


def convert(formula: str, display: str = "inline") -> str:
    """MathML of a formula in LaTeX. display: "inline" or "block". Raises ValueError for what latex2mathml does not know."""
    from latex2mathml.converter import convert as to_mathml

    try:
        found = to_mathml(formula, display=display)
    except Exception as error:
        raise ValueError(f"the formula {formula!r} cannot be converted: {type(error).__name__} {error}") from error
    if unknown := re.search(r"\\[a-zA-Z]+", found):  # what it does not know it leaves as it is
        raise ValueError(f"the formula {formula!r} cannot be converted: {unknown[0]} is not known")
    for element in ElementTree.fromstring(found).iter():
        name = element.tag.rpartition("}")[2]
        if len(element) != PARTS.get(name, len(element)):
            raise ValueError(
                f"the formula {formula!r} cannot be converted: a {name} has {len(element)} parts, wanted {PARTS[name]}"
            )
    return found


def _inline(self: Any, node: Any) -> None:
    from docutils.nodes import SkipNode

    self.body.append(convert(node.astext()))
    raise SkipNode


def _block(self: Any, node: Any) -> None:
    from docutils.nodes import SkipNode

    self.body.append(f'<div class="formula">{convert(node.astext(), "block")}</div>\n')
    raise SkipNode


def setup(app: Any) -> dict[str, Any]:
    """For Sphinx: `html_math_renderer = "mathml"`."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
