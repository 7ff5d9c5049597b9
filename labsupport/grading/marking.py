"""One submission is marked: texts go into a sandbox, data comes out, and the exercise's own judgement looks at the data here.

Nothing that was handed in runs, is imported or parsed in this process. Inputs are made here from secret seeds; references never
leave. What an answer's process writes down about itself can lower its mark only: a pass needs right outputs on every input.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from labsupport.exercises.attempts import Attempt
from labsupport.exercises.compare import leaves
from labsupport.exercises.judging import INTERNAL, judge, outputs_right
from labsupport.grading import own, prepared, returned, submission
from labsupport.grading.classroom import Classroom
from labsupport.grading.prepared import Asked, Group, Lab
from labsupport.grading.records import Collected, GradingError, Marked, Outcome, Policy, Result, Submission
from labsupport.grading.sandbox import Limits, Sandbox

OUTCOMES: dict[str, Outcome] = {"blank": "blank", "raised": "raised", "returned": "raised"}  # of attempts that did not run through
STARTS = 60.0  # seconds that Python and torch may take to start on a busy machine
WHY = {"time": "more time", "memory": "more memory", "output": "more room for files", "killed": "more processes"}
LONGEST_MESSAGE = 1000  # characters: a text that an answer returns may be in it


@dataclass
class _Ran:
    """What the sandbox gave for one exercise. ended: "" where the answer came to its end by itself."""

    attempts: list[Attempt] = field(default_factory=list)
    seconds: float = 0.0
    ended: str = ""
    unmarked: str = ""


def mark(classroom: Classroom, collected: Collected, sandbox: Sandbox) -> Result:
    """Mark a submission. Never raises over what was handed in; GradingError where the class's folder is broken."""
    began = time.monotonic()
    release = classroom.release(collected.lab)
    lab = prepared.lab(classroom, collected.lab, list(release.points))
    problems, remarks, in_sandbox = list[str](), list(collected.remarks), 0.0
    marks = dict[str, Marked]()
    taken = Submission(answers={})
    try:
        taken = submission.read(classroom.notebook_path(collected), collected.lab, release)
    except GradingError as error:
        problems.append(str(error))
    remarks += taken.remarks
    numbers = own.judge(classroom, release, collected.learner, taken) if release.own_numbers and not problems else {}
    for group in lab.groups:
        ids = [id for id in group.asked if id in taken.answers]
        found, seconds, said = _run(lab, group, ids, taken, classroom.settings.limits, sandbox)
        in_sandbox += seconds
        problems += said
        for id, asked in group.asked.items():
            of = release.points[id]
            marks[id] = (
                marked(asked, found[id], of, classroom.settings.policy)
                if id in found
                else Marked(outcome="missing", points=0, of=of)
            )
    return Result(
        lab=collected.lab, learner=collected.learner, sha256=collected.sha256, handed_in=collected.handed_in,
        marks={id: marks[id] for id in release.points}, predictions=taken.predictions, own=numbers,
        problems=tuple(problems), remarks=tuple(dict.fromkeys(remarks)), seconds=time.monotonic() - began,
        in_sandbox=in_sandbox, versions=lab.versions, sandbox=sandbox.name,
    )  # fmt: skip


# Into the sandbox and out ---------------------------------------------------------------------------------------------
def _run(
    lab: Lab, group: Group, ids: Sequence[str], taken: Submission, limits: Limits, sandbox: Sandbox
) -> tuple[dict[str, _Ran], float, list[str]]:
    """Run the answers of a group. What each gave, seconds in the sandbox, and what the machine failed at.

    Where an answer ends the whole sandbox, the others are run again without it.
    """
    found, spent, problems = dict[str, _Ran](), 0.0, list[str]()
    answers, left = dict(taken.answers), list(ids)
    while left:
        if spent >= limits.notebook_seconds:
            found |= {
                id: _Ran(ended=f"the {limits.notebook_seconds:g} s of the whole notebook were over before it began") for id in left
            }
            break
        rest = limits.model_copy(update={"notebook_seconds": limits.notebook_seconds - spent})
        try:
            some, culprit, seconds = _once(lab, group, left, answers, taken.others, rest, sandbox)
        except (GradingError, OSError) as error:
            problems.append(f"{', '.join(left)} could not be run: {error}")
            found |= {id: _Ran(unmarked="it could not be run: the machine failed") for id in left}
            break
        spent += seconds
        found |= some
        if culprit:
            answers.pop(culprit, None)
        left = [id for id in left if id not in found]
    return found, spent, problems


