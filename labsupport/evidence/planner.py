"""Bytes and speed on paper: what a model weighs, what its cache takes, whether that fits a card, and how fast it could be at best.

The first half is arithmetic on a `Shape`; `plan` puts it together for a card, a context and a number of users, with the
assumptions that ASSUMPTIONS says. The sizes of models come from shapes.py and configs.py, the tables from tables.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from labsupport.evidence import roofline, tables
from labsupport.evidence.configs import shape_of
from labsupport.evidence.shapes import LLAMA_7B, LLAMA_34B, LLAMA_70B, SHAPES, Shape
from labsupport.evidence.tables import Card, Format

__all__ = [
    "ASSUMPTIONS", "CACHES", "GB", "GIB", "LLAMA_7B", "LLAMA_34B", "LLAMA_70B", "PARTS", "SHAPES", "Plan", "Shape", "cache_bytes",
    "group_size", "model_bytes", "plan", "read_bytes", "shape_of", "step_bytes", "stored_bytes", "weight_bytes",
]  # fmt: skip

GB, GIB = 10**9, 2**30
SCALE_BITS = 16
CHUNK = 2048  # tokens of prompts that a server computes at once; vLLM calls it max_num_batched_tokens
CACHES: Mapping[str, float] = MappingProxyType({"bf16": 16, "fp8": 8})  # bits of a number in the cache
# What llama.cpp stores a row in that is no multiple of 256 (src/llama-quant.cpp): Q3_K, Q4_K, Q6_K become IQ4_NL, Q5_0, Q8_0.
FALLBACK: Mapping[float, float] = MappingProxyType({3.4375: 4.5, 4.5: 5.5, 6.5625: 8.5})
PARTS = ("linears", "embedding and head", "KV cache", "activations", "reserve")
ASSUMPTIONS = (
    "A GB is 10**9 bytes, for cards too; most have up to 7 % more.",
    "Every user has a sequence of the whole context in the cache; nobody shares a prompt.",
    f"Activations: {CHUNK:,} tokens of prompts at once, and a float32 for each word of the vocabulary and user.",
    "Reserve: a tenth of the memory for driver, kernels and fragments, as vLLM leaves it with gpu_memory_utilization 0.9; a "
    "quarter where the system shares the memory.",
    "Tokens a second: an upper bound, the longer of reading weights and cache once a step and of multiplying. Operations of "
    "attention, and time between kernels, are not in it; `labs plan --check` shows what share of it published speeds reach.",
    "A batch finds its experts by chance: each token asks for some, all equally likely.",
)


def stored_bytes(quantized: int, others: int, bits: int, group_size: int) -> tuple[float, float]:
    """What a quantized model weighs, in bytes and in GiB.

    quantized: weights stored in `bits` bits, with a 16-bit scale and a `bits`-bit zero-point for each group of `group_size`.
    others: weights that stay in 16 bits.
    """
    groups = quantized / group_size
    total = (quantized * bits + groups * (SCALE_BITS + bits) + others * 16) / 8
    return total, total / GIB


def model_bytes(shape: Shape, bits: int, group_size: int = 128) -> float:
    """Stored bytes of all weights; 16 bits means not quantized."""
    if bits == 16:
        return 2.0 * shape.parameters
    return stored_bytes(shape.linear_parameters, shape.other_parameters, bits, group_size)[0]


def step_bytes(shape: Shape, bits: int, group_size: int = 128) -> float:
    """Bytes of weights that one decode step reads: all of them, but for the input table unless the head is that same table."""
    return model_bytes(shape, bits, group_size) - (0 if shape.tied else 2 * shape.embedding_parameters)


def weight_bytes(shape: Shape, form: Format) -> dict[str, float]:
    """Stored bytes of "linears", and of "embedding and head", with which norms, biases and routers are counted, in 16 bits."""
    head, embedding = (_bits(form, bits, shape.hidden) for bits in (form.head, form.embedding))
    bits = shape.embedding_parameters * (head if shape.tied else embedding + head)
    return {
        "linears": sum(_linear_bytes(shape, form).values()),
        "embedding and head": (bits + 16 * shape.small_parameters) / 8,
    }


def group_size(shape: Shape, form: Format) -> int | str | None:
    """The format's groups, halved until they divide the inputs of every linear, as `labs quantize` does."""
    group = form.group
    while isinstance(group, int) and group > 1 and any(each.columns % group for each in shape.linears):
        group //= 2
    return group


def _bits(form: Format, bits: float, columns: int) -> float:
    """Of a weight in a row of so many columns."""
    return FALLBACK.get(bits, bits) if form.block and columns % form.block else bits


def read_bytes(shape: Shape, form: Format, batch: int = 1) -> float:
    """Bytes of weights that a decode step of `batch` sequences reads; of experts only those that a token of the batch asks for.

    The input table is not read, but for a row a token, unless it is the head as well.
    """
    stored = _linear_bytes(shape, form)
    read = sum(stored[each.name] * (1 - (1 - each.used / each.times) ** batch) for each in shape.linears)
    return read + (shape.embedding_parameters * _bits(form, form.head, shape.hidden) + 16 * shape.small_parameters) / 8


