"""Chapter 15: the largest format that fits a card, and what a server's memory holds when many ask at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from labsupport.evidence import planner
from labsupport.evidence.configs import shape_of
from labsupport.evidence.shapes import Shape
from labsupport.exercises.form import Exercise, Fault, Mutant, Outputs, drive_cases, mistakes_by_option

OPTIONS = [(8, 128), (4, 32), (4, 128), (3, 32), (3, 128), (2, 64)]
NORMS = 5e-4  # of all bytes: more than norms and rounding take, far less than the zero-points


# 15.1 -----------------------------------------------------------------------------------------------------------------
def fit_inputs(seed: int) -> dict:
    """A model of about 34B and cards: two that it just fits, three that lack 0.3 % for an option, and one that nothing fits."""
    r = random.Random(seed)
    heads = 8 * r.randrange(6, 9)
    config = {
        "hidden_size": 128 * heads, "intermediate_size": 256 * r.randrange(76, 90), "num_hidden_layers": r.randrange(44, 53),
        "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 1000 * r.randrange(60, 131),
    }  # fmt: skip
    context, reserve, options = r.choice([4096, 8192]), r.randrange(1, 3) * 10**9, r.sample(OPTIONS, len(OPTIONS))
    while options[0][0] != 3:  # what comes first is neither the largest nor the smallest, nor has it the bits of the answer
        r.shuffle(options)
    shape, cases = _shape(config), {}
    for share, bits, group_size in ((1, 4, 32), (1, 3, 128), (0.997, 8, 128), (0.997, 4, 128), (0.997, 3, 32), (0.9, 2, 64)):
        need = planner.model_bytes(shape, bits, group_size) + planner.cache_bytes(shape, context) + reserve
        cases[f"a card of {share * need / 1e9:.3f} GB"] = (config, share * need, reserve, context, options)
    return cases


def _shape(config: dict[str, int]) -> Shape:
    return shape_of({"model_type": "llama", "tie_word_embeddings": False, **config}, "given")


def largest_that_fits(
    config: dict[str, int], memory: float, reserve: int, context: int, options: list[tuple[int, int]]
) -> tuple[int, int, float]:
    """labsupport's bytes for each option: bits, group size and all bytes of the largest that fits; three times 0 if none does."""
    shape = _shape(config)
    beside = planner.cache_bytes(shape, context) + reserve
    sizes = [(beside + planner.model_bytes(shape, bits, group_size), bits, group_size) for bits, group_size in options]
    total, bits, group_size = max([each for each in sizes if each[0] <= memory], default=(0.0, 0, 0))
    return bits, group_size, total


def _fit(
    config, memory, reserve, context, options, scale=16, zero=1, others=16, head=1, cached=2, cached_heads=None, layers=None,
    weight_heads=None, mlp=3, saved=1, choose=max,
):  # fmt: skip
    """A right answer with what can go wrong as options: bits beside the codes, matrices, parts of the cache, which is chosen."""
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    width, count = hidden // heads, config["num_hidden_layers"]
    keys = width * ((weight_heads and config[weight_heads]) or kv_heads)
    linear = count * (2 * hidden * hidden + 2 * keys * hidden + mlp * hidden * config["intermediate_size"])
    other = (1 + head) * hidden * config["vocab_size"]
    kept = cached * width * ((cached_heads and config[cached_heads]) or kv_heads) * context * 2 * (layers or count)
    sizes = []
    for bits, group_size in options:
        weights = (linear * (bits + (scale + zero * bits) / group_size) + other * (others or bits)) / 8
        total = weights + kept + saved * reserve
        if total <= memory:
            sizes.append((total, bits, group_size))
    if not sizes:
        return 0, 0, 0.0
    total, bits, group_size = choose(sizes)
    return bits, group_size, total


