"""What can be said of the pages of a site without a browser: links, pictures, headings, sizes, what must not stand there."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGEST = 1.5 * 2**20  # bytes of a page and its pictures, compressed
LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "source": "src", "iframe": "src", "object": "data"}
OTHER_SITES = ("a",)  # what may lead to another host: only what is followed by a click


@dataclass
class Page(HTMLParser):
    """path: of the file. ids: anchors. links: tag and address. alts: of images, None where there is none. headings: levels."""

    path: Path
    ids: set[str] = field(default_factory=set)
    links: list[tuple[str, str]] = field(default_factory=list)
    alts: list[tuple[str, str | None]] = field(default_factory=list)
    headings: list[int] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.html = self.path.read_text("utf-8")
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids.update(value for name in ("id", "name") if (value := given.get(name)))
        if (address := given.get(LINKS.get(tag, ""))) is not None:
            self.links.append((tag, address))
        if tag == "img":
            self.alts.append((given.get("src") or "", given.get("alt")))
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @cached_property
    def text(self) -> str:
        return "".join(self.words)


def read(site: Path) -> dict[Path, Page]:
    """All pages of a site, by their resolved path."""
    return {path: Page(path) for path in sorted(site.resolve().rglob("*.html"))}


def broken_links(site: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """Each address that leads nowhere, to another host without a click, or out of the site."""
    site = site.resolve()
    for page in pages.values():
        for tag, address in page.links:
            said = f"{page.path.relative_to(site)}: <{tag}> {address}"
            parts = urlsplit(address)
            if parts.scheme in ("http", "https", "mailto") or parts.netloc:
                if tag not in OTHER_SITES:
                    yield f"{said} asks another host"
                continue
            if parts.scheme:
                if (tag, parts.scheme) != ("img", "data"):
                    yield f"{said} has an odd scheme"
                continue
            target = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
            if not target.is_relative_to(site):
                yield f"{said} leaves the site"
            elif not target.is_file():
                yield f"{said} leads to no file"
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                yield f"{said} leads to no anchor"


def without_text(pages: dict[Path, Page]) -> Iterator[str]:
    """Images without an alternative text, headings that leave out a level, and formulas that were left as LaTeX."""
    for page in pages.values():
        yield from (f"{page.path.name}: {source} has no alternative text" for source, alt in page.alts if not (alt or "").strip())
        if page.headings.count(1) != 1:
            yield f"{page.path.name}: {page.headings.count(1)} headings of the first level, wanted one"
        for before, after in zip(page.headings, page.headings[1:], strict=False):
            if after > before + 1:
                yield f"{page.path.name}: a heading of level {after} follows one of level {before}"
        if "$$" in page.text or "\\frac" in page.text:
            yield f"{page.path.name}: a formula is left as LaTeX"


def betrayals(pages: dict[Path, Page], words: list[str]) -> Iterator[str]:
    """Where a page has one of these: paths of the machine that made it."""
    yield from (f"{page.path.name} has {word!r}" for page in pages.values() for word in words if word in page.html)


def compressed(page: Page) -> int:
    """Bytes of the page and all its pictures, as a server sends them."""
    pictures = {(page.path.parent / urlsplit(source).path).resolve() for source, _ in page.alts if not source.startswith("data:")}
    return sum(len(gzip.compress(path.read_bytes())) for path in (page.path, *pictures))
