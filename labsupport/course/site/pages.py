"""The pages that are no notebooks: README.md and the other documents of the repository, the claims, the shootout, the planner."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from labsupport.course import badges, build
from labsupport.course.site import lesson, tables
from labsupport.course.site.lesson import Lesson, SiteError
from labsupport.evidence import claims, sweep
from labsupport.evidence.audit import page as audit

SHOOTOUT = "14_shootout"
DOCUMENTS = {"INSTRUCTORS.md": "instructors", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
# A code block, a link or image, a span of code: only the middle one is looked at.
LINK = re.compile(r"^(`{3,}).*?^\1|(!?)\[((?:`[^`]*`|[^\[\]`])*)\]\(([^)\s]+)\)|`[^`\n]*`", re.MULTILINE | re.DOTALL)
HERE = (
    "Here you can read all of it: [the notebooks](#the-course) with what they print and draw, each solution behind a click; "
    "[what became of the claims](/claims.md) that people make about quantization; [all methods compared](/shootout.md); and "
    "[a planner](/planner.md) that says what your model takes on your card, and which method to use."
)


@dataclass(frozen=True)
class Links:
    """Where links of a document of the repository lead on the site.

    pages: the page of each document, by its path in the repository, without a suffix. repository: its public address, or "".
    sections: for a link inside README.md, the page that a heading ended up on.
    """

    pages: Mapping[str, str]
    repository: str
    sections: Mapping[str, str]

    def rewritten(self, markdown: str, document: str, page: str, linked: Callable[[str], str]) -> str:
        """The Markdown of `document` for `page`. linked(path) takes a picture of the repository in, and returns its name there.

        What is in the repository and has no page is a link to the repository, or plain text where it has no address.
        """

        def to(target: str) -> str:
            return posixpath.relpath(target, posixpath.dirname(page) or ".") + ".md"

        def change(found: re.Match[str]) -> str:
            _, image, text, target = found.groups()
            if target is None or re.match(r"https?:|mailto:|/", target):  # elsewhere, or a page of the site by its name
                return found[0]
            path, _, anchor = target.partition("#")
            if not path:
                other = self.sections.get(anchor, page) if document == "README.md" else page
                return f"[{text}](#{anchor})" if other == page else f"[{text}]({to(other)}#{anchor})"
            path = posixpath.normpath(posixpath.join(posixpath.dirname(document), path))
            if image:
                return f"![{text}]({linked(path)})"
            if path in self.pages:
                return f"[{text}]({to(self.pages[path])}{'#' + anchor if anchor else ''})"
            return f"[{text}]({self.repository}/blob/{badges.TAG}/{path})" if self.repository else text

        return LINK.sub(change, markdown)


def readme_parts(text: str) -> dict[str, str]:
    """README.md cut into three pages: "index", what comes before the commands; "commands"; "about", what comes after.

    Raises SiteError where a heading at which it is cut is not there.
    """
    before, commands, rest = _cut(text, "## Commands", "## Teaching with it")
    before = re.sub(r"<!-- badges -->.*?<!-- /badges -->\n*", "", before, flags=re.DOTALL)
    title, _, after = before.partition("\n\n```")
    table = re.compile(r"^\| (\d\d) \| (\w+) \|", re.MULTILINE)
    index = table.sub(r"| \1 | [\2](notebooks/\1_\2.ipynb) |", f"{title}\n\n{HERE}\n\n```{after}")
    commands = re.sub(r"^#(#+ )", r"\1", commands, flags=re.MULTILINE)
    return {"index": index, "commands": commands, "about": f"# About the repository\n\n{rest}"}


def _cut(text: str, *headings: str) -> Iterable[str]:
    for heading in headings:
        before, found, after = text.partition(f"\n{heading}\n")
        if not found:
            raise SiteError(f"README.md has no heading {heading!r}, at which the site begins another page")
        yield before
        text = f"{heading}\n{after}"
    yield text


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def headings(markdown: str) -> list[str]:
    """Anchors of all headings."""
    prose = re.sub(r"^(`{3,}).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return [slug(line.lstrip("# ")) for line in prose.split("\n") if re.match(r"#+ ", line)]


def index(markdown: str, notebooks: Iterable[str], documents: Iterable[str]) -> str:
    """The front page with what stands in the sidebar."""
    parts = {
        "The course": [f"notebooks/{name}" for name in notebooks],
        "Results": ["planner", "shootout", "claims"],
        "Working with it": ["commands", *documents, "about"],
    }
    trees = ("\n".join(("```{toctree}", ":hidden:", f":caption: {title}", "", *names, "```")) for title, names in parts.items())
    return "\n\n".join((markdown, *trees)) + "\n"


def opened(markdown: str, repository: str, name: str) -> str:
    """A notebook's page with a line under its title that says where else it can be read and run."""
    title, rest = markdown.split("\n", 1)
    here = f"`notebooks/{name}.ipynb`"
    if not repository:
        return f"{title}\n\n*The notebook is {here} of the repository; `labs lab` opens your copy of it.*\n{rest}"
    colab, binder = badges.opened(repository, f"{name}.ipynb")
    source = f"{repository}/blob/{badges.TAG}/notebooks/{name}.ipynb"
    return f"{title}\n\n*Open it in [Colab]({colab}) or [Binder]({binder}), or look at [{here}]({source}).*\n{rest}"


