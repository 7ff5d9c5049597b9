"""The farm: which submissions are marked, once each; what happens when processes die."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import grading_made
import pytest
from grading_made import DUE, LAB, classroom, hand_in, marked_times

pytest.importorskip("distributed")

from labsupport.grading import farm
from labsupport.grading.records import GradingError, Marked


def run(made, **options):
    return farm.grade(made, LAB, workers=2, unsafe=True, marker=grading_made.mark, **options)


def test_marks_each_submission_once_whatever_one_of_them_does(tmp_path: Path):
    """A worker that dies is replaced and its submission tried again; one that always kills it, or an error, stops nobody else."""
    made = classroom(tmp_path / "class", {id: "" for id in ("ada", "ben", "cleo", "dan", "eve")})
    right = [hand_in(made, "ada", {}), hand_in(made, "ben", {})]
    once, always = hand_in(made, "cleo", {"die": 1}), hand_in(made, "dan", {"die": 99})
    raising = hand_in(made, "eve", {"error": "a disk\nfailed"})
    seen, ready = [], []
    graded = run(
        made, on_result=lambda done, total, result: seen.append((done, total)), on_ready=lambda *about: ready.append(about)
    )
    assert seen == [(done, 5) for done in range(1, 6)]
    assert ready[0][0].startswith("http://127.0.0.1:")
    assert ready[0][1:] == (2, 5)
    assert not graded.left
    for one in (*right, once):
        assert farm.final_result(made, one) == grading_made.result(one)
    assert marked_times(made) == {
        right[0].sha256: 1,
        right[1].sha256: 1,
        once.sha256: 2,
        always.sha256: farm.TRIES,
        raising.sha256: 1,
    }
    unmarked = {result.learner: result for result in made.results(LAB) if not result.final}
    assert set(unmarked) == {"dan", "eve"}
    assert "died 3 times" in unmarked["dan"].problems[0]
    assert unmarked["eve"].problems == ("a disk failed",)
    assert unmarked["eve"].points == 0
    assert len(graded.lines) == 2

    # The next run leaves final results alone; here nothing else would start workers again.
    for one in (always, raising):
        grading_made.write(made, grading_made.result(one), one)
    assert run(made).results == []
    assert run(made).before == 5


def test_what_has_to_be_marked(tmp_path: Path):
    made = classroom(tmp_path / "class", {id: "" for id in ("ada", "ben", "cleo", "dan")})
    early, last = hand_in(made, "ada", {}, DUE - timedelta(hours=2)), hand_in(made, "ada", {}, DUE - timedelta(hours=1))
    too_late = hand_in(made, "ada", {}, DUE + timedelta(days=30))
    only_late = hand_in(made, "ben", {}, DUE + timedelta(days=30))
    assert farm.to_mark(made, LAB)[0] == [last, only_late]
    grading_made.write(made, grading_made.result(last), last)
    assert farm.to_mark(made, LAB) == ([only_late], 1)
    assert farm.to_mark(made, LAB, ["ada"]) == ([last, only_late], 0)
    made.result_path(last).write_text('{"lab": 5, "lear')
    assert farm.to_mark(made, LAB)[0] == [last, only_late]
    unmarked = Marked(outcome="unmarked", points=0, of=2)
    grading_made.write(made, grading_made.result(last, e5_1=unmarked), last)
    assert farm.to_mark(made, LAB)[0] == [last, only_late]
    best = made.settings.policy.model_copy(update={"repeated": "best"})
    made.settings.model_copy(update={"policy": best}).write(made.folder / "class.json")
    assert farm.to_mark(type(made).open(made.folder), LAB)[0] == [early, last, only_late]
    assert too_late not in farm.to_mark(made, LAB)[0]
    with pytest.raises(GradingError, match="'dan' has handed in nothing"):
        farm.to_mark(made, LAB, ["dan"])


HOLD = """
import sys
from pathlib import Path
from labsupport.grading.farm import only_one
with only_one(Path(sys.argv[1])):
    print("in", flush=True)
    input()
"""


def test_one_grader_at_a_time_and_a_dead_one_leaves_no_lock(tmp_path: Path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(GradingError, match="another `labs grade`"), farm.only_one(tmp_path):
            pass
        other.kill()
    with farm.only_one(tmp_path):
        pass


def test_no_cluster_is_one_line(tmp_path: Path, monkeypatch):
    made = classroom(tmp_path / "class", {"ada": ""})
    hand_in(made, "ada", {})
    monkeypatch.setattr(farm, "WAIT", 0.2)
    with pytest.raises(GradingError, match=r"no Dask scheduler answers at 'tcp://127\.0\.0\.1:9'"):
        run(made, dask_address="tcp://127.0.0.1:9")
    with pytest.raises(GradingError, match=r"dask-gateway|has no cluster"):
        run(made, dask_address="gateway:course")


@pytest.mark.slow
def test_a_cluster_that_is_there_already(tmp_path: Path):
    from distributed import LocalCluster

    made = classroom(tmp_path / "class", {"ada": "", "ben": ""})
    given = [hand_in(made, "ada", {}), hand_in(made, "ben", {})]
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, host="127.0.0.1") as cluster:
        graded = run(made, dask_address=cluster.scheduler_address)
        assert (graded.workers, graded.left, graded.lines) == (1, [], [])
        assert [farm.final_result(made, one) for one in given] == [grading_made.result(one) for one in given]
        # Its workers outlive a batch, and see what has changed since.
        more = hand_in(made, "ada", {"again": True}, DUE + timedelta(hours=1))
        assert [one.sha256 for one in run(made, dask_address=cluster.scheduler_address).results] == [more.sha256]


@pytest.mark.slow
@pytest.mark.parametrize("who", ["grader", "worker"])
def test_a_killed_process_loses_no_mark(tmp_path: Path, who: str):
    import grading_killed

    grading_killed.round_of(tmp_path / "class", who, 1.2)
    assert grading_killed.lost_or_doubled(tmp_path / "class") == []
