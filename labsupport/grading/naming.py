"""Whose file is it? How learning-management systems name what they hand out together, and how that is matched to a roster.

Looked up in the sources of what writes them. Moodle (mod/assign/classes/downloader.php): "Full
Name_1_assignsubmission_file/x.ipynb", in older versions with one more underscore, and "Full
Name_12_assignsubmission_file_x.ipynb" without folders; the number is Moodle's own. Canvas (lib/content_zipper.rb):
"lastfirst_LATE_12_34_x.ipynb", the sortable name in small letters without blanks, the user's number, the file's. nbgrader:
"user+assignment+time+random/x.ipynb" in its exchange, and submitted/user/assignment/x.ipynb, both with timestamp.txt.
Gradescope's export ("submission_12/x.ipynb" and submission_metadata.yml) is not documented; several public scripts that read it
agree on its keys.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Literal

from labsupport.grading.archive import Archive, Entry, Unreadable, shown
from labsupport.grading.classroom import Learner
from labsupport.grading.records import GradingError

Kind = Literal["auto", "folder", "moodle", "canvas", "gradescope", "nbgrader"]
KINDS: tuple[Kind, ...] = ("auto", "folder", "moodle", "canvas", "gradescope", "nbgrader")

MOODLE = re.compile(r"(?P<name>.+)_(?P<id>\d+)_assignsubmission_file(_.*)?")
CANVAS = re.compile(r"(?P<name>\w+?)(?P<late>_LATE)?_(?P<id>\d+)_(?P<file>\d+)_(?P<rest>.+)")
EXCHANGE = re.compile(r"(?P<id>.+?)\+(?P<assignment>[^+]+)\+(?P<time>[^+]+)(\+[^+]*)?")
METADATA, TIMESTAMP = "submission_metadata.yml", "timestamp.txt"
LARGEST_METADATA = 10**7  # bytes


@dataclass(frozen=True)
class Claim:
    """What a name says about whose a file is. joined: a name without blanks, in small letters. when: it was handed in.

    perhaps: what is an id only where the name is nobody's: the first word of "ada Ada Byron", but not of "Ada Byron".
    """

    ids: tuple[str, ...] = ()
    perhaps: str = ""
    email: str = ""
    name: str = ""
    joined: str = ""
    when: datetime | None = None
    late: bool = False

    def __str__(self) -> str:
        return self.name or self.joined or self.email or (self.ids[0] if self.ids else "nobody")


def plain(text: str) -> tuple[str, ...]:
    """A name's words in small letters without accents, in alphabetical order: "Müller, Jörg" and "JORG MULLER" are alike."""
    return tuple(sorted(_words(text)))


def _words(text: str) -> list[str]:
    decomposed = unicodedata.normalize("NFKD", text.casefold().replace("'", "").replace("\u2019", ""))
    letters = "".join(c for c in decomposed if not unicodedata.combining(c))
    return re.findall(r"[^\W_]+", letters)


class Roster:
    """Finds learners by what a claim says: an id, else an address, else a name. What fits two fits none."""

    def __init__(self, learners: Mapping[str, Learner]) -> None:
        self.ids = {learner.casefold(): learner for learner in learners}
        self.emails = {one.email.casefold(): one.id for one in learners.values() if one.email}
        self.names: dict[tuple[str, ...], list[str]] = {}
        self.joined: dict[str, set[str]] = {}
        for one in learners.values():
            if words := _words(one.name):
                self.names.setdefault(tuple(sorted(words)), []).append(one.id)
                for place in range(len(words)):  # the last name may have several words
                    self.joined.setdefault("".join(words[place:] + words[:place]), set()).add(one.id)

    def find(self, claim: Claim) -> str:
        """Raises Unreadable with the reason where nobody, or more than one, fits."""
        exact = {self.ids[id.casefold()] for id in claim.ids if id.casefold() in self.ids}
        if claim.email.casefold() in self.emails:
            exact.add(self.emails[claim.email.casefold()])
        exact |= {self.emails[id.casefold()] for id in claim.ids if id.casefold() in self.emails}
        if len(exact) > 1:
            raise Unreadable(f"its id and address are of different learners, {' and '.join(sorted(exact))}: not taken")
        if exact:
            return exact.pop()
        named = set(self.names.get(plain(claim.name), [])) if claim.name else set()
        if claim.joined:
            named |= self.joined.get("".join(_words(claim.joined)), set())
        if len(named) > 1:
            raise Unreadable(f"{str(claim)!r} fits {' and '.join(sorted(named))}: not taken")
        if named:
            return named.pop()
        if claim.perhaps.casefold() in self.ids:
            return self.ids[claim.perhaps.casefold()]
        raise Unreadable(f"{str(claim)!r} is not on the roster: not taken")


