"""Follow every link to another site: `python tests/links.py`. A workflow does it weekly; no test needs the network.

A link is broken where its site says that the page is not there (404, 410) or no such site is known. Sites that do not answer
robots, or not now, are listed and not counted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = (".md", ".ipynb", ".yaml", ".yml", ".toml", ".cff")
LINK = re.compile(r"(?:https?://|(?<![\w./@-])(?:github\.com|huggingface\.co|docs\.[\w-]+\.\w+)/)[^\s<>\"'`|\\]+")
PAPER = re.compile(r"\barXiv:(\d{4}\.\d{4,5})")
GONE = (404, 410)
PLACES = ("localhost", "127.0.0.1", "example.org", "example.com")  # of this machine, and of nobody


def links_of(text: str) -> set[str]:
    """The addresses in a text, without what only closes a sentence or a bracket; papers by their number."""
    found = {f"https://arxiv.org/abs/{number}" for number in PAPER.findall(text)}
    for match in LINK.finditer(text):
        link = match[0].rstrip(".,;:!?*_")
        link = link if link.startswith("http") else f"https://{link}"
        while link.endswith(")") and link.count(")") > link.count("("):
            link = link[:-1].rstrip(".,;:")
        if not re.match(rf"https?://(?:{'|'.join(map(re.escape, PLACES))})(?:[:/]|$)", link) and not re.search(r"[{}$]", link):
            found.add(link.partition("#")[0])
    return found


def text_of(path: Path) -> str:
    """A file's text; of a notebook what its author wrote."""
    text = path.read_text("utf-8")
    if path.suffix != ".ipynb":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])


def all_links(root: Path = ROOT) -> dict[str, list[str]]:
    """Each link of the files that git knows, and where it stands."""
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, encoding="utf-8", check=True).stdout.splitlines()
    found: dict[str, list[str]] = {}
    for name in listed:
        if name.endswith(KINDS):
            for link in links_of(text_of(root / name)):
                found.setdefault(link, []).append(name)
    return found


def state(link: str) -> str:
    """ "" where the page is there, "broken: ..." or "unknown: ..."."""
    request = urllib.request.Request(link, headers={"User-Agent": "Mozilla/5.0 (links of a course)", "Accept": "*/*"})
    try:
        with urllib.request.urlopen(request, timeout=30):
            return ""
    except urllib.error.HTTPError as error:
        return f"{'broken' if error.code in GONE else 'unknown'}: {error.code} {error.reason}"
    except urllib.error.URLError as error:
        unheard = "name" in str(error.reason).lower() and "known" in str(error.reason).lower()
        return f"{'broken' if unheard else 'unknown'}: {error.reason}"
    except (OSError, ValueError) as error:
        return f"unknown: {type(error).__name__} {error}"


def report(places: dict[str, list[str]], states: Iterable[str]) -> int:
    """Print what is not there, and return how many links are broken."""
    broken = 0
    for (link, files), what in zip(places.items(), states, strict=True):
        broken += what.startswith("broken")
        if what:
            print(f"{what}: {link} in {', '.join(sorted(files))}")
    print(f"{len(places)} links, {broken} broken")
    return broken


if __name__ == "__main__":
    everywhere = dict(sorted(all_links().items()))
    with ThreadPoolExecutor(8) as pool:
        sys.exit(1 if report(everywhere, pool.map(state, everywhere)) else 0)
