"""Chapter 1: what a model weighs, and how fast memory and arithmetic let it be."""

from __future__ import annotations

import math
import operator
import random
from functools import partial

from labsupport.evidence import planner, roofline
from labsupport.evidence.planner import GIB
from labsupport.evidence.roofline import A100
from labsupport.exercises.compare import shown
from labsupport.exercises.form import Exercise, Fault, Mutant, drive_cases, mistakes_by_option, mistakes_of, right


def _near(given: dict, want: dict) -> dict:
    """A dozen float64 operations in any order stay far inside this; a forgotten zero-point or scale is far outside."""
    return {name: 1e-9 * abs(value) for name, value in want.items()}


# 1.1 ------------------------------------------------------------------------------------------------------------------
def stored_inputs(seed: int) -> dict:
    """Sizes of a 7B model, roughly, in whole groups; enough 16-bit weights that leaving them out shows."""
    r = random.Random(seed)
    group_size = r.choice([32, 64, 128])
    quantized, others = group_size * r.randrange(10**6, 10**8), r.randrange(10**8, 10**9)
    return {"quantized": quantized, "others": others, "bits": r.choice([3, 4]), "group_size": group_size}


def _stored(quantized, others, bits, group_size, *, times=1, scale=16, zero=1, other=16, unit=GIB):
    """A right answer, with what can go wrong as options: bits of a scale and of another weight, zero-points for each group."""
    total = times * (quantized * bits + quantized / group_size * (scale + zero * bits) + others * other) / 8
    return total, total / unit


def _about_bytes(given: dict, want: dict, name: str, place: tuple) -> str:
    if name == "gib":
        return f"the bytes are right; {want['total']:.6g} bytes in GiB"
    return "bytes of {quantized:,} weights in {bits} bits and {others:,} in 16".format(**given)


STORED_BYTES = Exercise(
    id="1.1", name="stored_bytes", title="What a model weighs", minutes=8, difficulty=2, points=2,
    returns=("total", "gib"), inputs=stored_inputs, reference=planner.stored_bytes, allowed=_near, about=_about_bytes,
    mistakes=mistakes_by_option(_stored, {
        "these are bits: a byte holds eight of them": {"times": 8},
        "the scales and zero-points are missing: every group stores one of each": {"scale": 0, "zero": 0},
        "the zero-points are missing: every group stores one, in `bits` bits": {"zero": 0},
        "the scales are missing: every group stores one, in 16 bits": {"scale": 0},
        "a zero-point is a code, so it takes `bits` bits, not 16": {"scale": 32, "zero": 0},
        "the 16-bit weights are missing: embedding, head and norms must be stored as well": {"other": 0},
        "only the codes of the quantized weights are counted": {"scale": 0, "zero": 0, "other": 0},
        "16 bits are 2 bytes: the 16-bit weights are counted with one byte, or with sixteen": [{"other": 8}, {"other": 128}],
        "GiB is 2**30 bytes; this divides by 10**9, which gives GB": {"unit": 1e9},
        "this is in MiB: divide by 2**30": {"unit": 2**20},
        "GiB is 2**30 bytes; this multiplies": {"unit": 1 / GIB},
        "a byte is counted as one bit on the way to GiB": {"unit": GIB / 8},
        "embedding, head and norms stay in 16 bits: here they are quantized too":
            lambda quantized, others, *sizes: _stored(quantized + others, 0, *sizes),
        "this is every weight at `bits` bits, the figure that people quote: the others stay in 16 bits, and groups have scales":
            lambda quantized, others, *sizes: _stored(quantized + others, 0, *sizes, scale=0, zero=0),
    }),
    others=(Mutant(partial(_stored, scale=8), "got"), Mutant(partial(_stored, unit=2**40), "the bytes are right")),
)  # fmt: skip


# 1.2 ------------------------------------------------------------------------------------------------------------------
def intensity_inputs(seed: int) -> dict:
    """Several tokens, a matrix that is not square, weights narrower than activations: each can be told from the others."""
    r = random.Random(seed)
    in_features = 128 * r.randrange(8, 40)
    out_features = in_features + 128 * r.randrange(1, 40)
    bits = r.choice([3, 4, 8])
    return {"tokens": r.randrange(9, 400), "in_features": in_features, "out_features": out_features, "weight_bits": bits}