class Namer:
    """Reads names of one kind. kind: "auto" looks at what is there."""

    def __init__(self, archive: Archive, kind: str, stem: str) -> None:
        if kind not in KINDS:
            raise GradingError(f"--from is {kind!r}, wanted {', '.join(KINDS)}")
        self.kind = kind if kind != "auto" else recognized(archive.entries)
        self.stem = stem
        self.files = {entry.path: entry for entry in archive.entries}
        self.metadata: dict[PurePosixPath, Any] = {}
        # What lies deeper than others is in a folder that a learner made, and says nothing about whose it is.
        depths = [len(entry.path.parts) for entry in archive.entries if entry.path.suffix.lower() == ".ipynb"]
        self.depth = max(3, min(depths, default=3))
        if self.kind == "gradescope":
            entry = _export(archive.entries)
            if entry is None:
                raise GradingError(f"there is no {METADATA}, which Gradescope's export has")
            self.metadata[entry.path.parent] = _metadata(entry)

    def claims(self, entry: Entry) -> list[Claim]:
        """One, or for a group's submission several. Raises Unreadable where a name is not of this kind."""
        return {
            "moodle": self._moodle,
            "canvas": self._canvas,
            "gradescope": self._gradescope,
            "nbgrader": self._nbgrader,
            "folder": self._folder,
        }[self.kind](entry)

    def _moodle(self, entry: Entry) -> list[Claim]:
        for part in entry.path.parts:
            if found := MOODLE.fullmatch(part):
                # With the option to put usernames before, the first word is one.
                return [Claim(ids=(found["name"],), name=found["name"], perhaps=found["name"].partition(" ")[0])]
        raise Unreadable("has no name of Moodle's (Full Name_1234_assignsubmission_file...): not taken")

    def _canvas(self, entry: Entry) -> list[Claim]:
        if found := CANVAS.fullmatch(entry.path.name):
            return [Claim(ids=(found["id"],), joined=found["name"], late=bool(found["late"]))]
        raise Unreadable("has no name of Canvas' (lastfirst_12_34_name.ipynb): not taken")

    def _gradescope(self, entry: Entry) -> list[Claim]:
        for root, table in self.metadata.items():
            if entry.path.is_relative_to(root):
                folder = entry.path.relative_to(root).parts[0]
                if isinstance(record := table.get(folder), dict):
                    claims = [_submitter(one, record.get(":created_at")) for one in _list(record.get(":submitters"))]
                    if claims:
                        return claims
        raise Unreadable(f"{METADATA} says nothing about it: not taken")

    def _nbgrader(self, entry: Entry) -> list[Claim]:
        parts = entry.path.parts
        for part in parts[:-1]:
            if found := EXCHANGE.fullmatch(part):
                return [Claim(ids=(found["id"],), when=_moment(found["time"]) or self._timestamp(entry))]
        if len(parts) >= self.depth:
            return [Claim(ids=(parts[self.depth - 3],), when=self._timestamp(entry))]
        raise Unreadable("is not at LEARNER/ASSIGNMENT/name.ipynb, as in nbgrader's folder submitted: not taken")

    def _folder(self, entry: Entry) -> list[Claim]:
        """A folder or a file named after the learner, by id, address or name, beside the notebook's own name or not."""
        stem = re.sub(r"( ?\(\d+\)|-\d+| - Copy|-Copy\d+)$", "", entry.path.stem)
        rest = re.sub(rf"^{re.escape(self.stem)}[ _+-]*|[ _+-]*{re.escape(self.stem)}$", "", stem)
        return [Claim(ids=(word,), name=word) for word in (*reversed(entry.path.parts[:-1]), entry.path.stem, stem, rest) if word]

    def _timestamp(self, entry: Entry) -> datetime | None:
        parts = entry.path.parts
        places = [place for place, part in enumerate(parts[:-1], 1) if EXCHANGE.fullmatch(part)] or [self.depth - 1]
        beside = self.files.get(PurePosixPath(*parts[: places[0]], TIMESTAMP))
        try:
            return _moment(beside.read(200).decode("ascii", "replace")) if beside else None
        except Unreadable:
            return None


