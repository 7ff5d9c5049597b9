"""labs site: two notebooks and every other page, looked at without a browser, and the planner in one."""

from __future__ import annotations

import gzip
import html
import json
import re
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from site_check import pages as looked_at
from typer.testing import CliRunner

from labsupport.cli import app
from labsupport.course import badges, site
from labsupport.course.build import STUB, read, sources
from labsupport.course.site import lesson, mathml, pages, tables
from labsupport.evidence import planner

ROOT = Path(__file__).resolve().parents[1]
# myst-parser calls what Sphinx 11 will not have; its release for that Sphinx is another.
pytestmark = pytest.mark.filterwarnings("ignore:'myst_parser.*is deprecated")
NUMBERS = ["02", "05"]  # 05 has a widget


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site") / "out"
    site.build(ROOT, out, NUMBERS)
    return out


@pytest.fixture(scope="module")
def found(made: Path):
    return looked_at.read(made)


@pytest.mark.slow
def test_nothing_is_broken(made, found):
    """Links, texts of images, headings, formulas; and no page knows where it was made."""
    assert len(found) == len(NUMBERS) + 10  # front, planner, shootout, claims, commands, three documents, about, search
    assert list(looked_at.broken_links(made, found)) == []
    assert list(looked_at.without_text(found)) == []
    assert list(looked_at.betrayals(found, [str(ROOT), str(Path.home()), str(made)])) == []
    assert all(looked_at.compressed(page) <= looked_at.LARGEST for page in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("source", sources(ROOT, NUMBERS), ids=lambda path: path.stem)
def test_a_solution_is_hidden_and_the_stub_is_not(made, source):
    page = (made / "notebooks" / f"{source.stem}.html").read_text("utf-8")
    answers = [cell for cell in read(source).cells if cell.metadata.get("nbgrader", {}).get("solution")]
    hidden = re.findall(r'<details class="solution">.*?</details>', page, re.DOTALL)
    assert len(hidden) == len(answers) > 3
    shown = _text(re.sub(r'<details class="solution">.*?</details>', "", page, flags=re.DOTALL))
    assert shown.count(STUB) == len(answers)
    for cell, behind in zip(answers, hidden, strict=True):
        body = cell.source.split("### BEGIN SOLUTION\n")[1].split("### END SOLUTION")[0].strip()
        assert body in _text(behind)
        assert body not in shown
    for word in ("HIDDEN TESTS", "score(&quot;", 'score("', "BEGIN SOLUTION", lesson.WIDGET_TEXT):
        assert word not in page


def _text(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page))


@pytest.mark.slow
def test_the_planner_equals_labs_plan(made, tmp_path):
    """`make site` compares 50 random inputs, and all the odd ones."""
    from browser.chromium import NoChromium, chromium
    from site_check import planner as compared
    from site_check import visit

    odd = list(compared.odd_cases())
    cases = [*compared.random_cases(3), odd[9], odd[-1]]
    try:
        with chromium() as browser, visit.visit(browser, made.as_uri() + "/") as tab:
            tab.go("planner.html")
            assert list(compared.differences(tab.page, cases, tmp_path)) == []
            assert list(compared.shape_differences(tab.page)) == []
            tab.page.evaluate("TABLES.chunk = 1024")  # the comparison can fail
            assert len(list(compared.differences(tab.page, cases[:1], tmp_path))) == 1
            assert tab.faults == []
    except NoChromium as error:
        pytest.skip(str(error))


def test_the_planner_has_every_constant_from_python():
    assert json.loads(json.dumps(tables.planner_tables()))["assumptions"] == list(planner.ASSUMPTIONS)
    arithmetic = (ROOT / "labsupport/course/site/static/planner.js").read_text("utf-8")
    code = re.sub(r"//.*", "", arithmetic)
    for number in (planner.CHUNK, *planner.FALLBACK, *planner.FALLBACK.values()):
        assert not re.search(rf"(?<![\d.]){number:g}(?![\d.])", code), number


def test_a_formula_that_cannot_be_converted_is_an_error():
    assert mathml.convert(r"\frac{a}{b}").startswith("<math ")
    for wrong in (r"\unheardof{x}", r"\frac{a}"):
        with pytest.raises(ValueError, match="cannot be converted"):
            mathml.convert(wrong)