def _intensity(tokens, in_features, out_features, weight_bits, *, operations=2, weights=1, inputs=2, outputs=2):
    """A right answer, with what can go wrong as options: operations and bytes for each number."""
    moved = weights * in_features * out_features * weight_bits / 8 + tokens * (inputs * in_features + outputs * out_features)
    return operations * tokens * in_features * out_features / moved


INTENSITY = Exercise(
    id="1.2", name="intensity", title="Operations for each byte", minutes=8, difficulty=2, points=2,
    returns=("flops_per_byte",), inputs=intensity_inputs, reference=roofline.intensity, allowed=_near,
    about=lambda given, *_: (
        "[{tokens}, {in_features}] times [{in_features}, {out_features}] with {weight_bits}-bit weights".format(**given)),
    mistakes=mistakes_by_option(_intensity, {
        "half of it: a multiplication and an addition are two operations": {"operations": 1},
        "the activations are missing: inputs and outputs move as well": {"inputs": 0, "outputs": 0},
        "the weights are missing, and here they are most of the bytes": {"weights": 0},
        "the outputs are missing: they have to be written": {"outputs": 0},
        "the inputs are missing: they have to be read": {"inputs": 0},
        "weight_bits are bits: eight of them make a byte": {"weights": 8},
        "an activation has 16 bits, which are 2 bytes": {"inputs": 16, "outputs": 16},
        "these are operations for each bit": {"operations": 2 / 8},
        "turned around: these are bytes for each operation": lambda *sizes: 1 / _intensity(*sizes),
        "the weights are counted once for each token. They are read once for all of them":
            lambda tokens, *sizes: _intensity(tokens, *sizes, weights=tokens),
        "only the weights are quantized: activations stay in 16 bits":
            lambda *sizes: _intensity(*sizes, inputs=sizes[3] / 8, outputs=sizes[3] / 8),
        "the activations are those of one token":
            lambda tokens, *sizes: _intensity(tokens, *sizes, inputs=2 / tokens, outputs=2 / tokens),
    }),
    others=(Mutant(partial(_intensity, outputs=4), "-bit weights: got"),),
)  # fmt: skip


# 1.3 ------------------------------------------------------------------------------------------------------------------
def decode_inputs(seed: int) -> dict:
    """A machine and a model, and batches far below, directly on either side of, and far above where the two limits meet."""
    r = random.Random(seed)
    bandwidth, ridge = r.uniform(20e9, 3000e9), r.uniform(40, 300)
    parameters = r.randrange(10**9, 10**11)
    read = parameters * r.uniform(0.55, 1.9)
    meet = ridge * read / parameters / 2
    batches = [r.randrange(2, 4), math.floor(meet), math.floor(meet) + 1, int(meet * r.uniform(3, 9))]
    return {f"batch {batch}": (read, parameters, batch, bandwidth, bandwidth * ridge) for batch in batches}


def _decode_rate(read, parameters, batch, bandwidth, rate, *, reading=1, operations=2, together=max):
    """A right answer, with what can go wrong as options: how often weights are read, and what the two times make together."""
    return batch / together(reading * read / bandwidth, operations * parameters * batch / rate)


DECODE_RATE = Exercise(
    id="1.3", name="decode_rate", title="Tokens a second, at best", minutes=8, difficulty=2, points=2,
    returns=("tokens_per_second",), inputs=decode_inputs, reference=roofline.decode_rate, drive=drive_cases, allowed=_near,
    about=lambda given, want, batch, _: f"{batch}, in tokens a second",
    mistakes=mistakes_by_option(_decode_rate, {
        "this counts operations only: at a small batch the machine waits for the weights": {"reading": 0},
        "this counts bytes only: at a large batch the operations take longer, and they grow with the batch": {"operations": 0},
        "this adds the two times. Reading and computing overlap: the longer one decides": {"together": operator.add},
        "this takes the shorter of the two times: both have to be over": {"together": min},
        "half of the operations are missing: each weight is multiplied and added": {"operations": 1},
        "read and bandwidth are both in bytes; nothing needs a factor 8": {"reading": 8},
        "this divides the rate of operations by bytes: weights arrive at the bandwidth":
            lambda read, parameters, batch, bandwidth, rate: batch * rate / read,
        "these are steps a second: every step gives one token for each sequence of the batch":
            lambda read, parameters, batch, *machine: _decode_rate(read, parameters, batch, *machine) / batch,
        "the weights are read once for each sequence here. A step reads them once for the whole batch":
            lambda read, parameters, batch, *machine: _decode_rate(read, parameters, batch, *machine, reading=batch),
        "this is the time of a step, not tokens a second":
            lambda read, parameters, batch, *machine: batch / _decode_rate(read, parameters, batch, *machine),
    }),
    others=(Mutant(partial(_decode_rate, operations=3), "tokens a second: got"),),
)  # fmt: skip


