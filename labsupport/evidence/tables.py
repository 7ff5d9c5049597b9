"""The planner's tables in data/planner: models, cards, formats, rules. Checked when they are read, and found by name."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from labsupport.evidence import claims
from labsupport.evidence.configs import shape_of
from labsupport.evidence.roofline import Device
from labsupport.evidence.shapes import Shape
from labsupport.model import models

T = TypeVar("T")
RESERVE = 0.10  # of a card's memory: what gpu_memory_utilization 0.9 in vLLM leaves to the driver, kernels and fragments
QUALITIES = ("near-lossless", "little-loss", "smallest")
TASKS = ("serve", "finetune")
UNITS = ("half", "int8", "fp8", "fp4")
FAMILIES = ("turing", "ampere", "ada", "hopper", "blackwell", "cdna3", "apple", "cpu")
KINDS = ("datacenter", "consumer", "unified", "cpu")


@dataclass(frozen=True)
class Published:
    """A count of parameters from elsewhere. rounding: how far it may be off; also, of: values in it that are no weights of ours."""

    parameters: int | float
    source: str
    rounding: float = 0
    also: int = 0
    of: str = ""


@dataclass(frozen=True)
class Architecture:
    """A published model: its id on the hub, where config.json is, and its shape."""

    name: str
    hub: str
    shape: Shape
    published: Published
    config: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Card:
    """A machine. memory: bytes; bandwidth: bytes/s; rates: operations/s by units, dense. reserve: share of memory not to be had."""

    name: str
    family: str
    kind: str
    memory: float
    bandwidth: float
    rates: Mapping[str, float]
    source: str
    reserve: float = RESERVE

    def rate(self, units: str) -> float | None:
        """Of these units, or of those for 16 bits where the card has none; None where the maker gives no rate."""
        return self.rates.get(units, self.rates.get("half"))

    def device(self, units: str = "half") -> Device:
        """For a roofline. Raises ValueError where the maker gives no rate."""
        rate = self.rate(units)
        if rate is None:
            raise ValueError(f"the maker of {self.name} gives no rate of operations")
        return Device(self.name, self.bandwidth, rate, self.memory, self.source)


@dataclass(frozen=True, eq=False)
class Format:
    """How weights are stored; the fields are those of data/planner/formats.yaml. Equal to itself alone."""

    name: str
    title: str
    bits: float
    made_with: str
    group: int | str | None = None
    scale: float = 0
    zero: float = 0
    embedding: float = 16
    head: float = 16
    arithmetic: str = "half"
    only: str | None = None
    more: Mapping[str, Any] | None = None
    block: int | None = None
    measured: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Rule:
    """One line of data/planner/rules.yaml. An empty field says nothing about it."""

    task: str
    format: str
    reason: str
    evidence: tuple[Mapping[str, Any], ...]
    quality: str | None = None
    families: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    native: str | None = None

    def speaks_of(self, shape: Shape, card: Card, quality: str, task: str) -> bool:
        """Whether all that the rule asks for is so."""
        return (
            task == self.task
            and (self.quality is None or quality == self.quality)
            and (not self.families or card.family in self.families)
            and (not self.kinds or card.kind in self.kinds)
            and (self.native is None or shape.native == self.native)
        )


@cache
def architectures() -> Mapping[str, Architecture]:
    """By name. Raises ValueError for a table that is not as it should be, which names the row."""
    return _table("architectures", _architecture)


@cache
def cards() -> Mapping[str, Card]:
    """By name, as `architectures`."""
    return _table("cards", _card)


@cache
def formats() -> Mapping[str, Format]:
    """By name, as `architectures`."""
    return _table("formats", _format)


@cache
def rules() -> tuple[Rule, ...]:
    """In the order in which they are tried."""
    return tuple(rows("rules", _rule))


def rows(name: str, make: Callable[..., T]) -> list[T]:
    """What `make` makes of each entry of data/planner/NAME.yaml. Raises ValueError that names the row it cannot make one of."""
    import yaml

    path = models.data_dir() / "planner" / f"{name}.yaml"
    found = []
    for number, row in enumerate(yaml.safe_load(path.read_text("utf-8"))):
        try:
            found.append(make(**row))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{path.name}, row {number + 1} ({row.get('name', row.get('format'))}): {error}") from error
    return found


def _table(name: str, make: Callable[..., Any]) -> Mapping[str, Any]:
    entries = rows(name, make)
    found = {entry.name: entry for entry in entries}
    if len(found) != len(entries):
        raise ValueError(f"{name}.yaml has a name twice")
    return MappingProxyType(found)


def _architecture(config: dict[str, Any], published: dict[str, Any], **row: Any) -> Architecture:
    counted = Published(**published)
    shape = shape_of(config, row["name"])
    ours, theirs = shape.parameters, counted.parameters - counted.also
    if abs(ours - theirs) > counted.rounding:
        raise ValueError(f"its config gives {ours:,} parameters, published are {theirs:,.0f}")
    return Architecture(**row, shape=shape, published=counted, config=MappingProxyType(config))


def _card(memory: float, bandwidth: float, rates: dict[str, float], **row: Any) -> Card:
    _among(row["family"], "family", FAMILIES)
    _among(row["kind"], "kind", KINDS)
    for units in rates:
        _among(units, "rates", UNITS)
    if not all(value > 0 for value in (memory, bandwidth, *rates.values())) or not row["source"]:
        raise ValueError("memory, bandwidth and rates are above 0 and have a source")
    rates = MappingProxyType({units: 1e12 * rate for units, rate in rates.items()})
    return Card(**row, memory=1e9 * memory, bandwidth=1e9 * bandwidth, rates=rates)


def _format(measured: list[dict[str, Any]] | None = None, **row: Any) -> Format:
    _among(row.get("arithmetic", "half"), "arithmetic", UNITS)
    return Format(**row, measured=tuple(measured or ()))


def _rule(evidence: list[dict[str, Any]], families: tuple[str, ...] = (), kinds: tuple[str, ...] = (), **row: Any) -> Rule:
    _among(row["task"], "task", TASKS)
    _among(row["format"], "format", tuple(formats()))
    if row.get("quality") is not None:
        _among(row["quality"], "quality", QUALITIES)
    for family in families:
        _among(family, "families", FAMILIES)
    for kind in kinds:
        _among(kind, "kinds", KINDS)
    if not evidence or not row["reason"]:
        raise ValueError("a rule has a reason and evidence")
    for each in evidence:
        if each.keys() == {"claim"} and each["claim"] not in claims.claims():
            raise ValueError(f"there is no claim {each['claim']}")
        if each.keys() not in ({"claim"}, {"cite"}):
            raise ValueError(f"evidence is {each}, wanted a claim or a cite")
    return Rule(**row, evidence=tuple(evidence), families=tuple(families), kinds=tuple(kinds))


def _among(value: str, name: str, wanted: tuple[str, ...]) -> None:
    if value not in wanted:
        raise ValueError(f"{name} is {value!r}, wanted one of {', '.join(wanted)}")


def _key(name: str) -> str:
    """Letters and digits alone, without what people leave out or add."""
    name = re.sub(r"\b(nvidia|geforce|amd|instinct|meta|gpu)\b", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", name)


def _find(name: str, what: str, table: Mapping[str, T], others: Mapping[str, T]) -> T:
    """The entry with this name, however it is spelled, or the only one that it is a part of; others: more names."""
    by_key = {_key(each): entry for each, entry in {**others, **table}.items()}
    if (key := _key(name)) in by_key:
        return by_key[key]
    parts = {id(entry): entry for each, entry in by_key.items() if key and key in each}
    if len(parts) == 1:
        return next(iter(parts.values()))
    if parts:
        names = [each for each, entry in table.items() if id(entry) in parts]
        raise ValueError(f"{what} is {name!r}, which may be {', '.join(names)}")
    near = difflib.get_close_matches(key, [_key(each) for each in table], n=3, cutoff=0.4)
    names = [each for key in near for each in table if _key(each) == key]
    nearest = f"; nearest: {', '.join(names)}" if names else ""
    raise ValueError(f"{what} is {name!r}, which is not in the table{nearest}. `labs plan --list` prints what is")


def card(name: str) -> Card:
    """A card by its name, in any spelling: "rtx 4090", "NVIDIA T4". Raises ValueError with the nearest names."""
    return _find(name, "gpu", cards(), {})


def model(name: str | Path) -> Shape:
    """The shape of a model of the table, of a config.json, or of a directory that holds one; nothing is downloaded.

    Raises ValueError with the nearest names, and for a config that is not read here.
    """
    path = Path(name)
    if path.is_dir() or path.is_file() or path.suffix == ".json":
        return _from_file(path / "config.json" if path.is_dir() else path)
    table = architectures()
    hub = {key: entry for entry in table.values() for key in (entry.hub, entry.hub.rsplit("/", 1)[1])}
    plain = re.sub(r"[-_](instruct|chat|hf|it)$", "", str(name), flags=re.IGNORECASE)
    try:
        return _find(plain, "model", table, hub).shape
    except ValueError as error:
        raise ValueError(f"{error}; or name a config.json, or a directory with one") from None


def _from_file(path: Path) -> Shape:
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no config of a model")
    try:
        return shape_of(config, path.parent.resolve().name)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