def claims_page() -> str:
    """data/claims.md, with what its filter by verdict needs."""
    verdicts = [verdict for verdict in claims.VERDICTS.values() if any(c.verdict == verdict for c in claims.claims().values())]
    intro, table = audit.markdown(claims.claims()).split("\n\n| |", 1)
    here = f'<div id="verdicts" data-verdicts="{", ".join(verdicts)}"></div>\n<script src="_static/claims.js" defer></script>'
    return f"{intro}\n\n{here}\n\n| |{table}"


def planner_page() -> tuple[str, str]:
    """Its Markdown, and the script with its tables."""
    form = (resources.files(__package__) / "planner.html").read_text("utf-8")
    text = (
        "# Planner\n\nWhat a model takes on a card, how fast it could be at best, and which method to use, with the reason and the "
        "evidence. It is `labs plan`, calculated in this page: nothing that you type leaves it.\n\n"
        f"{form}\n\n"
        "[Notebook 15](notebooks/15_choose_and_ship.ipynb) builds this arithmetic. `labs plan --finetune` plans QLoRA, and "
        "`labs plan --check` sets published sizes and speeds beside those computed."
    )
    return text, f"const TABLES = {json.dumps(tables.planner_tables(), ensure_ascii=False, indent=1)};\n"


def shootout_page(root: Path) -> Lesson:
    """The figures of notebook 14 as they are stored, and every row that was measured of models as they were trained."""
    notebook = build.read(root / "notebooks" / "solutions" / f"{SHOOTOUT}.ipynb")
    made = Lesson("")
    blocks = [
        "# All methods compared",
        f"Every method of the course on one axis: the bytes that are stored. [Notebook 14](notebooks/{SHOOTOUT}.ipynb) makes these "
        "figures, says what they leave open, and tells real differences from luck.",
    ]
    for heading, markdown, pictures in lesson.figures(notebook, SHOOTOUT):
        title = f"## {re.sub(r'^[0-9.]+ ', '', heading)}"
        blocks += [markdown] if title in blocks else [title, markdown]
        made.pictures.update(pictures)
    for model, title in ((None, "the course model"), ("smollm2", "SmolLM2-135M")):
        measured = sweep.load("shootout", model)
        about = measured.about
        blocks += [
            f"## Every row: {title}",
            f"Sorted by bytes of the whole model. {about['windows']} windows of {about['length']} tokens of {about['text']}; "
            f"perplexity in float {measured.baseline:.2f}; a change has its interval of 95 %, paired over documents.",
            _table(measured.rows),
        ]
    made.markdown = "\n\n".join(blocks).replace("../pictures", "pictures") + "\n"
    return made


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = ["| method | bits a weight | MB | perplexity | change |", "|---|--:|--:|--:|--:|"]
    for row in sorted((row for row in rows if row["planted"] is None), key=lambda row: row["nbytes"]):
        bits = f"{row['bits_per_weight']:.3f}" if row.get("bits_per_weight") is not None else ""
        change = f"{100 * row['change']:+.2f} % [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]"
        lines.append(f"| {named(row)} | {bits} | {row['nbytes'] / 1e6:,.2f} | {row['perplexity']:,.2f} | {change} |")
    return "\n".join(lines)


def named(row: Mapping[str, Any]) -> str:
    """The setting of a row of the shootout, in words."""
    names = {"rtn": "rounding", "nf4": "NF4", "gptq": "GPTQ", "awq": "AWQ", "int8": "LLM.int8()", "int8-weights": "int8 weights"}
    words = ["GPTQ on AWQ's scales" if row.get("base") else names.get(row["method"], row["method"])]
    if "bits" in row:
        words.append(f"{row['bits']} bits")
    if "group_size" in row:
        words.append("by row" if row["group_size"] == "row" else f"groups of {row['group_size']}")
    if "block_size" in row:
        words.append(f"blocks of {row['block_size']}, {row['absmax']} absmax")
    words += [word for key, word in (("act_order", "act-order"), ("symmetric", "symmetric")) if row.get(key)]
    words += ["by who listens"] if row.get("token_weights") else []
    words += [f"{key} {row[key]:g}" for key in ("threshold",) if key in row]
    words += [f"embedding in {row['embedding']} bits"] if "embedding" in row else []
    return ", ".join(words)