def test_a_link_leads_to_a_page_to_the_repository_or_nowhere():
    about = {"INSTRUCTORS.md": "instructors", "notebooks/02_rounding.ipynb": "notebooks/02_rounding"}
    links = pages.Links(about, "", {"serve-a-model": "commands", "the-course": "index"})
    text = (
        "[a](INSTRUCTORS.md#x) [`b`](data/card.md) [c](#serve-a-model) [d](#the-course) `[e](x)` [f](https://a.b) ![g](data/g.svg)"
    )
    seen: list[str] = []
    changed = links.rewritten(text, "README.md", "index", lambda path: seen.append(path) or "/images/g")
    wanted = "[a](instructors.md#x) `b` [c](commands.md#serve-a-model) [d](#the-course) `[e](x)` [f](https://a.b) ![g](/images/g)"
    assert (changed, seen) == (wanted, ["data/g.svg"])
    assert links.rewritten("[x](../notebooks/02_rounding.ipynb)", "data/c.md", "claims", str) == "[x](notebooks/02_rounding.md)"
    assert links.rewritten("[x](../INSTRUCTORS.md)", "data/claims.md", "notebooks/a", str) == "[x](../instructors.md)"
    public = pages.Links(about, "https://github.com/a/b", {})
    assert public.rewritten("[b](data/card.md)", "README.md", "index", str) == (
        f"[b](https://github.com/a/b/blob/{badges.TAG}/data/card.md)"
    )


def test_colab_and_binder_only_where_there_is_an_address():
    assert "http" not in pages.opened("# Title\ntext", "", "02_rounding")
    there = pages.opened("# Title\ntext", "https://github.com/a/b", "02_rounding")
    for address in badges.opened("https://github.com/a/b", "02_rounding.ipynb"):
        assert f"]({address})" in there


def test_headings_leave_no_level_out():
    before = "# a\n### b\n```python\n### c\n```\n<pre>\n### d\n</pre>\n#### e\n## f"
    assert lesson.in_order(before) == "# a\n## b\n```python\n### c\n```\n<pre>\n### d\n</pre>\n### e\n## f"


def test_an_output_that_no_page_can_show_is_an_error():
    cell = new_code_cell("x", id="a", outputs=[new_output("display_data", data={"application/pdf": ""})])
    notebook = new_notebook(cells=[new_markdown_cell("# t", id="t"), cell])
    with pytest.raises(site.SiteError, match="application/pdf"):
        lesson.lesson(notebook, notebook, "02_x")
    with pytest.raises(site.SiteError, match="no cell a; run `labs build 02`"):
        lesson.lesson(notebook, new_notebook(cells=notebook.cells[:1]), "02_x")


def test_a_readme_without_its_headings_is_an_error():
    with pytest.raises(site.SiteError, match="'## Commands'"):
        pages.readme_parts("# Title\n")


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    (tmp_path / "file").write_text("text")
    for name, said in (("letters", "a folder that `labs site` did not make"), ("file", "which is a file")):
        done = CliRunner().invoke(app, ["site", "02", "--out", str(tmp_path / name)])
        assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
        assert said in done.stderr
    assert (tmp_path / "letters" / "one.txt").read_text() == "dear"
    done = CliRunner().invoke(app, ["site", "77", "--out", str(tmp_path / "new")])
    assert (done.exit_code, done.stderr.splitlines()[0][:33]) == (1, "labs site: there is no notebook '")


def test_a_site_that_cannot_be_made_leaves_the_old_one(tmp_path, monkeypatch):
    old = tmp_path / "site"
    old.mkdir()
    (old / site.MARK).touch()
    (old / "index.html").write_text("old")

    def fails(folder, out, *rest):
        (out / "index.html").write_text("half")
        raise site.SiteError("Sphinx warns: of something")

    monkeypatch.setattr(site, "_sphinx", fails)
    done = CliRunner().invoke(app, ["site", "02", "--out", str(old)])
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (1, "labs site: Sphinx warns: of something")
    assert [path.name for path in tmp_path.iterdir()] == ["site"]
    assert (old / "index.html").read_text() == "old"


def test_the_check_of_links_sees_what_is_broken(tmp_path):
    (tmp_path / "a.html").write_text(
        '<h1 id="here">t</h1><h3>u</h3><a href="#here">1</a><a href="#there">2</a><a href="b.html">3</a><a href="../c.html">4</a>'
        '<a href="https://x.y">5</a><script src="https://x.y/z.js"></script><img src="p.png"><img src="data:," alt="q">$$x$$'
    )
    found = looked_at.read(tmp_path)
    said = [line.split("> ")[1] for line in looked_at.broken_links(tmp_path, found)]
    assert said == [
        "#there leads to no anchor", "b.html leads to no file", "../c.html leaves the site",
        "https://x.y/z.js asks another host", "p.png leads to no file",
    ]  # fmt: skip
    assert len(list(looked_at.without_text(found))) == 3
    assert list(looked_at.betrayals(found, ["z.js"])) == ["a.html has 'z.js'"]
    (tmp_path / "p.png").write_bytes(b"p" * 10)
    page = next(iter(found.values()))
    assert looked_at.compressed(page) == sum(len(gzip.compress(path.read_bytes())) for path in tmp_path.iterdir())


def test_the_package_carries_styles_scripts_and_the_form():
    from hatchling.builders.wheel import WheelBuilder

    carried = {each.distribution_path for each in WheelBuilder(str(ROOT)).recurse_included_files()}
    here = ROOT / "labsupport" / "course" / "site"
    wanted = {path.relative_to(ROOT).as_posix() for path in here.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert len(wanted) > 10
    assert wanted <= carried
