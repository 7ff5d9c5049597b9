"""Scores a submission: counts it, has it evaluated in a process of its own, looks for learned text, and places it."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from labsupport import PACKAGE
from labsupport.course.capstone import rules, worker
from labsupport.course.capstone.rules import BUDGETS, Count, Refused
from labsupport.course.capstone.worker import OTHER, OWN, SCORED, Spec
from labsupport.evidence import measurements
from labsupport.model import models
from labsupport.model.evaluate import Evaluation, Interval, paired_bootstrap

SECONDS = 1800  # that the process may take
# In nats a token. A quantized model loses a little more or less on one text than on another, and the more it loses the more it
# differs. Rows of data/measurements/capstone.json hold what was measured of models that never saw the text, under "gaps".
ALLOWED, ALLOWED_SHARE = 0.02, 0.5


@dataclass(frozen=True)
class Gap:
    """How much less a submission loses against the course model in float on one text than on other code, in nats a token.

    difference: negative where it loses less. low, high: 95 % interval over documents. allowed: how far below 0 it may be.
    """

    text: str
    difference: float
    low: float
    high: float
    allowed: float

    @property
    def is_learned(self) -> bool:
        """More than honest models differ, and not by chance."""
        return self.difference < -self.allowed and self.high < 0


@dataclass(frozen=True)
class Place:
    """Beside one baseline: how the submission's perplexity differs from its."""

    name: str
    nbytes: int
    perplexity: float
    difference: Interval

    @property
    def verdict(self) -> str:
        """ "better", "worse" or "tied", of the submission."""
        return "better" if self.difference.high < 0 else "worse" if self.difference.low > 0 else "tied"


@dataclass(frozen=True)
class Score:
    """What is known of a submission. places: among the baselines that keep the same budget, best first."""

    directory: str
    count: Count
    layout: str
    tensors: dict[str, int]
    evaluation: Evaluation
    change: Interval
    gaps: list[Gap] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    remark: str = ""

    @property
    def budget(self) -> str | None:
        return self.count.budget

    def lines(self) -> Iterator[str]:
        """For people."""
        total, header = self.count.total, self.count.total - sum(self.tensors.values())
        yield f"{self.directory}: {self.layout}, {total:,} bytes"
        parts = self.tensors | {"headers, config and all else": header}
        yield from (f"  {size:>10,} bytes  {kind}" for kind, size in parts.items())
        if self.budget is None:
            yield f"over every budget: the largest is {max(BUDGETS.values()):,} bytes"
        else:
            yield f"budget {self.budget}: {BUDGETS[self.budget]:,} bytes, {BUDGETS[self.budget] - total:,} left"
        yield f"perplexity {self.evaluation.perplexity:.3f}, {self.change} against the course model in float"
        for place in self.places:
            yield f"  {place.verdict:<6}  {place.name}: {place.perplexity:.3f} in {place.nbytes:,} bytes; {place.difference}"
        if self.places:
            ranks = [sum(place.verdict == verdict for place in self.places) for verdict in ("better", "tied", "worse")]
            yield f"better than {ranks[0]} of {len(self.places)}, tied with {ranks[1]}, worse than {ranks[2]}"
        if self.remark:
            yield self.remark

    def as_json(self) -> dict[str, Any]:
        """All of it, losses of documents included, so that two submissions can be compared."""
        return {
            "directory": self.directory, "bytes": self.count.total, "files": self.count.counted, "tensors": self.tensors,
            "layout": self.layout, "budget": self.budget, "perplexity": self.evaluation.perplexity,
            "change": asdict(self.change), "evaluation": worker.as_json(self.evaluation),
            "gaps": [asdict(gap) for gap in self.gaps],
            "places": [asdict(place) | {"verdict": place.verdict} for place in self.places], "remark": self.remark,
        }  # fmt: skip


