"""A Chromium to look with: Playwright's own where it is installed, else one on the PATH. It never asks for anything by itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Playwright, sync_playwright

ON_PATH = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    "--disable-background-networking", "--disable-component-update", "--disable-default-apps", "--disable-domain-reliability",
    "--disable-sync", "--no-first-run", "--no-pings", "--metrics-recording-only", "--disable-dev-shm-usage",
)  # fmt: skip
MISSING = "there is no Chromium: `playwright install chromium` gets one, or install your system's package `chromium`"


class NoChromium(Exception):
    """One line that says how to get one."""


def executable(playwright: Playwright) -> str:
    """Its path. Raises NoChromium."""
    own = Path(playwright.chromium.executable_path)
    if own.is_file():
        return str(own)
    for name in ON_PATH:
        if found := shutil.which(name):
            return found
    raise NoChromium(MISSING)


@contextmanager
def chromium(headed: bool = False) -> Iterator[Browser]:
    """It runs until the block ends. headed: in a window that can be watched. Raises NoChromium."""
    flags = list(QUIET)
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # in a container; the pages are the course's own
        flags.append("--no-sandbox")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(playwright), headless=not headed, args=flags)
        try:
            yield browser
        finally:
            browser.close()
