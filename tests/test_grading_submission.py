"""What is taken from a notebook: each answer wherever an editor or a learner left it, and one line for what is no notebook."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labsupport.course import workbook
from labsupport.grading import cells, submission
from labsupport.grading.records import GradingError, Release, Submission

NOTEBOOK = workbook.chapter("05")
NAMES = {
    "5.1": "nf4_codebook", "5.2": "encode", "5.3": "quantize_blocks", "5.4": "stored_bits",
    "5.5": "double_quantize", "5.6": "two_blocks", "5.7": "lloyd_step",
}  # fmt: skip
Change = Callable[[dict[str, Any]], None]


def answer(id: str, body: str = "return 1") -> str:
    return f"def {NAMES[id]}(*arguments):\n    {body}\n"


def fresh() -> dict[str, Any]:
    """The learner's copy, all answers filled in."""
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    for cell in notebook["cells"]:
        if cell["id"].startswith("answer-"):
            cell["source"] = answer(cell["id"].removeprefix("answer-").replace("-", "."))
    return notebook


def cell_of(notebook: dict[str, Any], id: str) -> dict[str, Any]:
    return next(cell for cell in notebook["cells"] if cell.get("id") == id)


def place_of(notebook: dict[str, Any], id: str) -> int:
    return notebook["cells"].index(cell_of(notebook, id))


def code(text: str, **more: Any) -> dict[str, Any]:
    return {"cell_type": "code", "metadata": {}, "source": text, "outputs": [], "execution_count": None} | more


def read(notebook: dict[str, Any] | bytes, lab: int = 5, release: Release | None = None) -> Submission:
    raw = notebook if isinstance(notebook, bytes) else json.dumps(notebook).encode()
    return submission.read_bytes(raw, "05_nf4.ipynb", lab, release)


def test_a_plain_notebook() -> None:
    found = read(fresh())
    assert found.answers == {id: answer(id) for id in NAMES}
    assert found.others == ()
    assert found.remarks == ()
    assert found.predictions == {"predicted_outer": None, "predicted_lloyd": None}


def test_every_notebook_of_the_course_has_all_its_answers() -> None:
    from labsupport.exercises.registry import exercises_of

    for lab, path in workbook.chapters().items():
        if lab > 5:
            continue
        found = submission.read(path, lab)
        assert list(found.answers) == [exercise.id for exercise in exercises_of(lab)], path
        assert found.remarks == ()


def test_stubs_are_taken_as_they_are() -> None:
    found = submission.read(NOTEBOOK, 5)
    assert all("raise NotImplementedError" in text for text in found.answers.values())