def recognized(entries: Sequence[Entry]) -> str:
    """The kind of which most names are."""
    notebooks = [entry.path for entry in entries if entry.path.suffix.lower() == ".ipynb"]
    names = [entry.path.name for entry in entries]
    export = _export(entries)
    root = export.path.parent if export else None
    counts = {
        "gradescope": sum(path.is_relative_to(root) and len(path.relative_to(root).parts) > 1 for path in notebooks) if root else 0,
        "moodle": sum(any(map(MOODLE.fullmatch, path.parts)) for path in notebooks),
        "canvas": sum(bool(CANVAS.fullmatch(path.name)) for path in notebooks),
        "nbgrader": sum(any(map(EXCHANGE.fullmatch, path.parts[:-1])) for path in notebooks),
    }
    if TIMESTAMP in names:
        counts["nbgrader"] = max(counts["nbgrader"], sum(len(path.parts) >= 3 for path in notebooks))
    if root and any(map(MOODLE.fullmatch, root.parts)):
        counts["gradescope"] = 0  # a file that a learner called so
    best = max(counts, key=lambda kind: counts[kind])
    return best if 2 * counts[best] > len(notebooks) else "folder"


def _export(entries: Iterable[Entry]) -> Entry | None:
    """Gradescope's own table: the one that lies highest. What a learner calls so lies in a folder of theirs."""
    found = [entry for entry in entries if entry.path.name == METADATA]
    return min(found, key=lambda entry: len(entry.path.parts), default=None)


def _metadata(entry: Entry) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped]

    try:
        raw = entry.read(LARGEST_METADATA + 1)
        if len(raw) > LARGEST_METADATA:
            raise GradingError(f"{METADATA} has more than {LARGEST_METADATA / 1e6:.0f} MB")
        found = yaml.load(raw, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, Unreadable, ValueError, RecursionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise GradingError(f"{METADATA} cannot be read: {shown(reason)}") from None
    if not isinstance(found, dict):
        raise GradingError(f"{METADATA} holds no table of submissions")
    return {str(key): value for key, value in found.items()}


def _submitter(one: Any, created: Any) -> Claim:
    about = one if isinstance(one, dict) else {}
    sid, email, name = (str(about.get(key) or "") for key in (":sid", ":email", ":name"))
    when = created if isinstance(created, datetime) else _moment(str(created)) if created else None
    if when is not None and when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return Claim(ids=(sid,) if sid else (), email=email, name=name, when=when)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _moment(text: str) -> datetime | None:
    """A time as nbgrader writes it, "2027-02-02 15:58:23.948203 UTC", or in ISO 8601; without a zone it is UTC."""
    cleaned = re.sub(r" ?(UTC|GMT|Z)$", "+00:00", text.strip())
    cleaned = re.sub(r"(\.\d{6})\d+", r"\1", cleaned)
    cleaned = re.sub(r" ([+-]\d\d:?\d\d)$", r"\1", cleaned)
    try:
        when = datetime.fromisoformat(cleaned)
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)
