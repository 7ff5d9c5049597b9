"""Prediction items whose numbers are drawn: one question a chapter that can be answered in the head, before anything is run."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

PREDICTION = "prediction"


@dataclass(frozen=True)
class Question:
    """says: the question, a format string. ranges: of whole numbers, both ends included, by name. answer: of the drawn numbers."""

    says: str
    ranges: dict[str, tuple[int, int]]
    answer: Callable[..., float]

    def values(self, constant: int) -> dict[str, int]:
        """What a constant draws. `random.Random` gives the same numbers on every machine."""
        source = random.Random(constant)
        return {name: source.randint(low, high) for name, (low, high) in self.ranges.items()}

    def text(self, constant: int) -> str:
        return self.says.format(**self.values(constant))

    def number(self, constant: int) -> float:
        return float(self.answer(**self.values(constant)))


QUESTIONS = {
    0: Question(
        "A model has {thousands},000 weights. How many MB (10^6 bytes) do they take in float16?",
        {"thousands": (1001, 9999)},
        lambda thousands: thousands * 2 / 1000,
    ),
    1: Question(
        "A machine computes {tera} * 10^12 operations a second and reads {giga} * 10^9 bytes a second. "
        "From how many operations a byte on does computing set the pace?",
        {"tera": (11, 199), "giga": (101, 1999)},
        lambda tera, giga: 1000 * tera / giga,
    ),
    2: Question(
        "Weights lie from -0.{low} to 0.{high}. A grid of {bits} bits spans them, its first and last value at the ends. "
        "How wide is a step?",
        {"low": (101, 999), "high": (101, 999), "bits": (3, 6)},
        lambda low, high, bits: (low + high) / 1000 / (2**bits - 1),
    ),
    3: Question(
        "Codes of {bits} bits, in groups of {size} weights, each with a scale of 16 bits and a zero-point of {bits} bits. "
        "How many bits a weight are stored?",
        {"bits": (2, 8), "size": (17, 999)},
        lambda bits, size: bits + (16 + bits) / size,
    ),
    4: Question(
        "The largest magnitude of a row is {absmax}, and the row is stored in int8 with codes from -127 to 127. "
        "How wide is a step?",
        {"absmax": (1001, 9999)},
        lambda absmax: absmax / 127,
    ),
    5: Question(
        "A weight of {rows} rows and {columns} columns is stored with 4-bit codes, in blocks of 64 with a float32 each. "
        "How many kB (10^3 bytes) does it take?",
        {"rows": (101, 999), "columns": (101, 999)},
        lambda rows, columns: (math.ceil(rows * columns / 2) + 4 * math.ceil(rows * columns / 64)) / 1000,
    ),
    6: Question(
        "A layer reads {inputs} inputs. How many MB (10^6 bytes) does its Hessian take in float32?",
        {"inputs": (1001, 9999)},
        lambda inputs: 4 * inputs**2 / 1e6,
    ),
    7: Question(
        "GPTQ hears {windows} windows of {length} tokens. How many tokens is that, in thousands?",
        {"windows": (11, 199), "length": (101, 999)},
        lambda windows, length: windows * length / 1000,
    ),
    8: Question(
        "A channel of a weight is multiplied by {times}.{part}. "
        "By what does its input have to be multiplied, so that the product stays?",
        {"times": (1, 9), "part": (101, 999)},
        lambda times, part: 1 / (times + part / 1000),
    ),
    9: Question(
        "A model has {layers} layers with {heads} heads of keys and values, {size} numbers each, in 16 bits. "
        "How many kB (10^3 bytes) does a token take in its cache?",
        {"layers": (11, 99), "heads": (2, 16), "size": (33, 255)},
        lambda layers, heads, size: 2 * layers * heads * size * 2 / 1000,
    ),
    10: Question(
        "{rows} rows of {columns} codes of 4 bits are packed into words of 32 bits, each row by itself. "
        "How many words are there, in thousands?",
        {"rows": (101, 999), "columns": (101, 999)},
        lambda rows, columns: rows * math.ceil(columns / 8) / 1000,
    ),
    11: Question(
        "A weight of {side} by {side} is stored in 4 bits, and memory gives {giga} * 10^9 bytes a second. "
        "How many microseconds does a product with one token take at least?",
        {"side": (1001, 9999), "giga": (101, 1999)},
        lambda side, giga: side**2 / 2 / giga / 1000,
    ),
    12: Question(
        "LoRA of rank {rank} stands beside a layer of {inputs} inputs and {outputs} outputs. "
        "How many thousand numbers does it train?",
        {"rank": (4, 64), "inputs": (101, 999), "outputs": (101, 999)},
        lambda rank, inputs, outputs: rank * (inputs + outputs) / 1000,
    ),
    13: Question(
        "Five ternary codes share a byte. How many kB (10^3 bytes) do {rows} rows of {columns} codes take, each row by itself?",
        {"rows": (101, 999), "columns": (101, 999)},
        lambda rows, columns: rows * math.ceil(columns / 5) / 1000,
    ),
    14: Question(
        "The interval of a difference, from {few} windows, is {width} thousandths wide. About how wide is it from {many} windows?",
        {"few": (11, 99), "width": (11, 99), "many": (101, 999)},
        lambda few, width, many: width * math.sqrt(few / many),
    ),
    15: Question(
        "A card has {card} GB, the model takes {model}.{part} GB, and each user's cache {cache} MB. "
        "For how many users is there room?",
        {"card": (24, 96), "model": (3, 20), "part": (1, 9), "cache": (11, 199)},
        lambda card, model, part, cache: math.floor((card - model - part / 10) * 1000 / cache),
    ),
}
