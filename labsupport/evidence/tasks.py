"""Tasks that are read off a text: each item is done or not done, and belongs to a document, so that two models can be paired.

identifiers  Does the model complete a name that it has seen? An item is a place where a name of at least two tokens occurs that
             occurred before in the same window and document. It is done where every token of the name is the one that the model
             ranks first, given the text before it (teacher-forced: the same as greedy generation of this name).
copies       Can it copy a name from far back? Four names of a document are defined and used at the beginning of a context, FAR
             tokens of the document follow in which none of them occurs, and then each is begun again: an item is done where,
             after the first token of the name, the model ranks every other token first. A name has at least three tokens.
parses       Is the code that it writes Python? The model is given PROMPT tokens that end with the first line of a function, and
             continues greedily for WRITTEN tokens. An item is done where `parses` accepts the function.

In Python source a name is an identifier (a NAME token that is no keyword). In other text it is a word that begins with a capital
letter and goes on in small letters; there are no functions there. A document is Python where it is named so and `ast.parse`
accepts it. Everything is chosen by position, nothing at random, so that the same text and tokenizer give the same items.
"""

from __future__ import annotations

import ast
import bisect
import codeop
import io
import keyword
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from labsupport.model.comparison import Comparison
from labsupport.model.evaluate import LENGTH
from labsupport.model.text import TokenStream

FAR = 300  # tokens between the names and the place where they are asked for
NAMES = 4  # in one context of `copies`
CONTEXTS = 32  # of `copies`
FUNCTIONS = 64  # of `parses`
PROMPT, WRITTEN = 128, 64
BATCH = 16
SHORTEST = 4  # letters of a name
WORD = re.compile(r"\b[A-Z][a-z]{3,}\b")
UNFINISHED = ast.PyCF_ONLY_AST | codeop.PyCF_ALLOW_INCOMPLETE_INPUT


class Frame(NamedTuple):
    """How the names of `copies` are shown, and asked for again. {} is a name; the other two stand once, before all names."""

    shown: str
    used: str
    asked: str
    again: str


CODE = Frame(
    "    def {}(self):\n        return self.{}\n\n", "    def close(self):\n", "        self.{}()\n", "\n\n    def reset(self):\n"
)
PROSE = Frame("The old house belongs to {}.\n\n", "", "The people of the village know {}.\n\n", "\n\n")


@dataclass(frozen=True)
class Span:
    """A name in a document: its tokens start ... end - 1, counted from the document's first, and what it is."""

    start: int
    end: int
    name: str


@dataclass(frozen=True)
class Source:
    """A document as text, and the characters [begin, end) that each of its tokens covers. is_python: see the module's text."""

    text: str
    begin: list[int]
    end: list[int]
    is_python: bool

    def names(self) -> Iterator[tuple[int, int]]:
        """The characters [begin, end) of each name, in order."""
        if not self.is_python:
            yield from (match.span() for match in WORD.finditer(self.text))
            return
        starts = _line_starts(self.text)
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type == tokenize.NAME and not keyword.iskeyword(token.string) and len(token.string) >= SHORTEST:
                begin = starts[token.start[0] - 1] + token.start[1]
                yield begin, begin + len(token.string)

    def spans(self) -> list[Span]:
        """Names that whole tokens cover; the first may cover a space or one other character before the name as well."""
        found = []
        for begin, end in self.names():
            first = bisect.bisect_right(self.begin, begin) - 1
            last = bisect.bisect_left(self.end, end)
            before = self.text[self.begin[first] : begin]
            if self.end[last] == end and len(before.strip()) <= 1 and not before.strip().isalnum():
                found.append(Span(first, last + 1, self.text[begin:end]))
        return found

    def headers(self) -> Iterator[tuple[int, int]]:
        """The characters [begin, end) of each first line of a function, from its indentation to its colon, which ends the line."""
        starts, depth, begin = _line_starts(self.text), 0, None
        tokens = list(tokenize.generate_tokens(io.StringIO(self.text).readline)) if self.is_python else []
        for token, following in pairwise(tokens):
            if token.string == "def" and token.type == tokenize.NAME and not token.line[: token.start[1]].strip():
                depth, begin = 0, starts[token.start[0] - 1]
            elif begin is not None and token.type == tokenize.OP:
                depth += (token.string in "([{") - (token.string in ")]}")
                if token.string == ":" and depth == 0:
                    if following.type == tokenize.NEWLINE:
                        yield begin, starts[token.end[0] - 1] + token.end[1]
                    begin = None


def _line_starts(text: str) -> list[int]:
    """Where each line begins, by the number of characters before it."""
    starts = [0]
    for line in io.StringIO(text):
        starts.append(starts[-1] + len(line))
    return starts


