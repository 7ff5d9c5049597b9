"""`make browser`: every notebook in JupyterLab in a real browser, run from top to bottom as a learner does, and looked at.

A line a notebook; the exit code is 1 where a cell fails, the browser complains, a control does not answer or has no name, headings
skip a level, a picture has no alternative text, or axe finds something serious in the light or the dark theme.
ARGS="02 05" looks at these alone. LABS_QUICK=1 runs them on little text.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from browser import look
from browser.chromium import NoChromium, chromium
from browser.server import NoAnswer, jupyterlab
from rich.console import Console

from labsupport.course import workbook
from labsupport.evidence import measurements
from labsupport.model import quick

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "data" / "measurements" / "browser.json"
PACKAGES = ("jupyterlab", "ipywidgets", "playwright", "axe-playwright-python")


def about(browser_version: str) -> dict[str, object]:
    versions = {name: version(name) for name in PACKAGES} | {"chromium": browser_version, "python": sys.version.split()[0]}
    return {
        "command": "make browser ARGS=--write", "versions": versions, "form": "student", "themes": list(look.THEMES),
        "processor": f"{os.cpu_count()} cores, shared with other work: seconds are no benchmark",
    }  # fmt: skip


def write(found: dict[str, object], row: dict[str, Any]) -> None:
    """Keep the row of one notebook. Rows of other notebooks are kept where they are of the same versions."""
    kept: dict[str, dict[str, Any]] = {}
    if RESULTS.is_file():
        before, old = measurements.read(RESULTS)
        if before == found:
            kept = {row["notebook"]: row for row in old}
    text = "little, by LABS_QUICK" if quick.is_on() else "all, as a learner runs it"
    kept[row["notebook"]] = row | {"text": text, "date": date.today().isoformat()}
    measurements.write(RESULTS, found, [kept[name] for name in sorted(kept)])


def main() -> int:
    parser = argparse.ArgumentParser(prog="make browser", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("chapters", nargs="*", metavar="NN", help="only these, as 02 or 5")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep pictures of tops, widgets, tables and figures there")
    parser.add_argument("--headed", action="store_true", help="in a window that can be watched")
    parser.add_argument("--write", action="store_true", help=f"keep rows without a fault in {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stopped from outside, JupyterLab ends as well
    try:
        names = [workbook.chapter(chapter).name for chapter in options.chapters]
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
    except (workbook.WorkbookError, OSError) as error:
        parser.error(str(error))
    names = names or [path.name for path in workbook.chapters().values()]
    start, count, wrong = time.monotonic(), 0, 0
    try:
        with jupyterlab() as server, chromium(options.headed) as browser, Console(stderr=True).status("") as status:
            for name in names:
                seen = look.at(browser, server, name, options.out, lambda text, name=name: status.update(f"{name}: {text}"))
                wrong += len(seen.faults)
                count += 1
                print(line(seen), flush=True)
                if options.write and not seen.faults:
                    write(about(browser.version), seen.row)
    except (NoChromium, NoAnswer) as error:
        print(f"make browser: {error}", file=sys.stderr)
        return 1
    print(f"{count} notebooks, {wrong} faults, {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


def line(seen: look.Seen) -> str:
    row = seen.row
    if "violations" not in row:
        return "\n    ".join([f"WRONG {row['notebook']}", *seen.faults])
    violations = row["violations"]
    said = (
        f"{row['notebook']}: {row['cells']} cells in {row['seconds']:.0f} s, {row['pictures']} pictures, "
        f"{row['controls']} controls moved, violations {violations['light']} in light and {violations['dark']} in dark"
    )
    return "\n    ".join([said if not seen.faults else f"WRONG {said}", *seen.faults])


if __name__ == "__main__":
    sys.exit(main())
