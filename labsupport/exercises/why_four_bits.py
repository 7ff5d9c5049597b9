"""Chapter 1: what a model weighs, and how fast memory and arithmetic let it be."""

from __future__ import annotations

import math
import random

from labsupport.evidence import planner, roofline
from labsupport.evidence.planner import GIB
from labsupport.evidence.roofline import A100
from labsupport.exercises.compare import first_difference, got_and_wanted, shown
from labsupport.exercises.form import Exercise, Fault, Mistake, Mutant, right


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


def _stored(bits_of, unit=GIB):
    """An answer: bits_of(quantized, others, bits, groups), in bytes and in another unit."""

    def answer(quantized, others, bits, group_size):
        total = bits_of(quantized, others, bits, quantized / group_size) / 8
        return total, total / unit

    return answer


def _all_bits(n, o, b, g):
    return n * b + g * (16 + b) + o * 16


def _wrong_total(given: dict, got: dict, want: dict) -> str:
    place, have, wanted = first_difference(got, want, _near(given, want))
    if place == "gib":
        return f"the bytes are right; for {want['total']:.6g} bytes in GiB: {got_and_wanted(have, wanted)}"
    weights = f"{given['quantized']:,} weights in {given['bits']} bits and {given['others']:,} in 16"
    return "{}: got {} bytes, wanted {}".format(weights, *shown(have, wanted, 6))


STORED_BYTES = Exercise(
    id="1.1", name="stored_bytes", title="What a model weighs", minutes=8, difficulty=2, points=2,
    returns=("total", "gib"), inputs=stored_inputs, reference=planner.stored_bytes, allowed=_near, otherwise=_wrong_total,
    mistakes=(
        Mistake("these are bits: a byte holds eight of them", _stored(lambda *sizes: 8 * _all_bits(*sizes))),
        Mistake("the scales and zero-points are missing: every group stores one of each",
                _stored(lambda n, o, b, g: n * b + o * 16)),
        Mistake("the zero-points are missing: every group stores one, in `bits` bits",
                _stored(lambda n, o, b, g: n * b + g * 16 + o * 16)),
        Mistake("the scales are missing: every group stores one, in 16 bits", _stored(lambda n, o, b, g: n * b + g * b + o * 16)),
        Mistake("a zero-point is a code, so it takes `bits` bits, not 16", _stored(lambda n, o, b, g: n * b + g * 32 + o * 16)),
        Mistake("the 16-bit weights are missing: embedding, head and norms must be stored as well",
                _stored(lambda n, o, b, g: n * b + g * (16 + b))),
        Mistake("only the codes of the quantized weights are counted", _stored(lambda n, o, b, g: n * b)),
        Mistake("embedding, head and norms stay in 16 bits: here they are quantized too",
                _stored(lambda n, o, b, g: (n + o) * (b + g / n * (16 + b)))),
        Mistake("this is every weight at `bits` bits, the figure that people quote: the others stay in 16 bits, and groups have "
                "scales", _stored(lambda n, o, b, g: (n + o) * b)),
        *(Mistake("16 bits are 2 bytes: the 16-bit weights are counted with one byte, or with sixteen",
                  _stored(lambda n, o, b, g, size=size: n * b + g * (16 + b) + o * 8 * size)) for size in (1, 16)),
        Mistake("GiB is 2**30 bytes; this divides by 10**9, which gives GB", _stored(_all_bits, 1e9)),
        Mistake("this is in MiB: divide by 2**30", _stored(_all_bits, 2**20)),
        Mistake("GiB is 2**30 bytes; this multiplies", _stored(_all_bits, 1 / GIB)),
        Mistake("a byte is counted as one bit on the way to GiB", _stored(_all_bits, GIB / 8)),
    ),
    others=(
        Mutant(lambda n, o, b, g: _all_bits(n, o, b, n / g) / 8, "wanted 2"),
        Mutant(_stored(lambda n, o, b, g: n * b + g * (8 + b) + o * 16), "got"),
        Mutant(_stored(_all_bits, 2**40), "the bytes are right"),
    ),
)  # fmt: skip