def score(
    directory: str | Path, text: str | Path | None = None, windows: int = worker.WINDOWS, checked: int = worker.CHECKED
) -> Score:
    """Score a submission. text: a directory of text that takes the place of the course's; there are no baselines for it.

    Raises Refused with one line that says which rule is broken.
    """
    with tempfile.TemporaryDirectory(prefix="capstone-") as folder:
        copy, spec, out = (Path(folder) / name for name in ("copy", "spec.json", "answer.json"))
        copy.mkdir()
        count = rules.take(Path(directory), copy)
        asked = Spec(str(copy), str(out), secrets.token_hex(16), str(text) if text else None, windows, checked)
        spec.write_text(json.dumps(asdict(asked)), "utf-8")
        answer = _in_a_process(spec, out)
    if "refused" in answer:
        raise Refused(answer["refused"])
    submission, course = ({k: worker.from_json(v) for k, v in answer[who].items()} for who in ("submission", "float"))
    gaps = [gap(submission, course, name) for name in (SCORED, OWN) if OTHER in submission]
    for each in gaps:
        if each.is_learned:
            raise Refused(
                f"it has learned the held-out text ({each.text}): there it loses {-each.difference:.3f} nats a token less, against "
                f"the course model, than on other code; {each.allowed:.3f} are allowed"
            )
    evaluation, places, remark = submission[SCORED], [], ""
    if text is None:
        places, remark = _places(evaluation, count.budget)
    change = paired_bootstrap(course[SCORED], evaluation)
    return Score(str(directory), count, answer["layout"], answer["tensors"], evaluation, change, gaps, places, remark)


def _in_a_process(spec: Path, out: Path) -> dict[str, Any]:
    """Raises Refused where the process dies or takes too long: nothing but the submission differs from one run to another."""
    # Nothing of this process's settings, no module from a folder that it happens to stand in (-P), and no tokens that were kept.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LABS_", "HF_", "PYTHON", "CUDA_"))}
    environment = kept | {"PYTHONPATH": str(PACKAGE.parent), "LABS_CACHE": str(spec.parent), "HF_HUB_OFFLINE": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-P", "-m", "labsupport.course.capstone.worker", str(spec)]
    try:
        done = subprocess.run(command, cwd=spec.parent, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        raise Refused(f"its evaluation took more than {SECONDS} seconds") from error
    if done.returncode or not out.is_file():
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
        raise Refused(f"the process that reads it died: {reason}")
    return json.loads(out.read_text("utf-8"))


def gap(submission: dict[str, Evaluation], course: dict[str, Evaluation], name: str, samples: int = 2000) -> Gap:
    """Of text `name` against other code. The documents of either are drawn by themselves."""
    generator = torch.Generator().manual_seed(0)
    means, drawn = [], []
    for each in (name, OTHER):
        used = course[each].tokens > 0
        extra, tokens = (submission[each].loss - course[each].loss)[used], course[each].tokens[used]
        draws = torch.randint(0, len(tokens), (samples, len(tokens)), generator=generator)
        means.append((extra.sum() / tokens.sum()).item())
        drawn.append(extra[draws].sum(1) / tokens[draws].sum(1))
    low, high = torch.quantile(drawn[0] - drawn[1], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Gap(name, means[0] - means[1], low, high, ALLOWED + ALLOWED_SHARE * max(0.0, means[1]))


def rows_path() -> Path:
    """Where the rows of the baselines are."""
    return models.data_dir() / "measurements" / "capstone.json"


def _places(evaluation: Evaluation, budget: str | None) -> tuple[list[Place], str]:
    """Among the baselines of a budget; and a remark where there is nothing to compare with."""
    if budget is None:
        return [], ""
    if not rows_path().is_file():
        return [], "no places: no baselines have been measured. labs capstone --baselines does"
    about, rows = measurements.read(rows_path())
    if about["text_sha256"] != evaluation.sha256 or about["tokens"] != evaluation.tokens.tolist():
        return [], (
            f"no places: the baselines were measured on the text of Python {about['python']} in {about['windows']} windows. "
            "labs capstone --baselines measures them here"
        )
    places = []
    for row in rows:
        if row["budget"] == budget:
            loss = torch.tensor(row["loss"], dtype=torch.float64)
            other = Evaluation(loss, evaluation.tokens, about["windows"], evaluation.length, 0.0, evaluation.sha256)
            places.append(Place(row["name"], row["nbytes"], row["perplexity"], paired_bootstrap(other, evaluation)))
    return sorted(places, key=lambda place: place.perplexity), ""
