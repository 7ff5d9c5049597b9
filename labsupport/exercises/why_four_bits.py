"""The exercises of 01_why_four_bits."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

from labsupport.evidence import planner, roofline
from labsupport.evidence.planner import GIB
from labsupport.evidence.roofline import A100
from labsupport.exercises.base import Exercise, Mutant, Verdict, right, shape_fault, wrong

# A dozen float64 operations in any order stay far inside this; a forgotten zero-point or scale is far outside.
RELATIVE = 1e-9


def _near(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=RELATIVE)


def _mistake(value: float, likely: Mapping[str, float]) -> str | None:
    """What the value looks like, if it is one of the values that a known misconception gives."""
    return next((said for said, mistaken in likely.items() if _near(value, mistaken)), None)


def _passes(*pairs: tuple[float, float]) -> Verdict:
    return right(max(abs(value - expected) for value, expected in pairs), max(RELATIVE * abs(e) for _, e in pairs))


# 1.1 ------------------------------------------------------------------------------------------------------------------


def stored_inputs(seed: int) -> dict:
    """Sizes of a 7B model, roughly, in whole groups; enough 16-bit weights that leaving them out shows."""
    r = random.Random(seed)
    group_size = r.choice([32, 64, 128])
    return {
        "quantized": group_size * r.randrange(10**6, 10**8),
        "others": r.randrange(10**8, 10**9),
        "bits": r.choice([3, 4]),
        "group_size": group_size,
    }


def judge_stored(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    n, others, bits = given["quantized"], given["others"], given["bits"]
    groups, total = n / given["group_size"], want["total"]
    likely = {
        "these are bits: a byte holds eight of them": total * 8,
        "the scales and zero-points are missing: every group stores one of each": (n * bits + others * 16) / 8,
        "the zero-points are missing: every group stores one, in `bits` bits": (n * bits + groups * 16 + others * 16) / 8,
        "the scales are missing: every group stores one, in 16 bits": (n * bits + groups * bits + others * 16) / 8,
        "a zero-point is a code, so it takes `bits` bits, not 16": (n * bits + groups * 32 + others * 16) / 8,
        "the 16-bit weights are missing: embedding, head and norms must be stored as well": (n * bits + groups * (16 + bits)) / 8,
        "only the codes of the quantized weights are counted": n * bits / 8,
        "embedding, head and norms stay in 16 bits: here they are quantized too": (
            (n + others) * bits + (n + others) / given["group_size"] * (16 + bits)
        )
        / 8,
        "this is every weight at `bits` bits, the figure that people quote: the others stay in 16 bits, and groups have scales": (
            (n + others) * bits / 8
        ),
        "16 bits are 2 bytes: the 16-bit weights are counted with one byte, or with sixteen": (
            n * bits + groups * (16 + bits) + others * 8
        )
        / 8,
    }
    if not _near(got["total"], total):
        said = _mistake(got["total"], likely)
        return wrong(said or f"{n:,} weights in {bits} bits and {others:,} in 16: got {got['total']:.6g} bytes, wanted {total:.6g}")
    units = {
        "GiB is 2**30 bytes; this divides by 10**9, which gives GB": total / 1e9,
        "this is in MiB: divide by 2**30": total / 2**20,
        "GiB is 2**30 bytes; this multiplies": total * GIB,
        "a byte is counted as one bit on the way to GiB": total * 8 / GIB,
    }
    if not _near(got["gib"], want["gib"]):
        return wrong(
            _mistake(got["gib"], units) or f"the bytes are right; {total:.6g} bytes are {want['gib']:.6g} GiB, got {got['gib']:.6g}"
        )
    return _passes((got["total"], total), (got["gib"], want["gib"]))


def _stored(bytes_of, unit=GIB):
    def answer(quantized, others, bits, group_size):
        total = bytes_of(quantized, others, bits, quantized / group_size)
        return total, total / unit

    return answer


STORED_BYTES = Exercise(
    id="1.1", name="stored_bytes", title="What a model weighs", minutes=8, difficulty=2, points=2,
    returns=("total", "gib"), inputs=stored_inputs, reference=planner.stored_bytes, judge=judge_stored,
    mutants=(
        Mutant(_stored(lambda n, o, b, g: n * b + g * (16 + b) + o * 16), "these are bits"),
        Mutant(_stored(lambda n, o, b, g: (n * b + o * 16) / 8), "scales and zero-points are missing"),
        Mutant(_stored(lambda n, o, b, g: (n * b + g * 16 + o * 16) / 8), "zero-points are missing"),
        Mutant(_stored(lambda n, o, b, g: (n * b + g * 32 + o * 16) / 8), "not 16"),
        Mutant(_stored(lambda n, o, b, g: (n * b + g * (16 + b)) / 8), "16-bit weights are missing"),
        Mutant(_stored(lambda n, o, b, g: (n + o) * b / 8), "figure that people quote"),
        Mutant(_stored(lambda n, o, b, g: (n * b + g * (16 + b) + o * 16) / 8, 1e9), "gives GB"),
        Mutant(lambda n, o, b, g: (n * b + n / g * (16 + b) + o * 16) / 8, "wanted 2"),
    ),
)  # fmt: skip


# 1.2 ------------------------------------------------------------------------------------------------------------------


def intensity_inputs(seed: int) -> dict:
    """Several tokens, a matrix that is not square, weights narrower than activations: each can be told from the others."""
    r = random.Random(seed)
    in_features = 128 * r.randrange(8, 40)
    out_features = in_features + 128 * r.randrange(1, 40)
    return {
        "tokens": r.randrange(3, 400),
        "in_features": in_features,
        "out_features": out_features,
        "weight_bits": r.choice([3, 4, 8]),
    }


def judge_intensity(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    t, i, o, bits = given.values()
    value, expected = got["flops_per_byte"], want["flops_per_byte"]
    if _near(value, expected):
        return _passes((value, expected))
    operations, weights = 2 * t * i * o, i * o * bits / 8
    likely = {
        "half of it: a multiplication and an addition are two operations": expected / 2,
        "turned around: these are bytes for each operation": 1 / expected,
        "the activations are missing: inputs and outputs move as well": operations / weights,
        "the weights are missing, and here they are most of the bytes": operations / (2 * t * (i + o)),
        "the outputs are missing: they have to be written": operations / (weights + 2 * t * i),
        "the inputs are missing: they have to be read": operations / (weights + 2 * t * o),
        "weight_bits are bits: eight of them make a byte": operations / (8 * weights + 2 * t * (i + o)),
        "the weights are counted once for each token. They are read once for all of them": operations
        / (t * weights + 2 * t * (i + o)),
        "only the weights are quantized: activations stay in 16 bits": operations / (weights + t * (i + o) * bits / 8),
        "an activation has 16 bits, which are 2 bytes": operations / (weights + 16 * t * (i + o)),
        "the activations are those of one token": operations / (weights + 2 * (i + o)),
        "these are operations for each bit": expected / 8,
    }
    said = _mistake(value, likely)
    return wrong(said or f"[{t}, {i}] times [{i}, {o}] with {bits}-bit weights: got {value:.6g}, wanted {expected:.6g}")


INTENSITY = Exercise(
    id="1.2", name="intensity", title="Operations for each byte", minutes=8, difficulty=2, points=2,
    returns=("flops_per_byte",), inputs=intensity_inputs, reference=roofline.intensity, judge=judge_intensity,
    mutants=(
        Mutant(lambda t, i, o, b: t * i * o / (i * o * b / 8 + 2 * t * (i + o)), "two operations"),
        Mutant(lambda t, i, o, b: 2 * t * i * o / (i * o * b / 8), "activations are missing"),
        Mutant(lambda t, i, o, b: 2 * t * i * o / (2 * t * (i + o)), "weights are missing"),
        Mutant(lambda t, i, o, b: 2 * t * i * o / (i * o * b / 8 + 2 * t * i), "outputs are missing"),
        Mutant(lambda t, i, o, b: 2 * t * i * o / (i * o * b + 2 * t * (i + o)), "eight of them make a byte"),
        Mutant(lambda t, i, o, b: 2 * t * i * o / (t * i * o * b / 8 + 2 * t * (i + o)), "once for each token"),
        Mutant(lambda t, i, o, b: 2 * t * i * o / ((i * o + t * (i + o)) * b / 8), "stay in 16 bits"),
        Mutant(lambda t, i, o, b: (i * o * b / 8 + 2 * t * (i + o)) / (2 * t * i * o), "turned around"),
    ),
)  # fmt: skip


# 1.3 ------------------------------------------------------------------------------------------------------------------


def decode_inputs(seed: int) -> dict:
    """A machine and a model, and two batches: one far below, one far above where the two limits meet."""
    r = random.Random(seed)
    bandwidth = r.uniform(20e9, 3000e9)
    ridge, parameters = r.uniform(20, 300), r.randrange(10**9, 10**11)
    read = parameters * r.uniform(0.55, 1.9)
    meet = ridge * read / parameters / 2
    return {
        "read": read,
        "parameters": parameters,
        "batches": [r.randrange(2, 4), int(meet * r.uniform(3, 9)) + 2],
        "bandwidth": bandwidth,
        "rate": bandwidth * ridge,
    }


def drive_decode(answer, given: dict) -> dict:
    read, parameters, batches, bandwidth, rate = given.values()
    return {f"batch {batch}": answer(read, parameters, batch, bandwidth, rate) for batch in batches}


DECODE_MISTAKES = {
    "this counts operations only: at a small batch the machine waits for the weights": lambda w, p, n, b, r: r / (2 * p),
    "this divides the rate of operations by bytes: weights arrive at the bandwidth": lambda w, p, n, b, r: n * r / w,
    "this counts bytes only: at a large batch the operations take longer, and they grow with the batch": (
        lambda w, p, n, b, r: n * b / w
    ),
    "these are steps a second: every step gives one token for each sequence of the batch": (
        lambda w, p, n, b, r: 1 / max(w / b, 2 * p * n / r)
    ),
    "the weights are read once for each sequence here. A step reads them once for the whole batch": (
        lambda w, p, n, b, r: n / max(n * w / b, 2 * p * n / r)
    ),
    "this adds the two times. Reading and computing overlap: the longer one decides": (
        lambda w, p, n, b, r: n / (w / b + 2 * p * n / r)
    ),
    "this takes the shorter of the two times: both have to be over": lambda w, p, n, b, r: n / min(w / b, 2 * p * n / r),
    "half of the operations are missing: each weight is multiplied and added": lambda w, p, n, b, r: n / max(w / b, p * n / r),
    "read and bandwidth are both in bytes; nothing needs a factor 8": lambda w, p, n, b, r: n / max(8 * w / b, 2 * p * n / r),
    "this is the time of a step, not tokens a second": lambda w, p, n, b, r: max(w / b, 2 * p * n / r),
}  # fmt: skip


def judge_decode(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    if all(_near(got[k], want[k]) for k in want):
        return _passes(*((got[k], want[k]) for k in want))
    for said, mistaken in DECODE_MISTAKES.items():
        if all(_near(got[k], v) for k, v in drive_decode(mistaken, given).items()):
            return wrong(said)
    bad = next(k for k in want if not _near(got[k], want[k]))
    return wrong(f"{bad}: got {got[bad]:.6g} tokens a second, wanted {want[bad]:.6g}")


DECODE_RATE = Exercise(
    id="1.3", name="decode_rate", title="Tokens a second, at best", minutes=8, difficulty=2, points=2,
    returns=("tokens_per_second",), inputs=decode_inputs, reference=roofline.decode_rate, drive=drive_decode, judge=judge_decode,
    mutants=(
        Mutant(lambda w, p, n, b, r: r / (2 * p), "operations only"),
        Mutant(lambda w, p, n, b, r: n * r / w, "divides the rate of operations by bytes"),
        Mutant(lambda w, p, n, b, r: n * b / w, "bytes only"),
        Mutant(lambda w, p, n, b, r: 1 / max(w / b, 2 * p * n / r), "steps a second"),
        Mutant(lambda w, p, n, b, r: n / max(n * w / b, 2 * p * n / r), "once for the whole batch"),
        Mutant(lambda w, p, n, b, r: n / (w / b + 2 * p * n / r), "overlap"),
        Mutant(lambda w, p, n, b, r: n / min(w / b, 2 * p * n / r), "shorter"),
        Mutant(lambda w, p, n, b, r: n / max(w / b, p * n / r), "multiplied and added"),
    ),
)  # fmt: skip


# 1.4 ------------------------------------------------------------------------------------------------------------------


def crossover_inputs(seed: int) -> dict:
    """A machine whose crossover lies a third of the way between two whole numbers, so that rounding either way shows."""
    r = random.Random(seed)
    bits = r.choice([3, 4])
    bandwidth = r.uniform(20e9, 3000e9)
    return {"bandwidth": bandwidth, "rate": bandwidth * (r.randrange(20, 200) + 0.3) * 16 / bits, "weight_bits": bits}


def judge_crossover(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    bandwidth, rate, bits = given.values()
    batch, expected = got["batch"], want["batch"]
    ridge = rate / bandwidth
    exact = ridge * bits / 16
    if batch == expected:
        return right()
    if not float(batch).is_integer():
        return wrong(f"a batch is a whole number, got {batch:.6g}: which is the first one at which operations take as long?")
    likely = {
        "one too few: at this batch reading the weights still takes longer": exact,
        "twice too many: each weight is multiplied and added for each sequence, two operations": 2 * exact,
        "this is the operations a byte of the machine, where 16-bit weights cross over. These weights are narrower": ridge,
        "eight times too many: weight_bits are bits, the bandwidth is in bytes": 8 * exact,
        "turned around: narrower weights are read sooner, so the batch at which operations take over is smaller": ridge * 16 / bits,
        "bandwidth and rate are exchanged": bits / 16 / ridge,
    }
    for said, value in likely.items():
        if batch in (math.floor(value), math.ceil(value)):
            return wrong(said)
    return wrong(f"a ridge of {ridge:.1f} operations a byte and {bits}-bit weights: got {batch:g}, wanted {expected}")


CROSSOVER_BATCH = Exercise(
    id="1.4", name="crossover_batch", title="Where the batch takes over", minutes=8, difficulty=2, points=2,
    returns=("batch",), inputs=crossover_inputs, reference=roofline.crossover_batch, judge=judge_crossover,
    mutants=(
        Mutant(lambda b, r, w: int(r / b * w / 16), "one too few"),
        Mutant(lambda b, r, w: r / b * w / 16, "whole number"),
        Mutant(lambda b, r, w: math.ceil(r / b * w / 8), "twice too many"),
        Mutant(lambda b, r, w: math.ceil(r / b), "operations a byte of the machine"),
        Mutant(lambda b, r, w: math.ceil(r / b * w / 2), "eight times"),
        Mutant(lambda b, r, w: math.ceil(r / b * 16 / w), "turned around"),
        Mutant(lambda b, r, w: math.ceil(b / r * w / 16), "exchanged"),
    ),
)  # fmt: skip


# 1.5 ------------------------------------------------------------------------------------------------------------------

WORDS = ("memory", "compute", "overhead")


def limits_inputs(seed: int) -> dict:
    """Runs by the shares of bandwidth and rate that they used; shuffled, none near a third or near each other."""
    r = random.Random(seed)
    bandwidth, rate = r.uniform(20e9, 3000e9), r.uniform(1e12, 900e12)
    shares = [
        (r.uniform(0.5, 0.95), r.uniform(0.05, 0.25)),
        (r.uniform(0.05, 0.25), r.uniform(0.5, 0.95)),
        (r.uniform(0.8, 0.9), r.uniform(0.6, 0.7)),
        (r.uniform(0.6, 0.7), r.uniform(0.8, 0.9)),
        (r.uniform(0.15, 0.3), r.uniform(0.02, 0.1)),
        (r.uniform(0.02, 0.1), r.uniform(0.15, 0.3)),
    ]
    r.shuffle(shares)
    seconds = [r.uniform(1e-3, 0.1) for _ in shares]
    runs = [[s, m * s * bandwidth, c * s * rate] for s, (m, c) in zip(seconds, shares, strict=True)]
    return {"runs": runs, "bandwidth": bandwidth, "rate": rate}


def drive_limits(answer, given: dict) -> dict:
    return {f"run {i}": answer(*run, given["bandwidth"], given["rate"]) for i, run in enumerate(given["runs"])}


def _by_shares(decide):
    return lambda s, w, f, b, r: decide(w / s / b, f / s / r)


LIMIT_MISTAKES = {
    "some runs get less than a third of either limit, and are not limited by them: that is overhead": _by_shares(
        lambda m, c: "memory" if m > c else "compute"
    ),
    "turned around: a run that moves bytes as fast as the machine can is limited by memory": _by_shares(
        lambda m, c: "overhead" if max(m, c) < 1 / 3 else "compute" if m > c else "memory"
    ),
    "a run that uses one of the two well is limited by it, however little it uses the other": _by_shares(
        lambda m, c: "overhead" if min(m, c) < 1 / 3 else "memory" if m > c else "compute"
    ),
    "where both are above a third, the larger share decides": _by_shares(
        lambda m, c: "memory" if m >= 1 / 3 else "compute" if c >= 1 / 3 else "overhead"
    ),
    "where both are above one third, the larger share decides, and that can be memory": _by_shares(
        lambda m, c: "compute" if c >= 1 / 3 else "memory" if m >= 1 / 3 else "overhead"
    ),
}


def judge_limits(given: dict, got: dict, want: dict) -> Verdict:
    for name, word in got.items():
        if word not in WORDS:
            return wrong(f"{name}: got {word!r}, wanted one of {', '.join(WORDS)}")
    if got == want:
        return right()
    for said, mistaken in LIMIT_MISTAKES.items():
        if got == drive_limits(mistaken, given):
            return wrong(said)
    bad = next(k for k in want if got[k] != want[k])
    seconds, read, operations = given["runs"][int(bad.split()[1])]
    of_memory, of_compute = read / seconds / given["bandwidth"], operations / seconds / given["rate"]
    used = f"{100 * of_memory:.0f} % of the bandwidth, {100 * of_compute:.0f} % of the rate"
    return wrong(f"a run that used {used}: got {got[bad]!r}, wanted {want[bad]!r}")


WHAT_LIMITS = Exercise(
    id="1.5", name="what_limits", title="Which run is memory-bound?", minutes=8, difficulty=2, points=2,
    returns=("word",), inputs=limits_inputs, reference=roofline.what_limits, drive=drive_limits, judge=judge_limits,
    mutants=(
        Mutant(lambda s, w, f, b, r: "memory" if f / w < r / b else "compute", "that is overhead"),
        Mutant(LIMIT_MISTAKES["turned around: a run that moves bytes as fast as the machine can is limited by memory"], "turned"),
        Mutant(_by_shares(lambda m, c: "overhead" if min(m, c) < 1 / 3 else "memory" if m > c else "compute"), "however little"),
        Mutant(_by_shares(lambda m, c: "memory" if m >= 1 / 3 else "compute" if c >= 1 / 3 else "overhead"), "larger share"),
        Mutant(_by_shares(lambda m, c: "overhead" if max(m, c) < 0.1 else "memory" if m > c else "compute"), "overhead"),
        Mutant(lambda s, w, f, b, r: "bandwidth", "wanted one of"),
    ),
)  # fmt: skip


# 1.6 ------------------------------------------------------------------------------------------------------------------

LEAST_OPERATIONS, MOST_GAIN = 1e9, 1.1


def unhelped_matmul() -> tuple[int, int, int]:
    """Many tokens through a narrow matrix, as in the first half of a LoRA adapter: what moves is activations, not weights."""
    return 65536, 4096, 16


def judge_unhelped(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    for name, value in got.items():
        if not float(value).is_integer() or value < 1:
            return wrong(f"{name} is {value:g}, wanted a positive whole number")
    tokens, i, o = (int(v) for v in got.values())
    operations = 2 * tokens * i * o
    if operations < LEAST_OPERATIONS:
        return wrong(f"that is {operations:.2g} operations, wanted at least {LEAST_OPERATIONS:.0e}: something worth speeding up")
    if roofline.intensity(tokens, i, o, 16) >= A100.ridge:
        return wrong("in 16 bits it is limited by its operations, not by its bytes: lower the operations a byte below the ridge")
    gain = roofline.matmul_seconds(tokens, i, o, 16, A100) / roofline.matmul_seconds(tokens, i, o, 4, A100)
    if gain >= MOST_GAIN:
        share = 2 * i * o / (operations / roofline.intensity(tokens, i, o, 16))
        said = f"4-bit weights make it {gain:.2f} times faster, wanted less than {MOST_GAIN}"
        return wrong(f"{said}: {100 * share:.0f} % of the bytes it moves are weights. What else does a product move?")
    return right()


UNHELPED_MATMUL = Exercise(
    id="1.6", name="unhelped_matmul", title="Memory-bound, and four bits do not help", minutes=10, difficulty=3, points=3,
    returns=("tokens", "in_features", "out_features"), inputs=lambda seed: {}, reference=unhelped_matmul, judge=judge_unhelped,
    mutants=(
        Mutant(lambda: (4096, 4096, 4096), "limited by its operations"),
        Mutant(lambda: (32, 8192, 8192), "What else"),
        Mutant(lambda: (128, 8192, 8192), "What else"),
        Mutant(lambda: (64, 64, 64), "worth speeding up"),
        Mutant(lambda: (65536.5, 4096, 16), "whole number"),
        Mutant(lambda: (65536, 4096), "wanted 3"),
    ),
)  # fmt: skip

EXERCISES = (STORED_BYTES, INTENSITY, DECODE_RATE, CROSSOVER_BATCH, WHAT_LIMITS, UNHELPED_MATMUL)