def drive_fit(answer: Callable, given: dict) -> dict:
    """Bits, group size and bytes, of each card in turn."""
    bits, group_size, total = zip(*(answer(*arguments) for arguments in given.values()), strict=True)
    sizes = torch.tensor([float(size) for size in total], dtype=torch.float64)
    return {"bits": torch.tensor(bits), "group_size": torch.tensor(group_size), "total": sizes}


def _near(given: Outputs, want: Outputs) -> dict[str, Any]:
    """Of bytes as much as the norms take, which may be left out; bits and group size exactly."""
    return {"bits": 0.0, "group_size": 0.0, "total": NORMS * want["total"]}


def _about_card(given: dict, want: dict, name: str, place: tuple) -> str:
    return f"{name} for {list(given)[place[0]]}"


def _beyond(given: Outputs, got: Outputs, want: Outputs) -> dict[str, Any] | None:
    """The first card whose memory is less than the bytes that were returned for it."""
    for (case, (_, memory, *_)), total in zip(given.items(), got["total"].tolist(), strict=True):
        if total > memory * (1 + NORMS):
            return {"case": case, "total": total}
    return None


FIT = Exercise(
    id="15.1", name="largest_that_fits", title="Fit a 34B", minutes=15, difficulty=3, points=4,
    returns=("bits", "group_size", "total"), inputs=fit_inputs, reference=largest_that_fits, drive=drive_fit, allowed=_near,
    about=_about_card,
    faults=(
        Fault("{case}: what was returned takes {total:.6g} bytes, which are more", _beyond,
              (lambda config, memory, *given: _fit(config, 10 * memory, *given),)),
    ),
    mistakes=mistakes_by_option(_fit, {
        "the scales and zero-points are missing: every group stores one of each": {"scale": 0, "zero": 0},
        "the zero-points are missing: every group stores one, in `bits` bits": {"zero": 0},
        "the scales are missing: every group stores one, in 16 bits": {"scale": 0},
        "embedding and head were quantized too: they stay in 16 bits": {"others": None},
        "the head is missing: beside the embedding it is a second table of the same size": {"head": 0},
        "the KV cache is missing: one sequence of `context` tokens has to fit as well": {"cached": 0},
        "half of the cache is missing: a token leaves a key and a value": {"cached": 1},
        "the cache is that of one layer": {"layers": 1},
        "every head of queries was given a cache: keys and values have num_key_value_heads": {
            "cached_heads": "num_attention_heads"},
        "k_proj and v_proj were taken as large as q_proj: they make num_key_value_heads keys and values": {
            "weight_heads": "num_attention_heads"},
        "an MLP has three matrices: gate, up and down": {"mlp": 2},
        "the reserve was not counted: what driver and kernels take is not there for weights": {"saved": 0},
        "this is the smallest option: the largest that fits loses least": {"choose": min},
        "this is the first of the list that fits: the list is in no order": {"choose": lambda sizes: sizes[0]},
        "with the same bits this takes the largest groups: smaller ones lose less, if they fit": {
            "choose": lambda sizes: max(sizes, key=lambda each: (each[1], each[2]))},
    }),
    others=(
        Mutant(lambda *given: (*_fit(*given)[:2], 0.9 * _fit(*given)[2]), "total for a card"),
        Mutant(lambda *given: (0, 0, 0.0), "bits for a card"),
    ),
)  # fmt: skip


