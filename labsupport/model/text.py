"""Text to train on, calibrate with and evaluate on, as one stream of tokens that remembers its documents.

The default text is what every Python installation carries: the standard library's source ("code") and the language
reference in `pydoc_data.topics` ("prose"). A third text, on which the course model was never trained, is the documentation
of NumPy ("numpy"): the long strings in the source of the package that is installed. A hash of its name decides whether a
document is held out, so the split is the same on every machine. The library's own tests and the character-set tables are
never used. `LABS_TEXT` names another text: one that `labs fetch` made, a directory of files, which has the two splits where
it holds the folders train and heldout, or a Hugging Face dataset. Tokens of long texts are kept in the user's cache folder,
or in LABS_CACHE: cutting the default text to train on takes ten seconds of a processor or more, reading its tokens a moment.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from labsupport.install import get_extra
from labsupport.model import fetched, files
from labsupport.quant import checks

# Of 256 names this many are held out: one module in ten; one topic in four, since there are only some eighty; so with NumPy.
HELD_OUT = {"code": 26, "prose": 64, "numpy": 64}
DOMAINS = tuple(HELD_OUT)
NAMES = (*DOMAINS, *fetched.TEXTS)
SPLITS = ("train", "heldout")
HUB_DATASETS = {"wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}
CACHED_BYTES = 200_000  # of text; what is shorter is cut in less than half a second
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
# Not source to learn from: installed packages, the library's tests, tables of character sets, files written by the build.
SKIPPED_PARTS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__phello__", "__pycache__"}
SKIPPED_PATHS = re.compile(r"^(_sysconfigdata|config-|pydoc_data/topics)")
LONG = 200  # characters from which on a string in NumPy's source is taken for documentation


class TextError(ValueError):
    """A text does not exist, cannot be read, or is too short."""


@dataclass(frozen=True)
class Document:
    """One file, topic or article. `name` is the same on every machine."""

    name: str
    text: str


@dataclass(frozen=True)
class TokenStream:
    """Documents as one row of tokens, each document ended by the end-of-text token.

    ids: int64 [tokens]. document: int64 [tokens], the index into `names` of the document a token belongs to.
    bytes: length of all texts in UTF-8. sha256: of names and texts, so that two figures can be known to be on one text.
    """

    ids: torch.Tensor
    document: torch.Tensor
    names: tuple[str, ...]
    bytes: int
    sha256: str
    source: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def domain(self) -> str:
        """What to call the text: "code" of code/heldout, of a directory the last part of its name that names no split."""
        parts = [part for part in Path(self.source).parts if part not in SPLITS]
        return parts[-1] if parts else self.source

    def windows(self, length: int, count: int | None = None) -> torch.Tensor:
        """Start of every window of `length` tokens, or of `count` of them spread evenly. int64 [windows].

        Windows follow each other without overlap; the tail that does not fill one is left out.
        Raises TextError where the stream is shorter than one window.
        """
        length = checks.whole(length, "length")
        count = None if count is None else checks.whole(count, "windows")
        available = len(self) // length
        if available == 0:
            raise TextError(f"the text {self.source!r} has {len(self)} tokens, fewer than one window of {length}")
        if count is None or count >= available:
            return torch.arange(available) * length
        return (torch.arange(count) * available // count) * length

    def positions(self, length: int, count: int | None = None) -> torch.Tensor:
        """Which tokens each window holds: an index into `ids` and `document`. int64 [windows, length].

        The windows are those of `windows`. Raises TextError where the stream is shorter than one window.
        """
        return self.windows(length, count)[:, None] + torch.arange(length)


def is_held_out(name: str, domain: str) -> bool:
    """Decided by the first byte of the SHA-256 of the document's name, so the same on every machine."""
    return hashlib.sha256(name.encode()).digest()[0] < HELD_OUT[domain]


