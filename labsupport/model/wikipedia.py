"""Articles out of a dump of Wikipedia, as plain text: a folder to train on and one that is held out, by the hash of the title."""

from __future__ import annotations

import bz2
import html
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from labsupport.model import text

SHORTEST = 2000  # characters; what is shorter is a stub
TO_REMOVE = (
    r"<ref[^>/]*/>|<ref.*?</ref>|<math.*?</math>|<gallery.*?</gallery>",
    r"\{\{[^{}]*\}\}",  # templates, of nested ones the innermost
    r"\{\|[^{}]*?\|\}",  # tables
    # Pictures, categories, other languages; a caption may hold links.
    r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]",
)
END = r"\n==+ *(?:See also|References|External links|Notes|Further reading|Bibliography)"  # lists follow from here on
NO_PROSE = ("|", "!", "*", "#", ":", ";")  # a line of a table or a list begins so


def plain(source: str) -> str:
    """Wiki markup as the text that a reader sees, without tables, lists, references and pictures."""
    prose = html.unescape(re.sub(r"<!--.*?-->", "", source, flags=re.DOTALL))
    for pattern in TO_REMOVE:
        before = None
        while before != prose:  # what was removed may have stood inside another one
            before, prose = prose, re.sub(pattern, "", prose, flags=re.DOTALL)
    prose = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]", r"\1", prose)  # [[Page|words]]
    prose = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", prose)
    prose = re.sub(r"<[^>]+>|'{2,}", "", prose)  # other tags; italics and bold
    lines = [line for line in re.split(END, prose)[0].splitlines() if not line.startswith(NO_PROSE)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def articles(dump: bytes) -> Iterator[tuple[str, str]]:
    """Title and text of each article in a dump, which is XML packed with bz2 and may end in the middle of a page."""
    for page in re.findall(rb"<page>.*?</page>", bz2.decompress(dump), flags=re.DOTALL):
        tree = ElementTree.fromstring(page)
        title, source = tree.findtext("title", ""), tree.findtext("revision/text") or ""
        if tree.findtext("ns", "0") == "0" and source[:9].upper() != "#REDIRECT":
            prose = plain(source)
            if len(prose) >= SHORTEST:
                yield title, prose


def write(dump: bytes, out: Path) -> dict[str, list[str]]:
    """Write the articles of a dump into the folders of text.SPLITS below `out`, a file each. Returns their titles by split."""
    titles: dict[str, list[str]] = {split: [] for split in text.SPLITS}
    for title, prose in articles(dump):
        split = "heldout" if text.is_held_out(title, "prose") else "train"
        path = out / split / (re.sub(r"\W+", "_", title) + ".txt")
        path.parent.mkdir(exist_ok=True)
        with path.open("x", encoding="utf-8") as stream:  # no article replaces another
            stream.write(prose + "\n")
        titles[split].append(title)
    return titles