# 15.2 -----------------------------------------------------------------------------------------------------------------
def served_inputs(seed: int) -> dict:
    """Layers that see all, some or all with a window, contexts on both sides of it, caches of 16 and of 8 bits."""
    r = random.Random(seed)
    layers, heads, width = r.randrange(18, 30), 4 * r.randrange(5, 9), 16 * r.randrange(5, 9)
    window, users, weights = 1024 * r.randrange(1, 5), r.randrange(7, 60), r.randrange(3 * 10**9, 20 * 10**9)
    every, other, third = [0] * layers, [window, 0] * (layers // 2), [window, window, 0] * (layers // 3)
    long, short = window * r.randrange(3, 6) + 17, window - 129
    return {
        "every layer sees all": (weights, every, heads, heads // 4, width, long, users, 16),
        "every other layer has a window": (weights, other, heads, heads // 2, width, long, users + 1, 16),
        "two of three layers have a window, fp8 cache": (weights, third, heads, heads // 4, width, long + 5, users + 2, 8),
        "a context shorter than the windows": (weights, other, heads, heads // 4, width, short, users, 16),
    }


def memory_for(
    weights: int, windows: list[int], heads: int, kv_heads: int, width: int, context: int, users: int, bits: int
) -> float:
    """labsupport's formula. windows: of each layer how many tokens it keeps, 0 for all. bits: of a number in the cache."""
    return weights + planner.cache_bytes(_served_shape(windows, heads, kv_heads, width), context, users, bits)


def _served_shape(windows: list[int], heads: int, kv_heads: int, width: int) -> Shape:
    """Only the sizes of its cache matter."""
    return Shape("given", len(windows), width * heads, 1, heads, kv_heads, 1, head_width=width, windows=tuple(windows))


def _served(
    weights, windows, heads, kv_heads, width, context, users, bits, copies=1, shared=True, both=2, kept=None, asked=None,
    per_number=lambda bits: bits / 8, held=1,
):  # fmt: skip
    """The formula with what can go wrong as options. kept(context, windows): tokens in the caches of all layers together."""
    tokens = kept(context, windows) if kept else sum(min(context, window) if window else context for window in windows)
    numbers = both * (kv_heads if shared else heads) * width * tokens * (asked or users)
    return held * weights * (users if copies > 1 else 1) + numbers * per_number(bits)


def _about_served(given: dict, want: dict, case: str, place: tuple) -> str:
    _, windows, heads, kv_heads, width, context, users, bits = given[case]
    return (f"{case}: {users} users of {context} tokens, {len(windows)} layers, {kv_heads} heads of keys for {heads} of queries, "
            f"{width} wide, {bits} bits, in bytes")  # fmt: skip


SERVED = Exercise(
    id="15.2", name="memory_for", title="When everybody asks at once", minutes=10, difficulty=2, points=3,
    returns=("bytes",), inputs=served_inputs, reference=memory_for, drive=drive_cases, about=_about_served,
    # A few products and sums in float64.
    allowed=lambda given, want: {case: 1e-12 * value for case, value in want.items()},
    mistakes=mistakes_by_option(_served, {
        "every user was given weights of their own: the server reads one copy for all": {"copies": 2},
        "the weights are missing: they stand beside the cache": {"held": 0},
        "this is the cache of one user: each sequence has its own": {"asked": 1},
        "every head of queries was given a cache: the kv_heads of keys and values are shared": {"shared": False},
        "half of the cache is missing: a token leaves a key and a value": {"both": 1},
        "the windows are ignored: a layer with a window keeps that many tokens and no more": {
            "kept": lambda context, windows: context * len(windows)},
        "every layer was given the window: where it is 0 a layer keeps the whole context": {
            "kept": lambda context, windows: len(windows) * (min(context, max(windows)) if any(windows) else context)},
        "a layer whose window is 0 keeps everything, not nothing": {
            "kept": lambda context, windows: sum(min(context, window) for window in windows)},
        "a window that is longer than the context was filled: a layer keeps no more tokens than there are": {
            "kept": lambda context, windows: sum(window or context for window in windows)},
        "this is the cache of one layer": {"kept": lambda context, windows: min(context, windows[0]) if windows[0] else context},
        "the cache has `bits` bits a number: here it has 16 in any case": {"per_number": lambda bits: 2},
        "these are bits for the cache, wanted bytes: a byte holds eight": {"per_number": lambda bits: bits},
    }),
    others=(
        Mutant(lambda *given: _served(*given) / 1e9, "in bytes"),
        Mutant(lambda weights, *given: _served(weights + 1000, *given), "in bytes"),
    ),
)  # fmt: skip

EXERCISES = (FIT, SERVED)