def _is_python(name: str, text: str) -> bool:
    if not name.endswith(".py"):
        return False
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def read(tokenizer, stream: TokenStream, document: int) -> Source | None:
    """A document of a stream, read back from its tokens. None where these are not what the tokenizer makes of that text."""
    ids = stream.ids[stream.document == document].tolist()
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    if again["input_ids"] != ids:
        return None
    begin, end = ([place[side] for place in again["offset_mapping"]] for side in (0, 1))
    return Source(text, begin, end, _is_python(stream.names[document], text))


class Tasks:
    """The items of the three tasks on the windows of a text. documents: of each item, an index into the stream's names.

    tokenizer: a fast one of transformers, the one of the stream. A task for which the text has no item has none.
    """

    def __init__(self, tokenizer, stream: TokenStream, length: int = LENGTH, windows: int | None = None):
        self.tokenizer, self.length = tokenizer, length
        positions = stream.positions(length, windows)
        used = stream.document[positions].unique().tolist()
        starts = torch.searchsorted(stream.document, torch.arange(len(stream.names)))
        self._sources = {d: source for d in used if (source := read(tokenizer, stream, d)) is not None}
        self._spans = {d: source.spans() for d, source in self._sources.items()}
        self._first = {d: int(starts[d]) for d in self._sources}  # where each document begins in the stream
        self._stream, self._windows = stream, positions[:, 0].tolist()
        self._repeated = sorted(self._repeated_names())
        self._contexts = _spread(list(self._far_names()), CONTEXTS)
        self._prompts = _spread(list(self._functions()), FUNCTIONS)
        self.documents = {
            "identifiers": [document for document, *_ in self._repeated],
            "copies": [document for document, _, places in self._contexts for _ in places],
            "parses": [document for document, *_ in self._prompts],
        }

    def done(self, model: nn.Module, compared: Comparison) -> dict[str, list[bool]]:
        """Of each task, whether each item is done. compared: of this model on the same windows."""
        return {"identifiers": self.identifiers(compared), "copies": self.copies(model), "parses": self.parses(model)}

    def identifiers(self, compared: Comparison) -> list[bool]:
        """compared.first[w, t] is what the model puts at token t + 1 of window w."""
        right = compared.first == compared.ids
        return [bool(right[window, start - 1 : end - 1].all()) for _, window, start, end in self._repeated]

    @torch.no_grad()
    def copies(self, model: nn.Module) -> list[bool]:
        device = next(model.parameters()).device
        results = []
        for part in _batches(self._contexts, BATCH):
            longest = max(len(ids) for _, ids, _ in part)
            # What follows a context's end is never looked at, and no token sees what follows it.
            batch = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids, _ in part])
            right = model(input_ids=batch.to(device), use_cache=False).logits[:, :-1].argmax(-1).cpu() == batch[:, 1:]
            for row, (_, _, places) in zip(right, part, strict=True):
                results += [bool(row[start - 1 : end - 1].all()) for start, end in places]
        return results

    def parses(self, model: nn.Module) -> list[bool]:
        if not self._prompts:
            return []
        written = greedy(model, torch.tensor([ids for _, ids, _ in self._prompts]), WRITTEN, self.tokenizer.eos_token_id)
        texts = [self.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in written]
        ended = [len(ids) < WRITTEN for ids in written]
        return [parses(head, text, whole) for (_, _, head), text, whole in zip(self._prompts, texts, ended, strict=True)]

    def _repeated_names(self) -> Iterator[tuple[int, int, int, int]]:
        """document, window, and the tokens [start, end) of the window."""
        for document, spans in self._spans.items():
            seen: set[tuple[int, str]] = set()
            for span in spans:
                begin = self._first[document] + span.start
                window = bisect.bisect_right(self._windows, begin) - 1
                start = begin - self._windows[window]
                end = start + span.end - span.start
                if window < 0 or start < 1 or end > self.length:  # before the first window, or not inside one
                    continue
                if span.end - span.start >= 2 and (window, span.name) in seen:
                    yield document, window, start, end
                seen.add((window, span.name))

    def _far_names(self) -> Iterator[tuple[int, list[int], list[tuple[int, int]]]]:
        """document, the ids of a context, and the tokens [start, end) that are to be copied, for each window that has one."""
        for window in self._windows:
            document = int(self._stream.document[window])
            whole = window + FAR < len(self._stream) and int(self._stream.document[window + FAR]) == document
            if not whole or document not in self._sources:
                continue
            source, begin = self._sources[document], window - self._first[document]
            text = source.text[source.begin[begin] : source.end[begin + FAR - 1]]
            names = dict.fromkeys(span.name for span in self._spans[document] if span.end - span.start >= 3)
            if context := self._context(source, [name for name in names if name not in text]):
                shown, asked, places = context
                before = shown + self._stream.ids[window : window + FAR].tolist()
                yield document, before + asked, [(start + len(before), end + len(before)) for start, end in places]

    def _context(self, source: Source, names: list[str]) -> tuple[list[int], list[int], list[tuple[int, int]]] | None:
        """The ids before and after the filler, and the tokens to be copied, counted from the first after it. None without names."""
        frame = CODE if source.is_python else PROSE
        chosen: list[str] = []
        for name in _spread(names, 4 * NAMES):
            if len(chosen) < NAMES and not any(name in other or other in name for other in chosen):
                start, end = self._places(frame.again + frame.asked.format(name), [name])[0]
                chosen += [name] * (end - start >= 2)
        order = chosen[2:] + chosen[:2][::-1]  # another one than before, so that no name follows the one that it followed
        before = "".join(frame.shown.format(name, name) for name in chosen)
        before += frame.used + "".join(frame.asked.format(name) for name in chosen)
        after = frame.again + "".join(frame.asked.format(name) for name in order)
        shown, asked = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
        if len(chosen) < NAMES or len(shown) + FAR + len(asked) > self.length:
            return None
        return shown, asked, self._places(after, order)

    def _places(self, text: str, names: Sequence[str]) -> list[tuple[int, int]]:
        """Of each name, in the order of the text: its tokens but the first, [start, end); (0, 0) where no token ends with it."""
        places = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        found, after = [], 0
        for name in names:
            begin = text.index(name, after)
            after = begin + len(name)
            inside = [number for number, (a, b) in enumerate(places) if a < after and b > begin]
            found.append((inside[0] + 1, inside[-1] + 1) if places[inside[-1]][1] == after else (0, 0))
        return found

    def _functions(self) -> Iterator[tuple[int, list[int], str]]:
        """document, the ids of a prompt, and the first line of the function, from its indentation to its colon."""
        for document, source in self._sources.items():
            for begin, end in source.headers():
                last = bisect.bisect_left(source.end, end)
                if source.end[last] == end and last + 1 >= PROMPT and source.begin[last + 1 - PROMPT] <= begin:
                    stop = self._first[document] + last + 1
                    yield document, self._stream.ids[stop - PROMPT : stop].tolist(), source.text[begin:end]


