"""What was handed in is taken into the class's folder: each notebook once, under its hash, with whose it is and when it came."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from labsupport.course import workbook
from labsupport.grading.archive import MOST_BYTES, Archive, Entry, Unreadable, contents, read_notebook, shown
from labsupport.grading.cells import LARGEST_FILE
from labsupport.grading.classroom import Classroom
from labsupport.grading.naming import METADATA, TIMESTAMP, Claim, Namer, Roster
from labsupport.grading.records import Collected, GradingError, Release
from labsupport.grading.submission import OtherLab, read_bytes
from labsupport.model import files

MOST_LINES = 2000
CLOCKS = timedelta(minutes=10)  # by which two machines' clocks may differ


@dataclass
class Collection:
    """taken: what is new. lines: what could not be placed and what is odd, a sentence each. known: what was there before."""

    taken: list[Collected] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    known: int = 0


@dataclass
class _Batch:
    classroom: Classroom
    release: Release
    namer: Namer
    roster: Roster
    now: datetime
    fallback: datetime
    found: Collection
    there: dict[str, dict[str, Collected]]  # by learner and hash
    owners: dict[str, list[str]] = field(default_factory=dict)  # learners by hash


def collect(
    classroom: Classroom,
    lab: int,
    source: Path,
    kind: str = "auto",
    now: datetime | None = None,
    on_file: Callable[[int, int], None] = lambda done, of: None,
) -> Collection:
    """Take the notebooks of one lab from a folder, a zip or a single file.

    kind: how files are named, see naming.KINDS. now: for what lies in the future. on_file: called after each file. Taking the same
    files again adds nothing. Raises GradingError where nothing can be read, and WriteError where nothing can be written; what was
    taken before that is whole and stays.
    """
    release, archive, now = classroom.release(lab), contents(source), now or datetime.now(UTC)
    there: dict[str, dict[str, Collected]] = {}
    for one in classroom.collected(lab):
        there.setdefault(one.learner, {})[one.sha256] = one
    batch = _Batch(
        classroom,
        release,
        Namer(archive, kind, Path(release.notebook).stem),
        Roster(classroom.roster),
        now,
        datetime.fromtimestamp(source.stat().st_mtime, UTC),
        Collection(lines=list(archive.lines)),
        there,
    )
    for learner, mine in there.items():
        for digest in mine:
            batch.owners.setdefault(digest, []).append(learner)
    notebooks = _notebooks(archive, batch)
    total = 0
    for place, entry in enumerate(notebooks, 1):
        try:
            total += entry.size if entry.size <= LARGEST_FILE else 0  # what is larger is not read, and takes nobody's place
            if total > MOST_BYTES:
                raise Unreadable(f"comes after {MOST_BYTES / 1e9:.0f} GB of others: not taken")
            _take(entry, batch)
        except Unreadable as reason:
            batch.found.lines.append(f"{shown(entry.path)}: {reason}")
        on_file(place, len(notebooks))
    _remark_on_several(batch)
    if archive.zipped and batch.found.taken and batch.namer.kind in ("moodle", "canvas", "folder"):
        batch.found.lines.append("a zip has times without a zone: they were taken as this machine's")
    if not notebooks:
        batch.found.lines.append(f"{shown(source.name)} holds no notebooks (.ipynb)")
    lines = batch.found.lines
    if len(lines) > MOST_LINES:
        batch.found.lines = [*lines[:MOST_LINES], f"and {len(lines) - MOST_LINES} more such lines"]
    return batch.found


def _notebooks(archive: Archive, batch: _Batch) -> list[Entry]:
    """In the order of their names. Other files get a line each."""
    chosen = []
    for entry in sorted(archive.entries, key=lambda one: str(one.path)):
        suffix = entry.path.suffix.lower()
        if suffix == ".ipynb":
            chosen.append(entry)
        elif suffix == ".zip":
            batch.found.lines.append(f"{shown(entry.path)}: a zip in it is not opened; unpack it, and collect again")
        elif entry.path.name not in (METADATA, TIMESTAMP):
            batch.found.lines.append(f"{shown(entry.path)}: not a notebook (.ipynb), not taken")
    return chosen


def _take(entry: Entry, batch: _Batch) -> None:
    """Raises Unreadable with the reason where a file cannot be taken, or only by some of a group."""
    lab = batch.release.lab
    if (named := re.match(r"(\d\d)_", entry.path.name)) and entry.path.name != batch.release.notebook:
        stem = workbook.chapters().get(int(named[1]))
        if stem is not None and int(named[1]) != lab and entry.path.name.startswith(stem.stem):
            raise Unreadable(f"lab {named[1]} by its name, wanted lab {lab:02d}: not taken")
    claims = batch.namer.claims(entry)
    owners = _owners(claims, batch)
    raw = read_notebook(entry)
    remarks = list[str]()
    try:
        remarks += read_bytes(raw, shown(entry.path.name), lab, batch.release).remarks
    except OtherLab as error:
        raise Unreadable(f"{str(error).removeprefix(shown(entry.path.name)).strip()}: not taken") from None
    except GradingError as error:  # it is taken: its learner is to hear of it
        remarks.append(str(error))
        batch.found.lines.append(
            f"{shown(entry.path)}: {error}; taken, so that {', '.join(dict.fromkeys(owners.values()))} hears of it"
        )
    for claim, learner in owners.items():
        _keep(entry, raw, claim, learner, list(remarks), batch)


def _owners(claims: list[Claim], batch: _Batch) -> dict[Claim, str]:
    """The learner of each claim. In a plain folder the claims are guesses at the same learner; in a group each is another."""
    owners: dict[Claim, str] = {}
    reasons: list[str] = []
    for claim in claims:
        try:
            owners[claim] = batch.roster.find(claim)
        except Unreadable as reason:
            reasons.append(str(reason))
    if batch.namer.kind == "folder":
        if len(set(owners.values())) > 1:
            raise Unreadable(f"its name fits {' and '.join(sorted(set(owners.values())))}: not taken")
        if not owners:
            twice = next((reason for reason in reasons if " fits " in reason), "")
            raise Unreadable(twice or "no learner of the roster is named by its folder or its name: not taken")
        claim = next(iter(owners))
        return {claim: owners[claim]}
    if not owners:
        raise Unreadable("; ".join(reasons))
    batch.found.lines += reasons
    return owners


def _keep(entry: Entry, raw: bytes, claim: Claim, learner: str, remarks: list[str], batch: _Batch) -> None:
    digest = hashlib.sha256(raw).hexdigest()
    mine = batch.there.setdefault(learner, {})
    if digest in mine:
        batch.found.known += 1
        return
    when = claim.when or entry.modified
    if when is None:
        when = batch.fallback
        remarks.append("no time of its own is known; it has that of the file it came in")
    for odd in _odd_times(when, batch):
        remarks.append(odd)
        batch.found.lines.append(f"{shown(entry.path)}: {odd}")
    if claim.late:
        remarks.append("Canvas says that it was late")
    if not re.match(re.escape(Path(batch.release.notebook).stem), _original_name(entry, batch)):
        remarks.append(f"handed in as {shown(entry.path.name)}, wanted {batch.release.notebook}")
    same = [other for other in batch.owners.get(digest, []) if other != learner]
    if same:
        remarks.append(f"byte for byte the file of {', '.join(same)}")
        batch.found.lines.append(f"{shown(entry.path)}: byte for byte the file of {', '.join(same)}")
    folder = batch.classroom.folder_of("collected", batch.release.lab) / learner
    stored = folder / f"{digest}.ipynb"
    record = Collected(
        lab=batch.release.lab,
        learner=learner,
        sha256=digest,
        file=stored.relative_to(batch.classroom.folder).as_posix(),
        name=shown(entry.path),
        handed_in=when,
        remarks=tuple(dict.fromkeys(remarks)),
    )
    with files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = record.model_dump_json(indent=1) + "\n"
    files.replace_all(
        {stored: lambda path: path.write_bytes(raw), stored.with_suffix(".json"): lambda path: path.write_text(text, "utf-8")}
    )
    mine[digest] = record
    batch.owners.setdefault(digest, []).append(learner)
    batch.found.taken.append(record)


def _original_name(entry: Entry, batch: _Batch) -> str:
    """Without what the system put before it."""
    name = entry.path.name
    if batch.namer.kind == "canvas":
        return re.sub(r"^\w+?(_LATE)?_\d+_\d+_", "", name)
    if batch.namer.kind == "moodle":
        return re.sub(r"^.+_assignsubmission_file_", "", name)
    return name


def _odd_times(when: datetime, batch: _Batch) -> list[str]:
    if when > batch.now + CLOCKS:
        return [f"handed in at {when.isoformat(timespec='minutes')}, which is in the future: a clock is wrong"]
    released = batch.release.released
    if released is not None and when < released - CLOCKS:
        return [f"handed in at {when.isoformat(timespec='minutes')}, before the lab was released: a clock is wrong"]
    return []


def _remark_on_several(batch: _Batch) -> None:
    fresh = {one.learner for one in batch.found.taken}
    policy = batch.classroom.settings.policy.repeated
    for learner in sorted(fresh):
        if (count := len(batch.there[learner])) > 1:
            batch.found.lines.append(
                f"{learner} has {count} different files for this lab; by the class's policy the {policy} counts"
            )