def _standard_library() -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, below, found in os.walk(root):
        below[:] = set(below) - SKIPPED_PARTS  # not walked through: there may be many installed packages
        paths += [Path(folder, name) for name in found if name.endswith(".py")]
    documents = []
    for path in sorted(paths):
        name = path.relative_to(root).as_posix()
        if SKIPPED_PATHS.match(name):
            continue
        text = path.read_text("utf-8", errors="replace")
        if text.strip():
            documents.append(Document(name, text))
    return documents


def _language_reference() -> list[Document]:
    from pydoc_data.topics import topics

    return [Document(f"topic:{name}", text) for name, text in sorted(topics.items())]


def _numpy_documentation() -> list[Document]:
    """The long strings of each module of the installed NumPy, in the order of its source, which is read and not imported."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or spec.origin is None:
        raise TextError("the text 'numpy' is the documentation in NumPy's source, and NumPy is not installed: pip install numpy")
    root = Path(spec.origin).parent
    documents = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root.parent).as_posix()
        if SKIPPED_PARTS.isdisjoint(Path(name).parts):
            nodes = ast.walk(ast.parse(path.read_text("utf-8")))
            strings = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            if long := [inspect.cleandoc(string) for string in strings if len(string) >= LONG]:
                documents.append(Document(name, "\n\n".join(long)))
    return documents


def _directory(path: Path) -> list[Document]:
    files = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
    if not files:
        raise TextError(f"the directory {str(path)!r} holds no text: wanted files ending in {', '.join(TEXT_SUFFIXES)}")
    return [Document(p.relative_to(path).as_posix(), p.read_text("utf-8", errors="replace")) for p in files]


def _hub(name: str) -> list[Document]:
    """Rows of the column `text` of a Hugging Face dataset (an id, or a directory laid out like one)."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise TextError(f"the text {name!r} comes from the Hugging Face hub: {get_extra('hub')}") from error
    path, config, split = HUB_DATASETS.get(name, (name, None, "test"))
    try:
        rows = load_dataset(path, config, split=split)
    except Exception as error:  # of a network, a missing name, a script: each has its own
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise TextError(f"no text {name!r}: neither a directory nor a dataset that can be read ({reason})") from error
    if "text" not in rows.column_names:
        raise TextError(f"the dataset {name!r} has no column 'text', it has {rows.column_names}")
    # Benchmarks such as WikiText hold one line a row; joined, they are the text that published perplexities are measured on.
    return [Document(f"{name}:{split}", "\n\n".join(rows["text"]))]


def documents(domain: str = "code", split: str = "heldout") -> list[Document]:
    """The documents of a text that has two splits, "train" and "heldout".

    domain: "code" or "prose", of the default text; "numpy"; the name of a text that `labs fetch` made; or a directory that holds
    a folder for each split. Raises TextError for another one.
    """
    if split not in SPLITS:
        raise TextError(f"split is {split!r}, wanted one of {', '.join(SPLITS)}")
    if domain in DOMAINS:
        everything = {"code": _standard_library, "prose": _language_reference, "numpy": _numpy_documentation}[domain]()
        return [d for d in everything if is_held_out(d.name, domain) == (split == "heldout")]
    folder = _split_folder(domain, split)
    if folder is None:
        raise TextError(f"domain is {domain!r}, wanted one of {', '.join(NAMES)}, or a directory with {' and '.join(SPLITS)}")
    return _directory(folder)


def _split_folder(name: str, split: str) -> Path | None:
    """The folder of one split of a fetched text, or of a directory that holds both. Raises TextError for a text not fetched."""
    try:
        path = fetched.find(name, "text")
    except fetched.NotFetched as error:
        raise TextError(str(error)) from error
    if path is None and not all(os.path.isdir(os.path.join(name, each)) for each in SPLITS):
        return None
    return (path or Path(name)) / split


