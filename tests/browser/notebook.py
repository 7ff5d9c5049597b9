"""One notebook in JupyterLab: opened, run from top to bottom by its menu, and what went wrong meanwhile."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from browser.server import Server
from playwright.sync_api import BrowserContext, ConsoleMessage, Locator, Page, Response, Route

WINDOW = {"width": 1400, "height": 1000}
LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"
OPEN_SECONDS, CELL_SECONDS, LOOK_AGAIN = 90, 600, 0.5


@dataclass
class Opened:
    """A notebook on a page, and what the browser has complained of so far."""

    page: Page
    name: str
    complaints: list[str] = field(default_factory=list)

    @property
    def panel(self) -> Locator:
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    @property
    def code_cells(self) -> Locator:
        return self.panel.locator(".jp-CodeCell")


def opened(context: BrowserContext, server: Server, name: str) -> Opened:
    """The notebook `name` of the server's folder, on a page of its own, as soon as its kernel is idle."""
    page = context.new_page()
    notebook = Opened(page, name)
    _listen(notebook, server)
    page.goto(server.page(name))
    page.get_by_role("tab", name=name).wait_for(timeout=1000 * OPEN_SECONDS)
    notebook.code_cells.first.wait_for(timeout=1000 * OPEN_SECONDS)
    idle(page).wait_for(timeout=1000 * OPEN_SECONDS)
    return notebook


def idle(page: Page) -> Locator:
    """The kernel's part of the status bar, when it has nothing to do. The circle above the notebook shows that too early."""
    return page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$"))


def _listen(notebook: Opened, server: Server) -> None:
    here = urlsplit(server.address).netloc

    def said(message: ConsoleMessage) -> None:
        if message.type == "error":
            notebook.complaints.append(f"console: {message.text}")

    def answered(response: Response) -> None:
        if response.status >= 400:
            notebook.complaints.append(f"{response.status} for {response.request.method} {urlsplit(response.url).path}")

    def asked(route: Route) -> None:
        if urlsplit(route.request.url).netloc in (here, ""):
            route.continue_()
        else:
            notebook.complaints.append(f"asks another server: {route.request.url}")
            route.abort()

    notebook.page.on("console", said)
    notebook.page.on("pageerror", lambda error: notebook.complaints.append(f"error in the page: {error}"))
    notebook.page.on(
        "requestfailed", lambda request: notebook.complaints.append(f"failed: {request.method} {urlsplit(request.url).path}")
    )
    notebook.page.on("response", answered)
    notebook.page.route("**/*", asked)


def choose(page: Page, *path: str) -> None:
    """Go down the menu bar: `choose(page, "Run", "Run All Cells")`."""
    page.get_by_role("menubar").first.get_by_role("menuitem", name=path[0], exact=True).click()
    for deeper, name in enumerate(path[1:], 1):
        entries = page.locator(".lm-Menu").nth(deeper - 1).locator(".lm-Menu-item")  # those with a menu below have no role
        entry = entries.filter(has=page.get_by_text(name, exact=True))
        entry.wait_for()
        entry.hover()
        if deeper == len(path) - 1:
            entry.click()


def run_all(notebook: Opened) -> float:
    """*Run > Run All Cells* until no cell is left to run; the seconds. Raises TimeoutError where one cell takes too long."""
    choose(notebook.page, "Edit", "Clear Outputs of All Cells")  # what stands there afterwards is of this run
    start = stood = time.monotonic()
    choose(notebook.page, "Run", "Run All Cells")
    done = -1
    while True:
        prompts = notebook.code_cells.locator(".jp-InputPrompt").all_inner_texts()
        ran = sum(bool(re.fullmatch(r"\[\d+\]:", prompt.strip())) for prompt in prompts)
        if ran != done:
            done, stood = ran, time.monotonic()
        if ran and not any("*" in prompt for prompt in prompts) and idle(notebook.page).count():
            return time.monotonic() - start
        if time.monotonic() - stood > CELL_SECONDS:
            raise TimeoutError(f"{notebook.name}: no cell ended for {CELL_SECONDS} s; {ran} of {len(prompts)} ran")
        time.sleep(LOOK_AGAIN)


def faults(notebook: Opened) -> Iterator[str]:
    """Cells that did not run, errors and what was written to standard error. A blank exercise says so in an ordinary line."""
    for place, cell in enumerate(notebook.code_cells.all()):
        prompt = cell.locator(".jp-InputPrompt").inner_text().strip()
        if not re.fullmatch(r"\[\d+\]:", prompt):
            yield f"code cell {place} did not run: {prompt}"
        for kind in ("error", "stderr"):  # JupyterLab shows a traceback as standard error
            for output in cell.locator(f".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.{kind}']").all():
                yield f"code cell {place}: {kind}: {output.inner_text().strip()[-200:]}"


def in_theme(notebook: Opened, theme: str) -> None:
    """By the menu, as a user does."""
    page = notebook.page
    if page.locator(f"body[data-jp-theme-name='{theme}']").count():
        return
    choose(page, "Settings", "Theme", theme)
    page.locator(f"body[data-jp-theme-name='{theme}']").wait_for(state="attached", timeout=30_000)
    page.wait_for_timeout(500)  # its style sheet is there; colors fade over


def picture(notebook: Opened, what: Locator | None, path: Path | None) -> None:
    """A screenshot of `what`, by default of the window, where `path` says a place for it."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if what is None:
        notebook.page.screenshot(path=path)
    else:
        what.scroll_into_view_if_needed()
        what.screenshot(path=path)
