"""labs check on what learners write: whatever an answer does, the verdicts of the others are kept and each is called by its id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from labsupport.course import workbook
from labsupport.course.headless import check_notebook
from labsupport.exercises.registry import exercises_of

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def exercise(number: int, answer: str | None = None, name: str = "") -> list:
    """The two cells of an exercise of chapter 2. answer: without it the solution."""
    known = exercises_of(2)[number - 1]
    if answer is None:
        solved = nbformat.read(ROOT / "notebooks" / "solutions" / "02_rounding.ipynb", as_version=4)
        answer, name = dict(workbook.answers(solved))[f"answer-2-{number}"].source, known.name
    about = {
        "grade_id": f"answer-2-{number}",
        "solution": True,
        "grade": False,
        "locked": False,
        "schema_version": 3,
        "task": False,
    }
    return [new_code_cell(answer, metadata={"nbgrader": about}), new_code_cell(f'{name} = check("2.{number}", {name})')]


SETUP = new_code_cell("import torch\nfrom labsupport.exercises import check")
NOISE = new_code_cell(
    "get_ipython().events.register('post_run_cell', lambda result: __builtins__.print('a hook prints'))\nprint = open = json = None"
)


def test_whatever_an_answer_does_it_is_judged_by_its_id_and_the_others_are_kept(tmp_path):
    cells = [
        SETUP,
        *exercise(1),
        NOISE,
        *exercise(2, "def two(:\n    pass", "two"),
        *exercise(3, "def three(*arguments):\n    exit()", "three"),
        *exercise(4, "quit()", "four"),
        *exercise(5, "def five(*arguments):\n    raise KeyboardInterrupt", "five"),
        new_code_cell("1 / 0"),
        *exercise(6),
        *exercise(8, "def eight(*arguments):\n    return input('value? ')", "eight"),
        *exercise(7, "import os\nos._exit(3)", "seven"),
        *exercise(1),
    ]
    seen = []
    outcome = check_notebook(new_notebook(cells=cells), 2, tmp_path, seen.append)
    assert outcome.outcomes == {"2.1": "pass", "2.6": "pass"} | {f"2.{number}": "not yet" for number in (2, 3, 4, 5, 7, 8)}
    assert outcome.stopped == "the kernel died, perhaps for lack of memory, at 2.7"
    assert not outcome.interrupted
    assert outcome.wrong
    said = {line.partition(":")[0]: line for line in outcome.errors}
    assert "2.2: not yet. Its cell raised SyntaxError: " in said["2.2"]
    assert "2.4: not yet. Its cell raised SystemExit" in said["2.4"]
    assert "2.5: not yet. Its cell raised KeyboardInterrupt" in said["2.5"]
    assert said["cell 13 raised ZeroDivisionError"] == "cell 13 raised ZeroDivisionError: division by zero"
    assert any(check.startswith("2.3 ") and "not yet" in check for check in outcome.checks)
    assert any(check.startswith("2.8 ") and "not yet" in check for check in outcome.checks)  # nobody is there to type
    assert outcome.tally.endswith(f"2 of {len(exercises_of(2))} pass")
    assert seen == list(range(18))  # to the cell at which it died


def test_ctrl_c_says_where_it_stood_and_keeps_the_verdicts(tmp_path):
    reached = tmp_path / "reached"
    endless = (
        f"import time\nfrom pathlib import Path\ndef two(*arguments):\n    Path({str(reached)!r}).touch()\n    time.sleep(600)"
    )
    cells = [SETUP, *exercise(1), *exercise(2, endless, "two"), *exercise(3)]
    mine = tmp_path / "book" / "02_rounding.ipynb"
    workbook.write(new_notebook(cells=cells), mine)
    before = mine.read_bytes()
    command = [sys.executable, "-m", "labsupport.cli", "check", "2", "--dir", str(mine.parent)]
    process = subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not reached.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, (out, err)
    assert "labs check: stopped. It stood at 2.2; what is above is what was found before" in err
    assert "Traceback" not in out + err
    assert "Kernel died" not in err  # nbclient's own word for it
    assert out.splitlines()[0].startswith(f"2.1 {exercises_of(2)[0].name}: pass")
    assert f"1 of {len(exercises_of(2))} pass" in out
    assert mine.read_bytes() == before