# 1.4 ------------------------------------------------------------------------------------------------------------------
def crossover_inputs(seed: int) -> dict:
    """Machines that cross over at a whole number exactly (powers of two, for every way to compute it), and around others."""
    r = random.Random(seed)
    machines = [[2.0 ** r.randrange(35, 41), 2.0 ** r.randrange(46, 49), r.choice([3, 5])]]
    for beyond in (0.02, 0.3, 0.97):
        bandwidth, bits = r.uniform(20e9, 3000e9), r.choice([3, 4])
        machines.append([bandwidth, bandwidth * (r.randrange(20, 200) + beyond) * 16 / bits, bits])
    r.shuffle(machines)
    return {f"machine {i}": machine for i, machine in enumerate(machines)}


def _crossover(bandwidth, rate, weight_bits, *, crossing=16, whole=math.ceil):
    """A right answer, with what can go wrong as options: bits of weights that cross over at the ridge, and how it is made whole."""
    return whole(rate / bandwidth * weight_bits / crossing)


def _about_machine(given: dict, want: dict, machine: str, place: tuple) -> str:
    bandwidth, rate, bits = given[machine]
    return f"a ridge of {rate / bandwidth:.6g} operations a byte and {bits}-bit weights"


CROSSOVER_BATCH = Exercise(
    id="1.4", name="crossover_batch", title="Where the batch takes over", minutes=8, difficulty=2, points=2,
    returns=("batch",), inputs=crossover_inputs, reference=roofline.crossover_batch, drive=drive_cases, about=_about_machine,
    faults=(
        Fault("a batch is a whole number, got {batch:.6g}: which is the first one at which operations take as long?",
              lambda given, got, want: next(({"batch": batch} for batch in got.values() if batch != math.floor(batch)), None),
              (partial(_crossover, whole=float),)),
    ),
    mistakes=mistakes_by_option(_crossover, {
        "one too few: at this batch reading the weights still takes longer": {"whole": math.floor},
        "twice too many: each weight is multiplied and added for each sequence, two operations": {"crossing": 8},
        "eight times too many: weight_bits are bits, the bandwidth is in bytes": {"crossing": 2},
        "this is the operations a byte of the machine, where 16-bit weights cross over. These weights are narrower":
            lambda bandwidth, rate, bits: _crossover(bandwidth, rate, 16),
        "turned around: narrower weights are read sooner, so the batch at which operations take over is smaller":
            lambda bandwidth, rate, bits: math.ceil(rate / bandwidth * 16 / bits),
        "bandwidth and rate are exchanged": lambda bandwidth, rate, bits: _crossover(rate, bandwidth, bits),
    }),
    others=tuple(Mutant(partial(_crossover, whole=whole), "a ridge of") for whole in (round, lambda batch: math.floor(batch) + 1)),
)  # fmt: skip


# 1.5 ------------------------------------------------------------------------------------------------------------------
WORDS = ("memory", "compute", "overhead")


def limits_inputs(seed: int) -> dict:
    """Runs by the shares of bandwidth and rate that they used: one far ahead, close to a third on either side, close together."""
    r = random.Random(seed)
    bandwidth, rate = r.uniform(20e9, 3000e9), r.uniform(1e12, 900e12)
    ahead, behind, level = r.uniform(0.5, 0.95), r.uniform(0.02, 0.25), r.uniform(0.6, 0.9)
    pairs = [(ahead, behind), (0.335, behind), (0.332, behind), (level, 0.98 * level), (0.3, 0.31), (0.9, 0.4), (0.04, 0.06)]
    runs = []
    for share, other in r.sample(pairs, len(pairs)):
        for of_memory, of_compute in ((share, other), (other, share)):
            seconds = r.uniform(1e-3, 0.1)
            runs.append((seconds, of_memory * seconds * bandwidth, of_compute * seconds * rate, bandwidth, rate))
    return {f"run {i}": run for i, run in enumerate(runs)}


def _shares(seconds, read, operations, bandwidth, rate):
    return read / seconds / bandwidth, operations / seconds / rate


def _by_shares(decide):
    """An answer: decide(share of the bandwidth, share of the rate)."""
    return lambda *run: decide(*_shares(*run))