def _once(
    lab: Lab, group: Group, ids: Sequence[str], answers: Mapping[str, str], others: Sequence[str], limits: Limits, sandbox: Sandbox
) -> tuple[dict[str, _Ran], str, float]:
    """One run of the sandbox: what came of each answer that ran, the answer that ended the sandbox if one did, and seconds.

    Raises GradingError where nothing could be run at all.
    """
    with tempfile.TemporaryDirectory(prefix="labs-marking-") as temporary:
        told, out = Path(temporary, "task"), Path(temporary, "out")
        told.mkdir(mode=0o755)
        out.mkdir(mode=0o700)
        text = prepared.task(lab, group, ids, dict(answers), others, limits)
        (told / "task.json").write_text(text, "utf-8")
        ended = sandbox.run(
            ["python", "/bench/runner.py", "/task", "/inputs", "/out"],
            folders={"/bench": group.bench, "/inputs": lab.inputs, "/task": told}, out=out, limits=limits,
        )  # fmt: skip
        found = dict[str, _Ran]()
        for id in ids:
            end = returned.ended(out / f"{id}.end.json")
            if end is None:
                break
            found[id] = _Ran(_attempts(out, group.asked[id]), *end)
        culprit = next((id for id in ids if id not in found), "")
        ready = returned.is_there(out / "ready")
        if not ready and not ids:
            raise GradingError(f"Python could not be started in the sandbox: {ended.last_line[:200]}")
        if culprit and not ready:  # an answer may have removed the file: without any, does it start?
            _once(lab, group, (), {}, (), limits.model_copy(update={"notebook_seconds": STARTS}), sandbox)
        if culprit:
            needs = WHY.get(ended.why, "")
            reason = f"it took {needs} than there is, and was stopped" if needs else "it ended the process that runs all answers"
            found[culprit] = _Ran(ended=reason)
        return found, culprit, ended.seconds


def _attempts(out: Path, asked: Asked) -> list[Attempt]:
    """What became of an answer on each input, up to the first on which it failed outright or left nothing."""
    found = list[Attempt]()
    for number, want in enumerate(asked.want):
        stem = out / f"{asked.exercise.id}-{number}"
        if not returned.is_there(stem):
            break
        found.append(returned.attempt(stem, want))
        if found[-1].status != "ran":
            break
    return found


# Judging --------------------------------------------------------------------------------------------------------------
def marked(asked: Asked, ran: _Ran, of: float, policy: Policy) -> Marked:
    """The mark for what an answer gave."""
    tried = ran.attempts

    def found(outcome: Outcome, message: str, share: float = 0.0, figures: dict[str, float] | None = None) -> Marked:
        points = of if outcome == "pass" else of * share * policy.partial
        return Marked(
            outcome=outcome, points=points, of=of, message=message[:LONGEST_MESSAGE], seconds=ran.seconds, share=share,
            printed=tried[0].printed if tried else "", figures=figures or {},
        )  # fmt: skip

    if ran.unmarked:
        return found("unmarked", ran.unmarked)
    failed = bool(tried) and tried[-1].status != "ran"
    if not failed and len(tried) < len(asked.given):
        return found(*_stopped(ran.ended))
    verdict = judge(asked.exercise, list(zip(asked.given, tried, strict=False)), asked.want)
    if verdict.passed:
        return found("pass", verdict.message, 1.0, {"difference": verdict.difference, "allowed": verdict.allowed})
    if verdict.message.startswith(INTERNAL):
        return found("unmarked", verdict.message)
    if failed:
        return found(OUTCOMES[tried[-1].status], verdict.message)
    return found("wrong", verdict.message, share_right(asked, tried))


def _stopped(ended: str) -> tuple[Outcome, str]:
    """Outcome and sentence for an answer that left no result. ended: a sentence, or the word of runner.py."""
    if ended == "time":
        return "stopped", "it took longer than is allowed for one input, and was stopped"
    if ended.startswith("signal"):
        return "stopped", f"its process was ended from outside or crashed ({ended})"
    if ended.startswith("exit"):
        return "raised", "it ended Python"
    return ("stopped", ended) if ended else ("raised", "it left no result")


def share_right(asked: Asked, tried: Sequence[Attempt]) -> float:
    """Which share of several outputs is right on every input.

    Only outputs with numbers count that differ from input to input: the others can be guessed.
    """
    counted = [name for name in asked.want[0] if _varies(name, asked)]
    if len(counted) < 2:
        return 0.0
    right = set(counted)
    for given, one, want in zip(asked.given, tried, asked.want, strict=True):
        right &= outputs_right(asked.exercise, given, one, want)
    return min(len(right), len(counted) - 1) / len(counted)  # all right and refused: what is wrong was seen in them together


def _varies(name: str, asked: Asked) -> bool:
    values = [want.get(name) for want in asked.want]
    if any(isinstance(leaf, str | bool) or getattr(leaf, "dtype", None) == torch.bool
           for value in values for _, _, leaf in leaves({name: value})):  # fmt: skip
        return False
    return len({str(value) for value in values}) == len(values) > 1