def _linear_bytes(shape: Shape, form: Format) -> dict[str, float]:
    """Of all linears of a kind, with their scales and zero-points."""
    found, group = {}, group_size(shape, form)
    for each in shape.linears:
        if form.only == "experts" and not each.name.startswith("experts."):
            found[each.name] = 2.0 * each.values * each.times
            continue
        bits = _bits(form, form.bits, each.columns)
        if form.more and each.name.rsplit(".", 1)[-1] in form.more["names"]:
            share = sum(_gets_more(layer, shape.layers) for layer in range(shape.layers)) / shape.layers
            bits += share * (_bits(form, form.more["bits"], each.columns) - bits)
        groups = 0.0 if group is None else each.rows if isinstance(group, str) else each.values / group
        found[each.name] = each.times * (each.values * bits + groups * (form.scale + form.zero)) / 8
    return found


def _gets_more(layer: int, layers: int) -> bool:
    """llama.cpp's use_more_bits (src/llama-quant.cpp): the first and last eighth of the layers, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def cache_bytes(shape: Shape, context: int, users: int = 1, bits: float = 16) -> float:
    """Bytes of the keys and values of `users` sequences of `context` tokens, `bits` a number.

    A head of keys and values serves all heads of queries that share it; a layer with a sliding window keeps that many tokens;
    latent attention keeps one vector for all heads.
    """
    return users * shape.cached_tokens(context) * shape.cached_numbers * bits / 8


def activation_bytes(shape: Shape, context: int, users: int) -> float:
    """Bytes that computing takes beside weights and cache, at its widest: see ASSUMPTIONS.

    In 16 bits the residual, what a norm makes of it, and the wider of queries, keys, values and their sum, and of an MLP's three.
    """
    tokens = max(users, min(CHUNK, users * context))
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.width
    e = shape.experts
    width = shape.intermediate if e is None else e.active * e.width + e.shared
    if e is not None and e.layers < shape.layers:
        width = max(width, shape.intermediate)
    mlp = 3 * width
    return 2 * tokens * (2 * shape.hidden + max(attention, mlp)) + 4 * users * shape.vocab


@dataclass(frozen=True, kw_only=True)
class OnCard:
    """What a model in a format takes on a card: bytes, by part."""

    shape: Shape
    card: Card
    form: Format
    context: int
    users: int
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.card.memory


@dataclass(frozen=True, kw_only=True)
class Plan(OnCard):
    """What serving it takes, and how fast it could be. cache: one of CACHES.

    tokens_per_second: of all users together, at most. limit: "memory" or "compute". prefill_seconds: for one prompt of the whole
    context, at least; None where the card's maker gives no rate.
    """

    cache: str
    tokens_per_second: float
    limit: str
    prefill_seconds: float | None

    def _would_fit(self, context: int, users: int) -> bool:
        parts = bytes_by_part(self.shape, self.card, self.form, context, users, self.cache)
        return sum(parts.values()) <= self.card.memory

    @property
    def most_users(self) -> int:
        """How many would fit, with this context; 0 where not even one does."""
        return _most(lambda users: self._would_fit(self.context, users))

    @property
    def longest_context(self) -> int:
        """How long it could be, with this many users; 0 where not even a token fits."""
        return _most(lambda context: self._would_fit(context, self.users))


def _most(fits: Callable[[int], bool]) -> int:
    """The largest number up to 2**30 for which `fits` is true: it is true up to some number and then no more."""
    if not fits(1):
        return 0
    low, high = 1, 2**30
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def bytes_by_part(shape: Shape, card: Card, form: Format, context: int, users: int, cache: str = "bf16") -> dict[str, float]:
    """Bytes of each of PARTS."""
    return {
        **weight_bytes(shape, form),
        "KV cache": cache_bytes(shape, context, users, CACHES[cache]),
        "activations": activation_bytes(shape, context, users),
        "reserve": card.reserve * card.memory,
    }


def plan(shape: Shape, card: Card, form: Format | str = "bf16", context: int = 8192, users: int = 1, cache: str = "bf16") -> Plan:
    """What this takes and how fast it could be, fitting or not. Raises ValueError for sizes below 1 and for unknown names."""
    for name, value in (("context", context), ("users", users)):
        if value < 1:
            raise ValueError(f"{name} is {value}, wanted at least 1")
    if cache not in CACHES:
        raise ValueError(f"cache is {cache!r}, wanted one of {', '.join(CACHES)}")
    if isinstance(form, str):
        if form not in tables.formats():
            raise ValueError(f"format is {form!r}, wanted one of {', '.join(tables.formats())}")
        form = tables.formats()[form]
    rate = card.rate(form.arithmetic)
    read = read_bytes(shape, form, users) + cache_bytes(shape, context, users, CACHES[cache])
    reading, computing = read / card.bandwidth, 2 * shape.active_parameters * users / rate if rate else 0.0
    return Plan(
        shape=shape, card=card, form=form, cache=cache, context=context, users=users,
        parts=MappingProxyType(bytes_by_part(shape, card, form, context, users, cache)),
        tokens_per_second=roofline.decode_rate(read, shape.active_parameters, users, card.bandwidth, rate or float("inf")),
        limit="memory" if reading >= computing else "compute",
        prefill_seconds=2 * shape.active_parameters * context / rate if rate else None,
    )  # fmt: skip
