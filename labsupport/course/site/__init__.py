"""The course as pages: `labs site`.

Sphinx makes them, with MyST for Markdown and the theme furo: search, dark mode and a phone's layout come with these and work from
a folder without a server, where nbconvert would leave all three to us. Notebooks become Markdown here (lesson.py), not by MyST-NB,
which knows no solution behind a click, and no text in place of one picture among several.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from labsupport import __version__
from labsupport.course import badges
from labsupport.course import build as forms
from labsupport.course.site import lesson, pages
from labsupport.course.site.lesson import Lesson, SiteError
from labsupport.model import files

__all__ = ["MARK", "SiteError", "build", "check_place"]

TITLE = "Quantization from First Principles"
MARK = ".labs-site"  # a file in every site made here: what has it may be replaced


def check_place(out: Path) -> None:
    """Raises SiteError where `out` is something else than a site made here or nothing."""
    if out.is_dir() and not (out / MARK).is_file() and any(out.iterdir()):
        raise SiteError(f"--out is {out}, a folder that `labs site` did not make; it would be replaced: name another, or remove it")
    if out.exists() and not out.is_dir():
        raise SiteError(f"--out is {out}, which is a file, wanted a folder")


def build(
    root: Path, out: Path, numbers: list[str] | None = None, on_page: Callable[[int, int], None] = lambda done, of: None
) -> list[Path]:
    """Make the site of the repository `root` in `out`, whole or not at all. Returns its pages.

    numbers: of the notebooks; all by default. on_page(done, of) is called as pages are read and written.
    Raises SiteError, BuildError for a notebook that is none, and files.WriteError.
    """
    check_place(out)
    repository = badges.repository(root)
    with tempfile.TemporaryDirectory(prefix="labs-site-") as folder:
        written = Path(folder) / "source"
        count = _write_source(root, written, Path(folder) / "extra", forms.sources(root, numbers), repository)
        with files.replaced_directory(out) as new:
            _sphinx(Path(folder), new, repository, lambda done: on_page(done, 2 * count))
            _finish(new)
            (new / MARK).write_text(f"labs site {__version__}\n", "utf-8")
    return sorted(out.rglob("*.html"))


def _finish(site: Path) -> None:
    """What neither Sphinx nor furo has a setting for: a caption is no heading without a level, and the search has a title."""
    for path in site.rglob("*.html"):
        page = path.read_text("utf-8").replace('<p class="caption" role="heading">', '<p class="caption">')
        path.write_text(page.replace('<div id="search-results">', '<h1>Search</h1>\n<div id="search-results">'), "utf-8")
    (site / ".buildinfo").unlink(missing_ok=True)


def _write_source(root: Path, written: Path, extra: Path, notebooks: list[Path], repository: str) -> int:
    """The Markdown that Sphinx reads, and what goes beside its pages as it is. Returns the number of pages."""
    readme, *others = ((root / name).read_text("utf-8") for name in ("README.md", *pages.DOCUMENTS))
    parts = pages.readme_parts(readme)
    names = [path.stem for path in notebooks]
    links = pages.Links(
        {f"notebooks/{name}.ipynb": f"notebooks/{name}" for name in names}
        | {f"notebooks/solutions/{name}.ipynb": f"notebooks/{name}" for name in names}
        | pages.DOCUMENTS
        | {"README.md": "index", "data/claims.md": "claims"},
        repository,
        {anchor: page for page, text in parts.items() for anchor in pages.headings(text)},
    )
    parts["index"] = pages.index(parts["index"], names, pages.DOCUMENTS.values())
    planner, script = pages.planner_page()
    # Each page with the document that its links are written in.
    texts: dict[str, tuple[str, str]] = {page: (text, "README.md") for page, text in parts.items()}
    texts |= {page: (text, name) for text, (name, page) in zip(others, pages.DOCUMENTS.items(), strict=True)}
    texts |= {"claims": (pages.claims_page(), "data/claims.md"), "planner": (planner, "README.md")}
    lessons: dict[str, tuple[Lesson, str]] = {"shootout": (pages.shootout_page(root), "README.md")}
    for path in notebooks:
        made = lesson.lesson(forms.read(path), forms.read(forms.student_path(path)), path.stem)
        made.markdown = pages.opened(made.markdown, repository, path.stem)
        lessons[f"notebooks/{path.stem}"] = made, f"notebooks/{path.name}"
    texts |= {page: (made.markdown, name) for page, (made, name) in lessons.items()}

    def picture(path: str) -> str:
        place = written / "images" / Path(path).name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / path, place)
        return f"/images/{place.name}"

    for page, (text, name) in texts.items():
        place = written / f"{page}.md"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(links.rewritten(text, name, page, picture), "utf-8")
    (extra / "pictures").mkdir(parents=True)
    for made, _ in lessons.values():
        for name, png in made.pictures.items():
            (extra / "pictures" / name).write_bytes(png)
    (extra / "planner-tables.js").write_text(script, "utf-8")
    return len(texts)


def _settings(extra: Path, repository: str) -> Mapping[str, Any]:
    static = resources.files(__package__) / "static"
    link = {"name": "Repository", "url": repository, "html": "Repository", "class": ""}
    about = {"footer_icons": [link]} if repository else {}
    return {
        "project": TITLE, "author": "the contributors", "language": "en", "html_title": TITLE, "html_theme": "furo",
        "extensions": ["myst_parser", "labsupport.course.site.mathml"], "html_math_renderer": "mathml",
        "myst_enable_extensions": ["dollarmath"], "myst_heading_anchors": 4, "smartquotes": False,
        "highlight_language": "text", "pygments_style": "a11y-high-contrast-light",
        "html_static_path": [str(static)], "html_extra_path": [str(extra)],
        "html_css_files": ["site.css"], "html_js_files": [("site.js", {"defer": "defer"})],
        "html_favicon": str(static / "icon.svg"),
        "html_copy_source": False, "html_show_sourcelink": False, "html_show_sphinx": False, "html_show_copyright": False,
        "html_use_index": False, "html_domain_indices": False, "html_theme_options": about,
    }  # fmt: skip


def _sphinx(folder: Path, out: Path, repository: str, on_page: Callable[[int], None]) -> None:
    """Raises SiteError for the first thing that Sphinx warns of."""
    from sphinx.application import Sphinx
    from sphinx.errors import SphinxError

    warnings, done = io.StringIO(), [0]

    def one_more(*_: Any) -> None:
        done[0] += 1
        on_page(done[0])

    try:
        app = Sphinx(
            folder / "source", None, out, folder / "doctrees", "html", dict(_settings(folder / "extra", repository)),
            status=None, warning=warnings,
        )  # fmt: skip
        app.connect("source-read", one_more)
        app.connect("html-page-context", one_more)
        app.build()
    except (SphinxError, ValueError) as error:
        raise SiteError(f"Sphinx cannot make the pages: {error}") from error
    if said := warnings.getvalue().strip():
        line = re.sub(r"\x1b\[[\d;]*m", "", said.split("\n")[0]).replace(f"{folder / 'source'}{os.sep}", "")
        raise SiteError(f"Sphinx warns: {line}")