# 1.2 ------------------------------------------------------------------------------------------------------------------
def intensity_inputs(seed: int) -> dict:
    """Several tokens, a matrix that is not square, weights narrower than activations: each can be told from the others."""
    r = random.Random(seed)
    in_features = 128 * r.randrange(8, 40)
    out_features = in_features + 128 * r.randrange(1, 40)
    bits = r.choice([3, 4, 8])
    return {"tokens": r.randrange(9, 400), "in_features": in_features, "out_features": out_features, "weight_bits": bits}


def _over(moved):
    """An answer: operations over moved(tokens, in_features, out_features, bytes of the weights)."""
    return lambda t, i, o, b: 2 * t * i * o / moved(t, i, o, i * o * b / 8)


def _bytes_moved(t, i, o, weights):
    return weights + 2 * t * (i + o)


INTENSITY = Exercise(
    id="1.2", name="intensity", title="Operations for each byte", minutes=8, difficulty=2, points=2,
    returns=("flops_per_byte",), inputs=intensity_inputs, reference=roofline.intensity, allowed=_near,
    otherwise=lambda given, got, want: "[{tokens}, {in_features}] times [{in_features}, {out_features}] with {weight_bits}-bit "
    "weights: got {}, wanted {}".format(*shown(got["flops_per_byte"], want["flops_per_byte"], 6), **given),
    mistakes=(
        Mistake("half of it: a multiplication and an addition are two operations", _over(lambda *sizes: 2 * _bytes_moved(*sizes))),
        Mistake("turned around: these are bytes for each operation", lambda *sizes: 1 / _over(_bytes_moved)(*sizes)),
        Mistake("the activations are missing: inputs and outputs move as well", _over(lambda t, i, o, weights: weights)),
        Mistake("the weights are missing, and here they are most of the bytes", _over(lambda t, i, o, weights: 2 * t * (i + o))),
        Mistake("the outputs are missing: they have to be written", _over(lambda t, i, o, weights: weights + 2 * t * i)),
        Mistake("the inputs are missing: they have to be read", _over(lambda t, i, o, weights: weights + 2 * t * o)),
        Mistake("weight_bits are bits: eight of them make a byte", _over(lambda t, i, o, weights: 8 * weights + 2 * t * (i + o))),
        Mistake("the weights are counted once for each token. They are read once for all of them",
                _over(lambda t, i, o, weights: t * weights + 2 * t * (i + o))),
        Mistake("only the weights are quantized: activations stay in 16 bits",
                _over(lambda t, i, o, weights: weights + t * (i + o) * weights / (i * o))),
        Mistake("an activation has 16 bits, which are 2 bytes", _over(lambda t, i, o, weights: weights + 16 * t * (i + o))),
        Mistake("the activations are those of one token", _over(lambda t, i, o, weights: weights + 2 * (i + o))),
        Mistake("these are operations for each bit", _over(lambda *sizes: 8 * _bytes_moved(*sizes))),
    ),
    others=(Mutant(_over(lambda t, i, o, weights: weights + 2 * t * i + 4 * t * o), "-bit weights: got"),),
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
    return {"read": read, "parameters": parameters, "batches": batches, "bandwidth": bandwidth, "rate": bandwidth * ridge}


def drive_decode(answer, given: dict) -> dict:
    read, parameters, batches, bandwidth, rate = given.values()
    return {f"batch {batch}": answer(read, parameters, batch, bandwidth, rate) for batch in batches}


def _in_seconds(tokens_a_second):
    """An answer from the batch, and the seconds for reading and for computing."""
    return lambda read, p, batch, bandwidth, rate: tokens_a_second(batch, read / bandwidth, 2 * p * batch / rate)


DECODE_RATE = Exercise(
    id="1.3", name="decode_rate", title="Tokens a second, at best", minutes=8, difficulty=2, points=2,
    returns=("tokens_per_second",), inputs=decode_inputs, reference=roofline.decode_rate, drive=drive_decode, allowed=_near,
    otherwise=lambda given, got, want: "{}: got {} tokens a second, wanted {}".format(
        (first := first_difference(got, want, _near(given, want)))[0], *shown(*first[1:], 6)),
    mistakes=(
        Mistake("this counts operations only: at a small batch the machine waits for the weights",
                _in_seconds(lambda n, reading, computing: n / computing)),
        Mistake("this divides the rate of operations by bytes: weights arrive at the bandwidth",
                lambda read, p, n, bandwidth, rate: n * rate / read),
        Mistake("this counts bytes only: at a large batch the operations take longer, and they grow with the batch",
                _in_seconds(lambda n, reading, computing: n / reading)),
        Mistake("these are steps a second: every step gives one token for each sequence of the batch",
                _in_seconds(lambda n, reading, computing: 1 / max(reading, computing))),
        Mistake("the weights are read once for each sequence here. A step reads them once for the whole batch",
                _in_seconds(lambda n, reading, computing: n / max(n * reading, computing))),
        Mistake("this adds the two times. Reading and computing overlap: the longer one decides",
                _in_seconds(lambda n, reading, computing: n / (reading + computing))),
        Mistake("this takes the shorter of the two times: both have to be over",
                _in_seconds(lambda n, reading, computing: n / min(reading, computing))),
        Mistake("half of the operations are missing: each weight is multiplied and added",
                _in_seconds(lambda n, reading, computing: n / max(reading, computing / 2))),
        Mistake("read and bandwidth are both in bytes; nothing needs a factor 8",
                _in_seconds(lambda n, reading, computing: n / max(8 * reading, computing))),
        Mistake("this is the time of a step, not tokens a second",
                _in_seconds(lambda n, reading, computing: max(reading, computing))),
    ),
    others=(Mutant(_in_seconds(lambda n, reading, computing: n / max(reading, 1.5 * computing)), "tokens a second, wanted"),),
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
    return {"machines": machines}


def drive_crossover(answer, given: dict) -> dict:
    return {f"machine {i}": answer(*machine) for i, machine in enumerate(given["machines"])}


def _first_batch(value, whole=math.ceil):
    """An answer: value(operations a byte of the machine, bits), made whole."""
    return lambda bandwidth, rate, bits: whole(value(rate / bandwidth, bits))


def _wrong_batch(given: dict, got: dict, want: dict) -> str:
    place, have, wanted = first_difference(got, want)
    bandwidth, rate, bits = given["machines"][int(place.split()[1])]
    return f"a ridge of {rate / bandwidth:.6g} operations a byte and {bits}-bit weights: {got_and_wanted(have, wanted)}"


CROSSOVER_BATCH = Exercise(
    id="1.4", name="crossover_batch", title="Where the batch takes over", minutes=8, difficulty=2, points=2,
    returns=("batch",), inputs=crossover_inputs, reference=roofline.crossover_batch, drive=drive_crossover, otherwise=_wrong_batch,
    faults=(
        Fault("a batch is a whole number, got {batch:.6g}: which is the first one at which operations take as long?",
              lambda given, got, want: next(({"batch": batch} for batch in got.values() if batch != math.floor(batch)), None),
              (_first_batch(lambda ridge, bits: ridge * bits / 16, whole=float),)),
    ),
    mistakes=(
        Mistake("one too few: at this batch reading the weights still takes longer",
                _first_batch(lambda ridge, bits: ridge * bits / 16, whole=math.floor)),
        Mistake("twice too many: each weight is multiplied and added for each sequence, two operations",
                _first_batch(lambda ridge, bits: ridge * bits / 8)),
        Mistake("this is the operations a byte of the machine, where 16-bit weights cross over. These weights are narrower",
                _first_batch(lambda ridge, bits: ridge)),
        Mistake("eight times too many: weight_bits are bits, the bandwidth is in bytes",
                _first_batch(lambda ridge, bits: ridge * bits / 2)),
        Mistake("turned around: narrower weights are read sooner, so the batch at which operations take over is smaller",
                _first_batch(lambda ridge, bits: ridge * 16 / bits)),
        Mistake("bandwidth and rate are exchanged", _first_batch(lambda ridge, bits: bits / 16 / ridge)),
    ),
    others=tuple(Mutant(_first_batch(lambda ridge, bits: ridge * bits / 16, whole=whole), "a ridge of")
                 for whole in (round, lambda value: math.floor(value) + 1)),
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
            runs.append([seconds, of_memory * seconds * bandwidth, of_compute * seconds * rate])
    return {"runs": runs, "bandwidth": bandwidth, "rate": rate}


def drive_limits(answer, given: dict) -> dict:
    return {f"run {i}": answer(*run, given["bandwidth"], given["rate"]) for i, run in enumerate(given["runs"])}


def _by_shares(decide):
    return lambda s, w, f, b, r: decide(w / s / b, f / s / r)


def _wrong_word(given: dict, got: dict, want: dict) -> str:
    place, have, wanted = first_difference(got, want)
    seconds, read, operations = given["runs"][int(place.split()[1])]
    of_memory, of_compute = 100 * read / seconds / given["bandwidth"], 100 * operations / seconds / given["rate"]
    return f"a run that used {of_memory:.3g} % of the bandwidth, {of_compute:.3g} % of the rate: got {have!r}, wanted {wanted!r}"


WHAT_LIMITS = Exercise(
    id="1.5", name="what_limits", title="Which run is memory-bound?", minutes=8, difficulty=2, points=2,
    returns=("word",), inputs=limits_inputs, reference=roofline.what_limits, drive=drive_limits, otherwise=_wrong_word,
    faults=(
        Fault(f"{{name}}: got {{word!r}}, wanted one of {', '.join(WORDS)}",
              lambda given, got, want: next(({"name": n, "word": word} for n, word in got.items() if word not in WORDS), None),
              (lambda *run: "bandwidth",)),
    ),
    mistakes=(
        Mistake("some runs get less than a third of either limit, and are not limited by them: that is overhead",
                _by_shares(lambda m, c: "memory" if m > c else "compute")),
        Mistake("turned around: a run that moves bytes as fast as the machine can is limited by memory",
                _by_shares(lambda m, c: "overhead" if max(m, c) < 1 / 3 else "compute" if m > c else "memory")),
        Mistake("a run that uses one of the two well is limited by it, however little it uses the other",
                _by_shares(lambda m, c: "overhead" if min(m, c) < 1 / 3 else "memory" if m > c else "compute")),
        Mistake("where both are above a third, the larger share decides",
                _by_shares(lambda m, c: "memory" if m >= 1 / 3 else "compute" if c >= 1 / 3 else "overhead")),
        Mistake("where both are above one third, the larger share decides, and that can be memory",
                _by_shares(lambda m, c: "compute" if c >= 1 / 3 else "memory" if m >= 1 / 3 else "overhead")),
    ),
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
        Mutant(lambda: (4096, 4096, 4096), "limited by its operations"),
        Mutant(lambda: (32, 8192, 8192), "What else"),
        Mutant(lambda: (128, 8192, 8192), "What else"),
        Mutant(lambda: (64, 64, 64), "worth speeding up"),
        Mutant(lambda: (65536.5, 4096, 16), "whole number"),
        Mutant(lambda: (65536, 4096), "wanted 3"),
    ),
)  # fmt: skip

EXERCISES = (STORED_BYTES, INTENSITY, DECODE_RATE, CROSSOVER_BATCH, WHAT_LIMITS, UNHELPED_MATMUL)
