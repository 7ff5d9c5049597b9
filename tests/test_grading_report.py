"""Spreadsheets, pictures and pages of a class; and that texts from outside do nothing in them."""

from __future__ import annotations

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import pytest
from grading_made import DUE, LAB, classroom, hand_in, result, write

pytest.importorskip("sqlalchemy")

from labsupport.grading import feedback, gradebook, report, texts
from labsupport.grading.records import Marked, Override

HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>\"' onmouseover='alert(1)' "
    "<a href=javascript:alert(1)>{{ 7*7 }}</title></pre>"
)
FORMULA = '=HYPERLINK("http://x.example","5")'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    made = classroom(
        tmp_path_factory.mktemp("report") / "class",
        {"ada": "Ada", "ben": "=cmd|' /C calc'!A0", "cleo": HOSTILE.replace('"', ""), "dan": "Dan"},
        late=0.1,
    )
    for learner, message in (("ada", ""), ("ben", FORMULA), ("cleo", HOSTILE)):
        one = hand_in(made, learner, {}, DUE)
        wrong = Marked(
            outcome="wrong",
            points=0,
            of=4,
            message=message or "the codes are off by one",
            share=0.5,
            printed=(message or "1.0") * 200,
            seconds=0.25,
            figures={"difference": 0.5, HOSTILE[:30]: 1.0},
        )
        found = result(one, e5_2=wrong).model_copy(
            update={
                "predictions": {"predicted_outer": message or 12.5, "predicted_lloyd": None},
                "problems": (message,),
                "remarks": (message,),
            }
        )
        write(made, found, one)
    gradebook.set_by_hand(made, Override(lab=LAB, learner="cleo", exercise="5.1", points=1, reason=HOSTILE, by=HOSTILE, when=DUE))
    report.report(made, LAB)
    feedback.feedback(made, LAB)
    return made


def table(made, name):
    with (made.folder_of("reports", LAB) / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


def test_canvas(made):
    rows = table(made, "canvas.csv")
    assert rows[0] == ["Student", "ID", "SIS User ID", "SIS Login ID", "Section", "Lab 05"]
    assert rows[1] == ["Points Possible", "", "", "", "", "8.0"]
    assert rows[2] == ["Ada", "", "ada", "ada@example.org", "", "5.0"]  # 2 + 4 * 0.5 * 0.5 + 2
    assert rows[5] == ["Dan", "", "dan", "dan@example.org", "", "0.0"]


def test_moodle(made):
    rows = table(made, "moodle.csv")
    assert rows[0] == ["ID number", "Email address", "Lab 05 (Real)", "Lab 05 (Feedback)"]
    assert rows[1] == ["ada", "ada@example.org", "5.0", "5.1: 2 of 2; 5.2: 1 of 4; 5.6: 2 of 2"]
    assert rows[4][3] == "none handed in"


def test_gradescope(made):
    assert table(made, "gradescope-roster.csv")[:2] == [["Full Name", "Email", "SID"], ["Ada", "ada@example.org", "ada"]]
    found = json.loads((made.folder_of("reports", LAB) / "gradescope" / "ada.json").read_text())
    assert found["score"] == 5.0
    assert [(one["name"], one["score"], one["max_score"]) for one in found["tests"]] == [
        ("5.1", 2, 2),
        ("5.2", 1, 4),
        ("5.6", 2, 2),
    ]


def test_marks_by_learner_and_exercise(made):
    header, *rows = table(made, "marks.csv")
    found = {(row[0], row[3]): dict(zip(header, row, strict=True)) for row in rows}
    assert len(found) == len(rows) == 4 * 4
    assert found["ada", "5.2"]["points"] == "1.0"
    assert found["ada", "5.2"]["message"] == "the codes are off by one"
    assert found["dan", "total"]["outcome"] == "none handed in"


def test_a_mark_that_is_not_there_yet_is_not_imported_as_0(tmp_path):
    other = classroom(tmp_path / "class", {"ada": ""})
    hand_in(other, "ada", {})
    assert report.canvas(other, LAB, gradebook.entries(other, LAB))[2][-1] == ""


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "\N{FULLWIDTH EQUALS SIGN}1"])
def test_no_text_becomes_a_formula(text):
    assert str(texts.cell(text)).startswith("'")
    assert texts.cell("Ada =1") == "Ada =1"
    assert texts.cell(-1.5) == -1.5