def _about_run(given: dict, want: dict, run: str, place: tuple) -> str:
    of_memory, of_compute = (100 * share for share in _shares(*given[run]))
    return f"a run that used {of_memory:.3g} % of the bandwidth, {of_compute:.3g} % of the rate"


WHAT_LIMITS = Exercise(
    id="1.5", name="what_limits", title="Which run is memory-bound?", minutes=8, difficulty=2, points=2,
    returns=("word",), inputs=limits_inputs, reference=roofline.what_limits, drive=drive_cases, about=_about_run,
    faults=(
        Fault(f"{{name}}: got {{word!r}}, wanted one of {', '.join(WORDS)}",
              lambda given, got, want: next(({"name": n, "word": word} for n, word in got.items() if word not in WORDS), None),
              (lambda *run: "bandwidth",)),
    ),
    mistakes=mistakes_of(_by_shares, {
        "some runs get less than a third of either limit, and are not limited by them: that is overhead":
            lambda m, c: "memory" if m > c else "compute",
        "turned around: a run that moves bytes as fast as the machine can is limited by memory":
            lambda m, c: "overhead" if max(m, c) < 1 / 3 else "compute" if m > c else "memory",
        "a run that uses one of the two well is limited by it, however little it uses the other":
            lambda m, c: "overhead" if min(m, c) < 1 / 3 else "memory" if m > c else "compute",
        "where both are above a third, the larger share decides":
            lambda m, c: "memory" if m >= 1 / 3 else "compute" if c >= 1 / 3 else "overhead",
        "where both are above one third, the larger share decides, and that can be memory":
            lambda m, c: "compute" if c >= 1 / 3 else "memory" if m >= 1 / 3 else "overhead",
    }),
    others=tuple(Mutant(_by_shares(lambda m, c, third=third: "overhead" if max(m, c) < third else "memory" if m > c else "compute"),
                        "a run that used") for third in (0.1, 0.33, 0.34, 0.5)),
)  # fmt: skip


# 1.6 ------------------------------------------------------------------------------------------------------------------
LEAST_OPERATIONS, MOST_GAIN = 1e9, 1.1


def unhelped_matmul() -> tuple[int, int, int]:
    """Many tokens through a narrow matrix, as in the first half of a LoRA adapter: what moves is activations, not weights."""
    return 65536, 4096, 16


def _helped(given: dict, got: dict, want: dict) -> str | None:
    """Why a product is not what is wanted; None if it is."""
    for name, value in got.items():
        if value < 1 or value != int(value):
            return f"{name} is {value:g}, wanted a positive whole number"
    tokens, i, o = (int(value) for value in got.values())
    operations, at_16 = 2 * tokens * i * o, roofline.intensity(tokens, i, o, 16)
    if operations < LEAST_OPERATIONS:
        few, least = shown(operations, LEAST_OPERATIONS, 2)
        return f"that is {few} operations, wanted at least {least}: something worth speeding up"
    if at_16 >= A100.ridge:
        return "in 16 bits it is limited by its operations, not by its bytes: lower the operations a byte below the ridge"
    gain = roofline.matmul_seconds(tokens, i, o, 16, A100) / roofline.matmul_seconds(tokens, i, o, 4, A100)
    if gain < MOST_GAIN:
        return None
    faster = "4-bit weights make it {} times faster, wanted less than {}".format(*shown(gain, MOST_GAIN, 3))
    return f"{faster}: {200 * i * o / (operations / at_16):.0f} % of the bytes it moves are weights. What else does a product move?"


UNHELPED_MATMUL = Exercise(
    id="1.6", name="unhelped_matmul", title="Memory-bound, and four bits do not help", minutes=10, difficulty=3, points=3,
    returns=("tokens", "in_features", "out_features"), inputs=lambda seed: {}, reference=unhelped_matmul,
    accepts=lambda given, got, want: None if _helped(given, got, want) else right(), otherwise=_helped,
    others=(
        Mutant(lambda: (4096, 4096, 4096), "limited by its operations"), Mutant(lambda: (128, 8192, 8192), "What else"),
        Mutant(lambda: (64, 64, 64), "worth speeding up"), Mutant(lambda: (65536.5, 4096, 16), "whole number"),
    ),
)  # fmt: skip

EXERCISES = (STORED_BYTES, INTENSITY, DECODE_RATE, CROSSOVER_BATCH, WHAT_LIMITS, UNHELPED_MATMUL)
