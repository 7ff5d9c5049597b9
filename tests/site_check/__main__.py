"""`make site`: the whole site built and looked at in a browser. ARGS=DIR: a site that is there already.

A line for each bar; the exit code is 1 where one is missed. Pictures of every kind of page are left in `runs/site_check`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from browser.chromium import NoChromium, chromium
from playwright.sync_api import Browser
from site_check import pages, planner, visit

from labsupport.course import site as made_by_labs

ROOT = Path(__file__).resolve().parents[2]
BUILD_SECONDS, PAINT_SECONDS, INPUTS = 180, 1.0, 50
PARTS = ("pages", "planner", "behavior", "paint", "axe", "pictures")
PAINTS = 5  # of which the fastest counts: the machine does other things too
# A line to print, and what is wrong: nothing where the bar is met.
Line = tuple[str, list[str]]


def build(out: Path) -> Line:
    start = time.monotonic()
    count = len(made_by_labs.build(ROOT, out))
    seconds = time.monotonic() - start
    return f"{count} pages in {seconds:.1f} s, at most {BUILD_SECONDS}", ["too slow"] if seconds > BUILD_SECONDS else []


def without_a_browser(site: Path) -> Iterator[Line]:
    found = pages.read(site)
    links = sum(len(page.links) for page in found.values())
    yield f"{links:,} links in {len(found)} pages", list(pages.broken_links(site, found))
    images = sum(len(page.alts) for page in found.values())
    formulas = sum(page.html.count("<math ") for page in found.values())
    yield f"{images} images have a text, {formulas} formulas are MathML, headings are in order", list(pages.without_text(found))
    words = [str(ROOT), str(Path.home()), tempfile.gettempdir() + "/", sys.prefix]
    yield "no path of this machine", list(pages.betrayals(found, words))
    sizes = {page.path.name: pages.compressed(page) for page in found.values()}
    name, largest = max(sizes.items(), key=lambda each: each[1])
    wrong = [f"{name}: {size / 2**20:.2f} MB" for name, size in sizes.items() if size > pages.LARGEST]
    yield f"largest page with its pictures: {name}, {largest / 2**20:.2f} MB compressed, at most {pages.LARGEST / 2**20}", wrong


def every_page(browser: Browser, site: Path, base: str) -> Iterator[Line]:
    """axe in light and dark, and whether a phone's page can be scrolled sideways."""
    names = [path.relative_to(site.resolve()).as_posix() for path in pages.read(site)]
    for scheme in ("light", "dark"):
        wrong: list[str] = []
        with visit.visit(browser, base, scheme=scheme) as tab:
            for name in names:
                tab.go(name)
                tab.page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
                rules = () if scheme == "light" else visit.OF_COLORS
                wrong += [f"{name}: {said}" for said in visit.violations(tab.page, rules)]
            wrong += tab.faults
        yield f"axe finds nothing serious on {len(names)} pages, {scheme}; no error, no other host asked", wrong
    with visit.visit(browser, base, visit.PHONE) as tab:
        wrong = []
        for name in names:
            tab.go(name)
            tab.page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
            if visit.too_wide(tab.page):
                wrong.append(f"{name} can be scrolled sideways")
        yield f"{len(names)} pages fit {visit.PHONE['width']} px", wrong + tab.faults


def paints(browser: Browser, site: Path, base: str) -> Line:
    """Each time in a context that has nothing of the site yet, and that asks the server itself rather than through this process."""
    best: dict[str, float] = {}
    for _ in range(PAINTS):
        for path in pages.read(site):
            name = path.relative_to(site.resolve()).as_posix()
            context = browser.new_context(viewport=visit.DESKTOP)
            page = context.new_page()
            page.goto(base + name)
            best[name] = min(visit.first_paint(page), best.get(name, float("inf")))
            context.close()
    name, slowest = max(best.items(), key=lambda each: each[1])
    wrong = [f"{name}: {seconds:.2f} s" for name, seconds in best.items() if seconds > PAINT_SECONDS]
    return f"first content within {slowest:.2f} s on the slowest page, {name}, at most {PAINT_SECONDS}", wrong


def behavior(browser: Browser, site: Path, base: str) -> Iterator[Line]:
    """From the server and from the folder: search, the switch of themes, solutions, the claims' filter."""
    for where, place in (("from a server", base), ("from the folder", site.resolve().as_uri() + "/")):
        with visit.visit(browser, place) as tab:
            wrong = list(visit.misbehavior(tab))
            yield f"search, dark mode, solutions and filter, {where}", wrong + tab.faults


def the_planner(browser: Browser, base: str, inputs: int) -> Line:
    cases = [*planner.random_cases(inputs), *planner.odd_cases()]
    with visit.visit(browser, base) as tab, tempfile.TemporaryDirectory() as folder:
        tab.go("planner.html")
        wrong = [*planner.differences(tab.page, cases, Path(folder)), *planner.shape_differences(tab.page)]
        wrong += planner.by_keyboard(tab.page)
        wrong += visit.violations(tab.page)  # with a refused config.json, as the keyboard has left it
        return f"the planner says what `labs plan` says on {inputs} random and {len(cases) - inputs} odd inputs", wrong + tab.faults


def pictures(browser: Browser, base: str, folder: Path) -> Line:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("index", "notebooks/02_rounding", "notebooks/09_kv_cache", "shootout", "claims", "planner", "commands", "search")
    for size, scheme in ((visit.DESKTOP, "light"), (visit.DESKTOP, "dark"), (visit.PHONE, "light"), (visit.PHONE, "dark")):
        with visit.visit(browser, base, size, scheme) as tab:
            for name in names:
                tab.go(f"{name}.html")
                tab.page.screenshot(path=folder / f"{name.replace('/', '-')}-{size['width']}-{scheme}.png")
    return f"pictures of {len(names)} pages in {folder}", []


def lines(site: Path | None, inputs: int, only: Sequence[str]) -> Iterator[Line]:
    with tempfile.TemporaryDirectory(prefix="labs-site-check-") as made:
        if site is None:
            site = Path(made) / "site"
            yield build(site)
        if "pages" in only:
            yield from without_a_browser(site)
        with visit.served(site) as base, chromium() as browser:
            if "planner" in only:
                yield the_planner(browser, base, inputs)
            if "behavior" in only:
                yield from behavior(browser, site, base)
            if "paint" in only:
                yield paints(browser, site, base)
            if "axe" in only:
                yield from every_page(browser, site, base)
            if "pictures" in only:
                yield pictures(browser, base, ROOT / "runs" / "site_check")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m site_check", description=__doc__)
    parser.add_argument("site", type=Path, nargs="?", help="a folder that `labs site` made; without it one is made")
    parser.add_argument("--inputs", type=int, default=INPUTS, help="of the planner")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of the check")
    given, missed = parser.parse_args(), 0
    try:
        for said, wrong in lines(given.site, given.inputs, given.only):
            print("MISSED" if wrong else "ok    ", said, flush=True)
            for fault in wrong[:20]:
                print(f"         {fault}", flush=True)
            missed += bool(wrong)
    except NoChromium as error:
        print(error)
        return 1
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