# Oddities that an honest notebook has: the answers must be the same ---------------------------------------------------
def lose_ids(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        cell.pop("id")
    notebook["nbformat_minor"] = 4


def lose_metadata(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        cell["metadata"] = {}


def save_as_colab(notebook: dict[str, Any]) -> None:
    lose_ids(notebook)
    for number, cell in enumerate(notebook["cells"]):
        cell["metadata"] = {"id": f"kX{number:04d}"}
    notebook["metadata"] = {"colab": {"provenance": []}, "kernelspec": {"name": "python3"}}
    notebook["nbformat_minor"] = 0


def save_as_vs_code(notebook: dict[str, Any]) -> None:
    for number, cell in enumerate(notebook["cells"]):
        cell["id"] = f"{number:08x}"
        cell["metadata"]["vscode"] = {"languageId": "python"}
        cell["source"] = cell["source"].splitlines(keepends=True) if isinstance(cell["source"], str) else cell["source"]


def turn_round(notebook: dict[str, Any]) -> None:
    notebook["cells"].reverse()


def be_format_3(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["input"] = cell.pop("source")
    notebook["worksheets"] = [{"cells": notebook.pop("cells")}]
    notebook["nbformat"] = 3


def double_ids(notebook: dict[str, Any]) -> None:
    for cell in notebook["cells"]:
        if cell["id"].startswith("check"):
            cell["id"] = "answer-5-1"


def copy_an_answer(notebook: dict[str, Any]) -> None:
    notebook["cells"].append(dict(cell_of(notebook, "answer-5-3")))


def leave_a_stub_behind(notebook: dict[str, Any]) -> None:
    stub = json.loads(NOTEBOOK.read_text("utf-8"))
    notebook["cells"].append(cell_of(stub, "answer-5-3"))


def merge_with_its_check(notebook: dict[str, Any]) -> None:
    check = cell_of(notebook, "check-5-2")
    notebook["cells"].remove(check)
    cell_of(notebook, "answer-5-2")["source"] += "\n" + "".join(check["source"])


def name_everything(notebook: dict[str, Any]) -> None:
    notebook["cells"].insert(1, code("list = torch = check = 3\nscore = 0.93"))


ODDITIES = [
    lose_ids, lose_metadata, save_as_colab, save_as_vs_code, turn_round, be_format_3, double_ids, copy_an_answer,
    leave_a_stub_behind, merge_with_its_check, name_everything,
]  # fmt: skip


@pytest.mark.parametrize("change", ODDITIES, ids=lambda change: change.__name__)
def test_an_oddity_leaves_the_answers_as_they_are(change: Change) -> None:
    notebook = fresh()
    change(notebook)
    found = read(notebook)
    merged = '\n\n# encode = check("5.2", encode)' if change is merge_with_its_check else ""
    assert {id: text.rstrip() for id, text in found.answers.items()} == {
        id: answer(id).rstrip() + merged * (id == "5.2") for id in NAMES
    }


@pytest.mark.parametrize("encode", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark(encode: str) -> None:
    assert read(json.dumps(fresh()).encode(encode)).answers["5.1"] == answer("5.1")


def test_windows_line_ends() -> None:
    notebook = fresh()
    cell_of(notebook, "answer-5-1")["source"] = answer("5.1").replace("\n", "\r\n")
    assert read(json.dumps(notebook).replace("\n", "\r\n").encode()).answers["5.1"] == answer("5.1")


def test_an_answer_without_cell_is_found_by_its_function() -> None:
    notebook = fresh()
    cell_of(notebook, "answer-5-1")["source"] = cell_of(json.loads(NOTEBOOK.read_text("utf-8")), "answer-5-1")["source"]
    notebook["cells"].insert(3, code("import math\n\n" + answer("5.1", "return 7")))
    found = read(notebook)
    assert found.answers["5.1"] == "import math\n\n" + answer("5.1", "return 7")
    assert found.others == ()
    assert "5.1: taken from cell 4, which defines nf4_codebook" in found.remarks


def test_an_answer_in_a_cell_of_the_course_comes_without_the_course_s_text() -> None:
    notebook = fresh()
    notebook["cells"].remove(cell_of(notebook, "answer-5-1"))
    load = cell_of(notebook, "load")
    load["source"] = "".join(load["source"]) + "\n" + answer("5.1")
    assert read(notebook).answers["5.1"].strip() == answer("5.1").strip()


def test_a_cell_that_only_points_elsewhere_is_no_answer() -> None:
    notebook = fresh()
    cell_of(notebook, "answer-5-1")["source"] = "# see the end"
    notebook["cells"].append(code(answer("5.1", "return 7")))
    found = read(notebook)
    assert found.answers["5.1"] == answer("5.1", "return 7")
    assert found.others == ("# see the end",)
    cell_of(notebook, "answer-5-1")["source"] = "import end\nnf4_codebook = end.levels"
    assert read(notebook).answers["5.1"] == "import end\nnf4_codebook = end.levels"


def test_a_missing_answer_is_missing_and_said() -> None:
    notebook = fresh()
    notebook["cells"].remove(cell_of(notebook, "answer-5-4"))
    found = read(notebook)
    assert "5.4" not in found.answers
    assert "there is no cell of 5.4" in found.remarks


def test_a_split_cell_is_put_together() -> None:
    notebook = fresh()
    place = place_of(notebook, "answer-5-2")
    whole = notebook["cells"][place]
    parts = ["def helper():\n    return 2\n", "def encode(values, levels):\n    a = helper()", "    return a"]
    notebook["cells"][place : place + 1] = [whole | {"source": part} for part in parts]
    found = read(notebook)
    assert found.answers["5.2"] == "def encode(values, levels):\n    a = helper()\n    return a"
    assert found.others == (parts[0],)


def test_of_two_texts_the_last_that_is_filled_in_is_taken_and_said() -> None:
    notebook = fresh()
    again = cell_of(notebook, "answer-5-3") | {"source": answer("5.3", "return 2")}
    stub = cell_of(json.loads(NOTEBOOK.read_text("utf-8")), "answer-5-3")
    notebook["cells"] += [again, stub]
    found = read(notebook)
    assert found.answers["5.3"] == answer("5.3", "return 2")
    places = place_of(notebook, "answer-5-3") + 1, len(notebook["cells"]) - 1
    said = f"5.3 is in cells {places[0]}, {places[1]} with different texts: cell {places[1]} was taken, the last filled in"
    assert said in found.remarks


def test_cells_of_the_learner_are_kept_in_their_order() -> None:
    notebook = fresh()
    notebook["cells"].insert(2, code("import math"))
    notebook["cells"].append(code('def helper():\n    return math.pi\n\nscore("5.1")'))
    setup = cell_of(notebook, "setup")
    setup["source"] = "".join(setup["source"]) + "\nimport numpy as np"
    others = read(notebook).others
    assert [text.splitlines()[-1] for text in others] == ["import numpy as np", "import math", '# score("5.1")']


def test_commands_of_the_notebook_are_left_out_and_said() -> None:
    notebook = fresh()
    cell_of(notebook, "answer-5-1")["source"] = "%%time\n" + answer("5.1") + "!pip list\nx = (8\n% 3)"
    found = read(notebook)
    assert found.answers["5.1"] == "# %%time\n" + answer("5.1") + "# !pip list\nx = (8\n% 3)"
    assert any(remark.startswith("5.1: lines that are commands") for remark in found.remarks)


# What changes nothing, and is remarked on -----------------------------------------------------------------------------
def raise_points(notebook: dict[str, Any]) -> None:
    cell_of(notebook, "check-5-1")["metadata"]["nbgrader"]["points"] = 1000


def edit_a_check(notebook: dict[str, Any]) -> None:
    cell_of(notebook, "check-5-1")["source"] = "print('pass, exact')"


def copy_a_check(notebook: dict[str, Any]) -> None:
    notebook["cells"].append(dict(cell_of(notebook, "check-5-1")))


def delete_a_check(notebook: dict[str, Any]) -> None:
    notebook["cells"].remove(cell_of(notebook, "check-5-1"))


@pytest.mark.parametrize(
    ("change", "remark"),
    [
        (raise_points, "the points of 5.1 were changed; the class's count"),
        (edit_a_check, "the check of 5.1 was changed; checks do not count"),
        (copy_a_check, "the check of 5.1 is there 2 times; checks do not count"),
        (delete_a_check, "without the marked checks of 5.1; checks do not count"),
    ],
)
def test_what_does_not_count_is_remarked_on(change: Change, remark: str) -> None:
    notebook = fresh()
    change(notebook)
    points = {"5.1": 3.0, "5.2": 3.0, "5.3": 4.0, "5.4": 3.0, "5.5": 4.0, "5.6": 3.0, "5.7": 3.0}
    found = read(notebook, release=Release(lab=5, points=points, notebook="05_nf4.ipynb"))
    assert found.remarks == (remark,)
    assert found.answers == {id: answer(id) for id in NAMES}
    assert found.others == ()


def test_an_answer_that_is_no_code_cell_is_said() -> None:
    notebook = fresh()
    cell_of(notebook, "answer-5-1")["cell_type"] = "markdown"
    found = read(notebook)
    assert "5.1" not in found.answers
    assert any("not a code cell any more" in remark for remark in found.remarks)


# Predictions and numbers ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("12.5  # my guess", 12.5), ("-3", -3.0), ("1_000", 1000.0), ("'lower'", "lower"),
        ('"no clear difference"  # so', "no clear difference"),
        ("None", None), ("", None), ("12,5", None), ("True", None), ("__import__('os').system('true')", None),
        ("1e999", None), ("9" * 250, 1e250), ("[" * 290, None), ("'" + "x" * 120 + "'", None),
        ("1" * 500, None), ("10 ** 9", None),         ("'\\udcff'", "?"),
    ],
)  # fmt: skip
def test_a_prediction_is_a_number_or_a_short_text(written: str, value: Any) -> None:
    notebook = fresh()
    cell_of(notebook, "predict")["source"] = f"predicted_outer = {written}"
    found = read(notebook)
    if isinstance(value, float):
        assert found.predictions["predicted_outer"] == pytest.approx(value)
    else:
        assert found.predictions["predicted_outer"] == value
    blank = written in ("None", "") or value is not None
    assert any(remark.startswith("predicted_outer in cell 5 is") for remark in found.remarks) != (blank and written != "")


def test_a_prediction_whose_cell_lost_its_name_is_found() -> None:
    notebook = fresh()
    cell_of(notebook, "predict")["source"] = "predicted_outer = 7"
    save_as_colab(notebook)
    assert read(notebook).predictions["predicted_outer"] == 7


def test_the_prediction_s_own_cell_comes_before_others_that_set_it() -> None:
    notebook = fresh()
    cell_of(notebook, "predict")["source"] = "predicted_outer = 7"
    notebook["cells"].append(code("predicted_outer = 8"))
    assert read(notebook).predictions["predicted_outer"] == 7


def test_numbers_of_one_s_own() -> None:
    notebook = fresh()
    source = 'from labsupport.exercises.own import own_number\n\nown_number("5.1", 12345678)\nown_5_1 = 3.25'
    notebook["cells"] += [
        code(source, id="own-5-1", metadata={"tags": ["own"]}),
        code(source.replace("5_1 = 3.25", "5_2 = float(levels.sum())")),
        code("own_5_3 = '1.5'\nown_predicted_5 = 80"),
        code("own_5_4 = 'much'"),
    ]
    found = read(notebook)
    assert found.own == {"5.1": 3.25, "5.2": None, "5.3": 1.5, "5.4": None, "prediction": 80.0}
    assert found.others == ()
    assert len(found.remarks) == 2


# Bad files ------------------------------------------------------------------------------------------------------------
def nested(depth: int) -> bytes:
    return b'{"cells": ' + b"[" * depth + b"]" * depth + b"}"


BAD = {
    "empty": (b"", "is empty"),
    "blanks": (b" \r\n\n", "is empty"),
    "a byte-order mark alone": (b"\xef\xbb\xbf", "is empty"),
    "zeros": (bytes(5000), "is empty"),
    "cut off": (json.dumps(fresh()).encode()[:3000], "is not a notebook, or cut off"),
    "a page for logging in": (b"<!DOCTYPE html><html></html>", "is not a notebook, or cut off"),
    "Latin-1": ('{"cells": "é"}'.encode("latin-1"), "byte 11 is not UTF-8"),
    "half of UTF-16": (b"\xff\xfe{", "is not UTF-8"),
    "a list": (b"[1]", "holds no table of cells"),
    "a number": (b"3", "holds no table of cells"),
    "no cells": (b"{}", "has no list of cells"),
    "cells are a table": (b'{"cells": {}}', "has no list of cells"),
    "worksheets of texts": (b'{"worksheets": ["a"]}', "has none of the exercises"),
    "no exercises": (b'{"cells": []}', "has none of the exercises of lab 05"),
    "deep": (nested(300_000), "is nested too deeply"),
    "deep tables": (b'{"a": ' * 300_000, "is nested too deeply"),
    "many lists": (b'{"cells": [' + b"[]," * 1_000_001 + b"[]]}", "holds more than 1000000 lists and tables"),
    "a long number": (b'{"cells": [' + b"9" * 5000 + b"]}", "a number of thousands of digits"),
    "much code": (json.dumps({"cells": [code("x" * 90_000)] * 23}).encode(), "has 2070000 characters of code, more than 2000000"),
    "many cells": (b'{"cells": [' + b"0," * 2000 + b"0]}", "has 2001 cells, more than 2000"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_notebook_is_refused_in_one_line(kind: str) -> None:
    raw, says = BAD[kind]
    with pytest.raises(GradingError) as refused:
        read(raw)
    assert says in str(refused.value)
    assert str(refused.value).startswith("05_nf4.ipynb ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("strip", [lambda notebook: None, save_as_colab])
def test_the_notebook_of_another_lab_is_recognized(strip: Change) -> None:
    notebook = json.loads(workbook.chapter("02").read_text("utf-8"))
    strip(notebook)
    with pytest.raises(submission.OtherLab, match="is lab 02, wanted lab 05"):
        read(notebook)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(GradingError, match="cannot be read: No such file"):
        submission.read(tmp_path / "a.ipynb", 5)
    with pytest.raises(GradingError, match="is not a file"):
        submission.read(tmp_path, 5)
    large = tmp_path / "large.ipynb"
    with large.open("wb") as stream:
        stream.truncate(cells.LARGEST_FILE + 10**6)
    with pytest.raises(GradingError, match="has 21 MB, more than 20 MB"):
        submission.read(large, 5)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.ipynb")
        with pytest.raises(GradingError, match="is not a file"):
            submission.read(tmp_path / "pipe.ipynb", 5)
    with pytest.raises(GradingError, match="there is no chapter '77'"):
        submission.read(NOTEBOOK, 77)


def test_cells_that_are_none_are_left_out_and_said() -> None:
    notebook = fresh()
    notebook["cells"] += [
        3, {}, {"cell_type": "code"}, code("x" * 200_000), code("# \ud800"), code("y", metadata=[], id=7),
        code("z", metadata={"tags": 3}), {"cell_type": "code", "source": ["a", 3]},
        code("w", metadata={"nbgrader": {"grade_id": ["answer-5-1"], "points": "many"}}),
    ]  # fmt: skip
    found = read(notebook)
    assert found.answers == {id: answer(id) for id in NAMES}
    assert found.others == ("# ?", "y", "z", "w")
    assert len(found.remarks) == 5
    assert found.model_validate_json(found.model_dump_json()) == found


# A pattern or a parser that is not linear would not come to an end on these.
STUMBLING = {
    "one line of 20 MB": "x" * 19_000_000,
    "brackets": "(" * 90_000,
    "names": "predicted_outer = 1\n" * 4_000,
    "blanks": "def" + " " * 90_000,
    "attributes": "def encode(): x" + ".a" * 40_000,
    "many definitions": "def encode(): 1\n" * 6_000,
    "checks": 'check("5.1"\n' * 8_000,
    "word": "a" * 90_000 + " " * 9_000,
}


@pytest.mark.parametrize("kind", STUMBLING)
def test_a_text_that_a_pattern_may_stumble_over(kind: str) -> None:
    notebook = fresh()
    notebook["cells"] += [code(STUMBLING[kind])] * (1 if kind.startswith("one") else 3)
    cell_of(notebook, "predict")["source"] = STUMBLING[kind]
    assert read(notebook).answers["5.3"] == answer("5.3")


FILLINGS = [
    "encode = 1\n",
    "own_5_1 = x\n",
    "predicted_outer = y\n",
    "def encode(a): 1\n",
    'check("5.9"\n',
    "own_77_1 = 1\n",
    "%a\n",
]


@pytest.mark.parametrize("line", FILLINGS)
def test_much_of_what_is_looked_for_comes_to_an_end(line: str) -> None:
    many = line * (90_000 // len(line))
    notebook = {"cells": [code(many + f"# {number}") for number in range(20)]}
    notebook["cells"] += fresh()["cells"][:30]
    raw = json.dumps(notebook).encode()
    found = read(raw)
    assert len(found.remarks) <= 51


# Whatever bytes are given ---------------------------------------------------------------------------------------------
WORDS = ["def encode(a):\n    return a", "encode = check('5.2', encode)", "predicted_outer = 3", "own_5_1 = 1"]
TEXTS = st.one_of(st.text(max_size=30), st.sampled_from(WORDS))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
ANYTHING = st.one_of(JSON, st.sampled_from(["code", "markdown", "answer-5-1", "check-5-1", "answer-5-99"]))
CELLS = st.fixed_dictionaries(
    {},
    optional={
        "cell_type": st.one_of(st.just("code"), ANYTHING),
        "source": st.one_of(TEXTS, st.lists(TEXTS, max_size=3), JSON),
        "id": ANYTHING,
        "metadata": st.one_of(JSON, st.fixed_dictionaries({"nbgrader": st.fixed_dictionaries({}, optional={
            "grade_id": ANYTHING, "points": ANYTHING, "solution": ANYTHING})}), st.fixed_dictionaries({"tags": JSON})),
    },
)  # fmt: skip


WHOLE = json.dumps(fresh())


def ends(raw: bytes) -> Submission | str:
    """What was read, the same after a file; or the one line why not."""
    try:
        found = read(raw)
    except GradingError as error:
        return str(error)
    assert Submission.model_validate_json(found.model_dump_json()) == found
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(cells=st.lists(st.one_of(CELLS, JSON), max_size=4), extra=JSON, keep=st.booleans())
def test_whatever_cells_there_are_reading_ends(cells: list[Any], extra: Any, keep: bool) -> None:
    notebook = {"cells": cells + (json.loads(WHOLE)["cells"] if keep else []), "metadata": extra}
    found = ends(json.dumps(notebook).encode())
    assert "\n" not in found if isinstance(found, str) else found.answers
    assert isinstance(found, Submission) or not keep


@settings(max_examples=100, deadline=None)
@given(raw=st.one_of(st.binary(max_size=200), JSON.map(lambda value: json.dumps(value).encode())))
def test_whatever_bytes_are_given_reading_ends(raw: bytes) -> None:
    found = ends(raw)
    assert isinstance(found, str)
    assert "\n" not in found


@settings(max_examples=40, deadline=None)
@given(at=st.integers(0, len(WHOLE)), length=st.integers(0, 30), put=st.binary(max_size=20))
def test_a_damaged_notebook_ends_in_answers_or_one_line(at: int, length: int, put: bytes) -> None:
    whole = WHOLE.encode()
    found = ends(whole[:at] + put + whole[at + length :])
    assert "\n" not in found if isinstance(found, str) else set(found.answers) <= set(NAMES)