def test_no_spreadsheet_of_a_class_has_a_formula(made):
    rows = [row for path in made.folder_of("reports", LAB).glob("*.csv") for row in table(made, path.name)]
    cells = [cell for row in rows for cell in row]
    assert any("HYPERLINK" in cell for cell in cells)
    assert any("calc" in cell for cell in cells)
    assert not [cell for cell in cells if cell.startswith(texts.FORMULAS)]


class Elements(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


ELEMENTS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "h3",
    "p",
    "strong",
    "ul",
    "li",
    "table",
    "tr",
    "th",
    "td",
    "pre",
    "img",
}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "scope", "src", "alt"}


def test_texts_from_outside_are_inert_on_pages(made):
    pages = [*made.folder_of("feedback", LAB).iterdir(), made.folder_of("reports", LAB) / "index.html"]
    assert len(pages) == 5
    for path in pages:
        page = Elements()
        page.feed(path.read_text("utf-8"))
        assert {tag for tag, _ in page.found} <= ELEMENTS, path
        assert {name for _, attributes in page.found for name in attributes} <= ATTRIBUTES, path
        policy = next(
            attributes["content"] for tag, attributes in page.found if attributes.get("http-equiv") == "Content-Security-Policy"
        )
        assert policy.startswith("default-src 'none';")
        assert "script" not in policy
        for tag, attributes in page.found:
            if tag == "img":
                assert attributes["src"].startswith("data:image/png;base64,")
                assert len(attributes["alt"]) > 20
    cleo = Elements()
    cleo.feed((made.folder_of("feedback", LAB) / "cleo.html").read_text("utf-8"))
    assert HOSTILE in cleo.text  # the message, as a text
    assert "more characters)" in cleo.text  # what it printed is cut


def test_control_characters_are_shown_and_not_obeyed():
    assert texts.visible("a\x1b[31m\x00\u202eb\nc") == "a\\x1b[31m\\x00\\u202eb\nc"
    assert texts.visible("x" * 10, 4) == "xxxx ... (6 more characters)"


def test_feedback_says_how_the_mark_came_about(tmp_path):
    made = classroom(tmp_path / "class", {"ada": "Ada", "dan": ""}, late=0.1)
    one = hand_in(made, "ada", {}, DUE.replace(day=2))
    found = result(one, e5_2=Marked(outcome="wrong", points=0, of=4, message="the codes are off by one", share=0.5))
    write(made, found.model_copy(update={"predictions": {"predicted_outer": 12.5}}), one)
    gradebook.set_by_hand(
        made, Override(lab=LAB, learner="ada", exercise="5.6", points=1, reason="explained it", by="Grace", when=DUE)
    )
    paths = feedback.feedback(made, LAB)
    page = Elements()
    page.feed(paths[0].read_text("utf-8"))
    for words in (
        "3.6 of 8 points",  # (2 + 1 + 1) less a tenth
        "late by 1 day",
        "Each day costs 10 %: 4 became 3.6 points.",
        "gets at most 50 % of its points",
        "the codes are off by one",
        "set to 1 by hand by Grace: explained it",
        "weights with code 0 or 15, percent",
        "12.5",
    ):
        assert words in page.text, words
    assert feedback.measurements(LAB)["predicted_outer"][1] in page.text
    assert "Nothing was handed in." in paths[1].read_text("utf-8")


def test_predictions_stand_beside_what_the_course_measured():
    assert set(feedback.measurements(2)) == {"predicted_error", "predicted_direction", "predicted_rise"}
    assert all(what and measured for what, measured in feedback.measurements(2).values())


def test_pictures_have_words_for_those_who_do_not_see_them(made):
    figures = report.pictures(gradebook.entries(made, LAB))
    assert "The median is 5 of 8 points" in figures["distribution"].alt
    assert figures["hardest"].alt.startswith("Outcomes by exercise, the hardest first. Right: 5.2 0 of 3")
    assert "5.2, 1: " in figures["mistakes"].alt
    assert "5.2 0.25 s" in figures["time"].alt
    for name, figure in figures.items():
        assert (made.folder_of("reports", LAB) / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert all(axis.get_xlabel() for axis in figure.axes)


def test_a_class_where_nothing_came_in_has_a_report(tmp_path: Path):
    empty = classroom(tmp_path / "class", {"ada": "Ada"})
    assert report.pictures(gradebook.entries(empty, LAB))["hardest"].alt.startswith("Outcomes by exercise")
    no_learners = classroom(tmp_path / "nobody", {})
    assert report.report(no_learners, LAB)
