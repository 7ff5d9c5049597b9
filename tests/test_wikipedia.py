"""Articles out of a dump of Wikipedia."""

from __future__ import annotations

import bz2

import pytest

from labsupport.model import wikipedia

WORDS = ("alpha ", "beta ", "gamma\n", "delta ", "1984 ")


def article(title: str, words: int = 800, ns: int = 0, start: str = "") -> str:
    body = start + "".join(WORDS[(number + len(title)) % len(WORDS)] for number in range(words))
    return f"<page><title>{title}</title><ns>{ns}</ns><revision><text>{body}</text></revision></page>\n"


# By the first byte of the SHA-256 of the title: 0x7c and 0x4c, to train on; 0x21 and 0x07, held out.
TITLES = {"train": ["Abacus", "Coal"], "heldout": ["Hill", "River"]}


def dump() -> bytes:
    pages = [article(title, words=7000) for titles in TITLES.values() for title in titles]
    pages += [article("Talk:Hill", ns=1), article("Stub", words=20), article("Other", start="#redirect [[Hill]] ")]
    return bz2.compress(("<mediawiki>" + "".join(pages) + article("Cut")[:300]).encode())


@pytest.mark.parametrize(
    ("markup", "wanted"),
    [
        ("'''Hill''' is ''high''.", "Hill is high."),
        ("A [[hill]] and [[Mountain|a mountain]].", "A hill and a mountain."),
        ("Before {{note|with {{another|inside}} it}}after.", "Before after."),
        ("[[File:a.png|thumb|A [[hill]], high.]]Text [[Category:Hills]]", "Text"),
        ("[[fr:Colline]]Text", "Text"),
        ("Text<ref>book</ref> goes<ref name=a/> on<!-- not shown -->.", "Text goes on."),
        ("See [http://a.org/b the site].", "See the site."),
        ("Height {| class=x\n|-\n| 1\n|}\nText\n* one\n# two\n: three", "Height \nText"),
        ("Text &amp; more<br />.\n\n\n\nEnd", "Text & more.\n\nEnd"),
        ("Text\n== References ==\nbook", "Text"),
        ("Text\n== Height ==\nmore\n=== See also ===\nlink", "Text\n== Height ==\nmore"),
    ],
    ids=str,
)
def test_markup_becomes_text(markup, wanted):
    assert wikipedia.plain(markup) == wanted


def test_articles_are_those_that_are_whole_and_long_enough():
    assert [title for title, _ in wikipedia.articles(dump())] == [title for titles in TITLES.values() for title in titles]


def test_two_titles_that_would_be_one_file_are_not_lost(tmp_path):
    (tmp_path / "out").mkdir()
    twice = bz2.compress((article("Hill") + article("Hill")).encode())
    with pytest.raises(FileExistsError):
        wikipedia.write(twice, tmp_path / "out")