def tokenize(tokenizer, texts: Iterable[Document], source: str) -> TokenStream:
    """Join documents into one TokenStream with the tokenizer's end-of-text token after each."""
    if not callable(tokenizer) or not hasattr(tokenizer, "eos_token_id"):
        raise TypeError(f"tokenizer is {checks.kind(tokenizer)}, wanted a tokenizer of transformers")
    texts = list(texts)
    if not texts:
        raise TextError(f"the text {source!r} is empty")
    digest = hashlib.sha256()
    for d in texts:
        if not isinstance(d.text, str):
            raise TypeError(f"the document {d.name!r} is {checks.kind(d.text)}, wanted text")
        try:
            digest.update(f"{d.name}\0{d.text}\0".encode())
        except UnicodeEncodeError as error:  # half of a pair of UTF-16
            raise TextError(f"the document {d.name!r} holds {error.object[error.start]!r}, which has no form in UTF-8") from error
    sha256, size = digest.hexdigest(), sum(len(d.text.encode()) for d in texts)
    cached = _cache_file(tokenizer, sha256) if size >= CACHED_BYTES else None
    kept = _read_cache(cached, len(texts)) if cached else None
    ids, lengths = kept or _cut(tokenizer, texts)
    if cached and not kept:
        _write_cache(cached, ids, lengths)
    return TokenStream(
        ids=ids,
        document=torch.repeat_interleave(torch.arange(len(lengths)), lengths),
        names=tuple(d.name for d in texts),
        bytes=size,
        sha256=sha256,
        source=source,
    )


def _cut(tokenizer, texts: list[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of all documents, int64 [tokens], and how many each has, int64 [documents]."""
    encoded = tokenizer([d.text for d in texts], add_special_tokens=False, verbose=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [torch.tensor(ids + end, dtype=torch.int64) for ids in encoded]
    return torch.cat(pieces), torch.tensor([len(piece) for piece in pieces])


def _cache_file(tokenizer, sha256: str) -> Path | None:
    """Where tokens of this text by this tokenizer are kept. None for a tokenizer whose rules are not in one place."""
    if not getattr(tokenizer, "is_fast", False):
        return None
    from tokenizers import __version__

    rules = f"{__version__}\0{tokenizer.eos_token_id}\0{tokenizer.backend_tokenizer.to_str()}"
    return files.cache_dir() / "tokens" / f"{hashlib.sha256(f'{sha256}{rules}'.encode()).hexdigest()[:32]}.safetensors"


def _read_cache(path: Path, documents: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What `_write_cache` wrote, or None where there is no such file or it is not whole: then the text is cut again."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        kept = load_file(path)
    except (OSError, SafetensorError):
        return None
    ids, lengths = (kept.get(name, torch.empty(0)).long() for name in ("ids", "lengths"))
    return (ids, lengths) if len(lengths) == documents and lengths.sum() == len(ids) else None


def _write_cache(path: Path, ids: torch.Tensor, lengths: torch.Tensor) -> None:
    with suppress(OSError):  # a full disk or a folder that may not be written costs time the next time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        files.save_tensors(path, {"ids": ids.int(), "lengths": lengths.int()})


def load_text(tokenizer, source: str | None = None, split: str = "heldout") -> TokenStream:
    """The tokens to evaluate on. `source`: one of NAMES, a directory of files, or a dataset id on the hub.

    Without `source`, the environment variable LABS_TEXT decides, and without that it is "code". `split` matters for NAMES and for a
    directory that holds the folders train and heldout. Nothing is downloaded unless a hub id is given.
    """
    source = source or os.environ.get("LABS_TEXT") or "code"
    if not isinstance(source, str):
        raise TypeError(f"source is {checks.kind(source)}, wanted one of {', '.join(NAMES)}, a directory or a dataset id")
    if source in NAMES or _split_folder(source, split):
        return tokenize(tokenizer, documents(source, split), f"{source}/{split}")
    path, is_there = Path(source), os.path.exists(source)  # False for a name that no file can have, where Path.exists raises
    if os.path.isdir(source):
        return tokenize(tokenizer, _directory(path), source)
    if is_there or path.is_absolute() or len(path.parts) > 2:  # an id on the hub is a name, or an owner and a name
        raise TextError(f"source is {source!r}, {'a file' if is_there else 'which is not there'}: wanted a directory of text")
    return tokenize(tokenizer, _hub(source), source)
