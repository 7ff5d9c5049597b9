"""What is known of a class, a submission and its mark, as data. Everything on disk is JSON that these models have checked."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from labsupport.model import files

# What became of an answer. "pass"; "wrong": it ran, and its outputs are not right; "blank": the stub; "raised": it raised, or gave
# what cannot be used; "stopped": a limit of the sandbox ended it; "missing": the notebook has no such answer; "unmarked": the
# machine or the course failed, not the learner, and it will be tried again.
Outcome = Literal["pass", "wrong", "blank", "raised", "stopped", "missing", "unmarked"]


class GradingError(Exception):
    """One line for the instructor: what is wrong, with its name, and what to do."""


class Record(BaseModel):
    """A frozen model that refuses fields it does not know, and reads and writes JSON files that are never half there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def write(self, path: Path) -> None:
        files.write_text(path, self.model_dump_json(indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises GradingError naming the file and the field."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise GradingError(f"{path}: {where}: {first['msg']}") from None
        except (OSError, json.JSONDecodeError) as error:
            raise GradingError(f"{path} cannot be read: {error}") from None


class Release(Record):
    """A lab as it was handed out.

    lab: the chapter. points: of the exercises that count, by id, as the class has them. due: when, with a time zone; None for no
    date. own_numbers: whether each learner's copy has numbers of its own. notebook: name of the file that was handed out. released:
    when it was first handed out.
    """

    lab: int
    points: dict[str, float]
    due: datetime | None = None
    own_numbers: bool = False
    notebook: str
    released: datetime | None = None


class Policy(Record):
    """How marks are made of what was found.

    late: share of the mark that each day begun after `due` costs, and last_day: after how many days nothing is taken. repeated:
    which submission of several counts. partial: share of an answer's points that it can get when some of its outputs are right
    and others are not. understanding: by how much exercises count that ask to find an input or to explain an output.
    """

    late: float = Field(0.1, ge=0, le=1)
    last_day: int = Field(7, ge=0)
    repeated: Literal["last", "best", "first"] = "last"
    partial: float = Field(0.5, ge=0, le=1)
    understanding: float = Field(1.0, gt=0)


class Submission(Record):
    """What is taken from a notebook that was handed in: text and numbers, never code that has run.

    answers: source of each answer by exercise id, as it was written; an exercise that the notebook does not have is not in it.
    others: sources of the cells that the learner added or changed and that belong to no answer, in their order.
    predictions: what was written for each prediction, by the name that the cell sets; a number or a text, None for none.
    own: numbers of the learner's own that were written down, by exercise id or "prediction". remarks: oddities, a sentence each.
    """

    answers: dict[str, str]
    others: tuple[str, ...] = ()
    predictions: dict[str, float | str | None] = {}
    own: dict[str, float | None] = {}
    remarks: tuple[str, ...] = ()


class Collected(Record):
    """A file as it was handed in, kept under its SHA-256 in the class's folder.

    file: path of the notebook, relative to the class's folder. handed_in: as the learning-management system or the file says it.
    """

    lab: int
    learner: str
    sha256: str
    file: str
    name: str = ""
    handed_in: datetime
    remarks: tuple[str, ...] = ()


class Marked(Record):
    """One exercise of one submission. points: earned, of `of`. message: the sentence of the judge, as the learner may read it.

    seconds: of the answer in the sandbox, all inputs together. share: of its outputs that were right, 1 for a pass. printed: the
    beginning of what it printed. figures: numbers for the learner, by name, such as the largest difference and the one allowed.
    """

    outcome: Outcome
    points: float
    of: float
    message: str = ""
    seconds: float = 0.0
    share: float = 0.0
    printed: str = ""
    figures: dict[str, float] = {}


class Result(Record):
    """All that was found in one submission; its file is the only truth, and the gradebook is made of such files.

    seconds: of the whole submission. in_sandbox: of these, how long its processes ran. problems: why nothing, or not all, could be
    marked, a sentence each. own: for each exercise with numbers of the learner's own: "right", "wrong", "blank", or whose it is.
    """

    lab: int
    learner: str
    sha256: str
    handed_in: datetime
    marks: dict[str, Marked]
    predictions: dict[str, float | str | None] = {}
    own: dict[str, str] = {}
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    seconds: float = 0.0
    in_sandbox: float = 0.0
    versions: dict[str, str] = {}
    sandbox: str = ""

    @property
    def points(self) -> float:
        return sum(mark.points for mark in self.marks.values())

    @property
    def final(self) -> bool:
        """Whether nothing is left to try again."""
        return all(mark.outcome != "unmarked" for mark in self.marks.values())


class Override(Record):
    """A mark set by hand. Kept beside results, never in them."""

    lab: int
    learner: str
    exercise: str
    points: float
    reason: str = Field(min_length=1)
    by: str = ""
    when: datetime
