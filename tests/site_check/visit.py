"""A site in a browser, from a server on this machine or from the folder; every request to another host is an error."""

from __future__ import annotations

import functools
import http.server
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, Route

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 375, "height": 760}
SERIOUS = ("serious", "critical")
OF_COLORS = ("color-contrast", "link-in-text-block")  # the rules of axe for which it matters whether a page is light or dark


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: object, address: object) -> None:
        """A browser that leaves a page hangs up on what it asked for."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, address)


@contextmanager
def served(site: Path) -> Iterator[str]:
    """The address of a server for the folder, which ends in a slash."""
    server = Server(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Visit:
    """A tab of the browser, and what went wrong in it."""

    page: Page
    base: str
    faults: list[str] = field(default_factory=list)

    def go(self, name: str) -> None:
        self.page.goto(self.base + name)


@contextmanager
def visit(browser: Browser, base: str, size: dict[str, int] = DESKTOP, scheme: str = "light") -> Iterator[Visit]:
    """base: of `served`, or the folder's file:// address with a slash at its end. scheme: what the system prefers."""
    context = browser.new_context(viewport=size, color_scheme=scheme, reduced_motion="reduce")
    found = Visit(context.new_page(), base)

    def asked(route: Route) -> None:
        if urlsplit(route.request.url).netloc == urlsplit(base).netloc:
            route.continue_()
        else:
            found.faults.append(f"asks another host: {route.request.url}")
            route.abort()

    found.page.route("**/*", asked)
    found.page.on("console", lambda said: said.type == "error" and found.faults.append(f"console: {said.text}"))
    found.page.on("pageerror", lambda error: found.faults.append(f"error: {error}"))
    try:
        yield found
    finally:
        context.close()


def violations(page: Page, rules: Sequence[str] = ()) -> list[str]:
    """What axe calls serious or critical, with the first element of each. rules: those that are tried; all by default."""
    from axe_playwright_python.sync_playwright import Axe

    options: dict[str, Any] = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
    answer: dict[str, Any] = Axe().run(page, options=options).response
    found = [each for each in answer["violations"] if each["impact"] in SERIOUS]
    return [
        f"{each['id']}, {len(each['nodes'])} times: {each['nodes'][0]['html'][:200]} {each['nodes'][0]['failureSummary']}"
        for each in found
    ]


def first_paint(page: Page) -> float:
    """Seconds to the first content, as the browser says."""
    entry = page.wait_for_function("performance.getEntriesByName('first-contentful-paint')[0]")
    return entry.evaluate("entry => entry.startTime") / 1000


def too_wide(page: Page) -> bool:
    """Whether the page can be scrolled sideways."""
    return page.evaluate("document.documentElement.scrollWidth > innerWidth")


def misbehavior(tab: Visit) -> Iterator[str]:
    """What does not work of search, the switch of themes, hidden solutions and the filter of claims."""
    page = tab.page
    tab.go("search.html?q=perplexity")
    page.locator("#search-results li").first.wait_for()
    if not page.locator("#search-results li a").first.get_attribute("href"):
        yield "search finds nothing that can be opened"
    tab.go("index.html")
    before = _paper(page)
    button = page.locator("button.theme-toggle:visible").first
    button.click()
    if _paper(page) == before and not button.click() and _paper(page) == before:  # the first click may keep the system's choice
        yield "the button for dark mode changes nothing"
    chosen = _paper(page)
    tab.go("claims.html")
    if _paper(page) != chosen:
        yield "the next page forgets which theme was chosen"
    rows = page.locator("#verdicts ~ .table-wrapper tbody tr:visible, #verdicts ~ div tbody tr:visible")
    everything = page.locator("section[id^=claim-]:visible").count()
    page.get_by_label("fails", exact=True).focus()
    page.keyboard.press("Space")
    some = page.locator("section[id^=claim-]:visible").count()
    if not 0 < some < everything or rows.count() == everything:
        yield f"the filter shows {some} of {everything} claims that fail"
    if page.get_by_role("status").inner_text() != f"{some} of {everything} claims":
        yield "the filter does not say how many claims are left"
    tab.go("notebooks/02_rounding.html")
    solution = page.locator("details.solution").first
    if solution.locator("pre").is_visible():
        yield "a solution is visible before it is asked for"
    solution.locator("summary").focus()
    page.keyboard.press("Enter")
    if not solution.locator("pre").is_visible():
        yield "a solution does not appear"


def _paper(page: Page) -> str:
    return page.evaluate("getComputedStyle(document.body).backgroundColor")