def _spread(items: list, count: int) -> list:
    """`count` of the items, spread evenly, or all of them."""
    return items if len(items) <= count else [items[number * len(items) // count] for number in range(count)]


def _batches(items: Sequence, size: int) -> Iterable[Sequence]:
    return (items[start : start + size] for start in range(0, len(items), size))


@torch.no_grad()
def greedy(model: nn.Module, prompts: Tensor, count: int, end: int | None = None) -> list[list[int]]:
    """The `count` tokens that the model ranks first after each prompt, one after the other; fewer where it writes `end`.

    prompts: int64 [batch, length]. What comes after `end`, and `end` itself, is left out.
    """
    device = next(model.parameters()).device
    output = model(input_ids=prompts.to(device), use_cache=True, logits_to_keep=1)
    tokens = [output.logits[:, -1].argmax(-1)]
    while len(tokens) < count:
        output = model(input_ids=tokens[-1][:, None], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(output.logits[:, -1].argmax(-1))
    rows = torch.stack(tokens, dim=1).tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


def parses(header: str, written: str, whole: bool = False) -> bool:
    """Whether Python accepts a function: its first line, with its indentation, and what was written after it.

    The function ends before the first line that is not indented deeper than its header, if all before that line is complete; what
    follows is not looked at. Where no such line is written, what stands in the last, unfinished line is cut off (unless the text is
    `whole`: the model ended it), and then as many lines as it takes to leave no statement unfinished: writing was stopped in the
    middle. A function of which no statement is left is not accepted. Nor is an error in what is left: what `ast.parse` refuses.
    """
    indent = len(header) - len(header.lstrip())
    opened = "class _:\n" if indent else ""  # so that the function may be indented
    first = header.count("\n") + 1
    lines = (header + written).split("\n")
    for number in range(first, len(lines)):
        line = lines[number]
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            state = _state(opened, lines[:number])
            if state != "unfinished":
                return state == "complete"
    if not whole:
        lines.pop()
    while len(lines) > first and (state := _state(opened, lines)) != "wrong":
        if state == "complete":
            return True
        lines.pop()
    return False


def _state(opened: str, lines: Sequence[str]) -> str:
    """ "complete", "unfinished" (more text could make it right) or "wrong"."""
    text = opened + "\n".join(lines) + "\n"
    try:
        ast.parse(text)
        return "complete"
    except (SyntaxError, ValueError):  # ValueError: a null byte
        pass
    try:
        compile(text, "<written>", "exec", UNFINISHED)
    except (SyntaxError, ValueError) as error:
        return "unfinished" if "incomplete input" in str(error) else "wrong"
    return "wrong"
