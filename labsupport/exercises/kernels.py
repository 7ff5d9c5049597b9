"""Chapter 11: what a kernel must move, unpacking without keeping, another's zero-point, Triton, and where it stops paying."""

from __future__ import annotations

import inspect
import math
import random
import sys
from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from labsupport.exercises.compare import first_difference, got_and_wanted, largest_difference, within
from labsupport.exercises.form import Exercise, Fault, Mutant, Outputs, generator, mistakes_by_option, mistakes_of
from labsupport.kernels import cpu, language, paper, twin
from labsupport.kernels.language import tl  # the interpreter looks for it among the globals of a kernel
from labsupport.quant import rtn


# 11.1 -----------------------------------------------------------------------------------------------------------------
def bytes_inputs(seed: int) -> dict:
    """Sizes in which no two parts of the bill are alike."""
    r = random.Random(seed)
    return {
        "batch": (3, 7, 1)[seed % 3], "in_features": 64 * r.randrange(20, 60), "out_features": 16 * r.randrange(301, 400),
        "bits": (4, 3)[seed % 2], "group_size": r.choice([16, 32, 64]),
    }  # fmt: skip


def _bytes(
    b, i, o, bits, group, kept, zero_bits=None, scale_bits=16, times=2, of_activations=16, inputs=True, outputs=True, stored=True,
    eighth=8, grid=True,
):  # fmt: skip
    """The bill with what can go wrong as options."""
    zero_bits = bits if zero_bits is None else zero_bits
    codes = i * o * bits + (i * o / group * (scale_bits + zero_bits) if grid else 0)
    between = 0 if kept is None else times * i * o * kept
    return ((codes if stored or kept is None else 0) + between + of_activations * b * (i * inputs + o * outputs)) / eighth


BYTES_MOVED = Exercise(
    id="11.1", name="bytes_moved", title="What a kernel must move", minutes=8, difficulty=2, points=2,
    returns=("bytes",), inputs=bytes_inputs, reference=paper.bytes_moved,
    drive=lambda answer, given: {f"kept_width {kept}": answer(*given.values(), kept) for kept in (None, 16, 32)},
    allowed=lambda given, want: {name: 1e-9 * value for name, value in want.items()},  # some roundings of a float64
    mistakes=mistakes_by_option(_bytes, {
        "scales and zero-points are missing: they are read with the codes": {"grid": False},
        "the zero-points are missing": {"zero_bits": 0}, "the scales are missing": {"scale_bits": 0},
        "a zero-point is stored in as many bits as a code, not in 16": {"zero_bits": 16},
        "the weight in between is counted once. It is written, and then it is read": {"times": 1},
        "where the weight is unpacked first, the codes have still to be read": {"stored": False},
        "the outputs are missing: they are written": {"outputs": False}, "the inputs are missing: they are read": {"inputs": False},
        "inputs and outputs are missing": {"inputs": False, "outputs": False},
        "these are bits: eight of them make a byte": {"eighth": 1},
        "the weight in between was taken to have 16 bits. It has kept_width":
            lambda b, i, o, bits, group, kept: _bytes(b, i, o, bits, group, kept and 16),
        "an activation has 16 bits, which are 2 bytes": {"of_activations": 8},
    }),
)  # fmt: skip


# 11.2 -----------------------------------------------------------------------------------------------------------------
def _packed(rows: int, columns: int, group_size: int, g: torch.Generator) -> dict[str, torch.Tensor]:
    """A weight as kernels read it. Some rows have one sign, so that a zero-point is at an end; groups of row 0 differ in theirs."""
    weight = torch.randn(rows, columns, generator=g)
    weight[1::3] = weight[1::3].abs() + 0.5
    weight[0, :group_size] = weight[0, :group_size].abs() - 0.2
    stored = rtn.quantize(weight, 4, group_size)
    return {
        "packed": stored.packed_codes.view(rows, columns // 2).clone(),
        "scale": stored.scale.clone(),
        "zero_point": stored.zero_point.to(torch.uint8),
    }


def tiled_inputs(seed: int) -> dict:
    """The last tile is not a whole one, and no two sizes are alike, of one seed or of two in turn."""
    g = generator(seed)
    batch, out, columns, group_size, rows = ((3, 52, 64, 16, 10), (2, 47, 96, 32, 7))[seed % 2]
    return {"x": torch.randn(batch, columns, generator=g)} | _packed(out, columns, group_size, g) | {"rows": rows}


class _Largest(TorchFunctionMode):
    """Notes how many values the largest tensor holds that is made on the way. Views of what was given are not new.

    Of what a function of torch makes inside only its result is seen. (TorchDispatchMode sees all, but first imports torch._dynamo,
    which takes seconds.)
    """

    def __init__(self, given: list[torch.Tensor]):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in given}
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.count = max(self.count, t.untyped_storage().nbytes() // t.element_size())
        return made


def drive_tiled(answer: Callable, given: dict) -> dict:
    """The product, and how many values the largest tensor on the way holds; 0 if that is no more than two tiles.

    A tile of whole numbers and one of the same size beside it are enough; half of the weight's codes are more.
    """
    with _Largest([v for v in given.values() if isinstance(v, torch.Tensor)]) as watch:
        product = answer(*given.values())
    return {"product": product, "largest": watch.count if watch.count > 2 * given["rows"] * given["x"].shape[1] else 0}


def _weight(
    packed, scale, zero_point, high_first=False, zero=True, step=True, whole_zero=False, apart=False, wrapping=False
):  # fmt: skip
    """A packed weight in float32 [out, in], with every step that can go wrong as an option."""
    pair = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    codes = torch.cat(pair, 1) if apart else torch.stack(pair, -1).flatten(1)
    size = codes.shape[1] // scale.shape[1]
    zeros = zero_point.repeat_interleave(size, 1) if zero else torch.zeros_like(codes)
    steps = scale.float().repeat_interleave(size, 1) if step else 1.0
    if whole_zero:
        return codes.float() * steps - zeros.float()
    return ((codes - zeros).float() if wrapping else codes.float() - zeros.float()) * steps


def _tiled(x, packed, scale, zero_point, rows, **options):
    tiles = zip(*(t.split(rows) for t in (packed, scale, zero_point)), strict=True)
    return torch.cat([x.float() @ _weight(*tile, **options).t() for tile in tiles], 1)


def _norms(given: Outputs, order: int) -> torch.Tensor:
    """The sum of magnitudes (order 1), or the root of the sum of squares (2), of each output's terms, in the product's shape."""
    weight = _weight(given["packed"], given["scale"], given["zero_point"])
    return (given["x"].float().abs() ** order @ weight.abs().t() ** order) ** (1 / order)


def _roundings(given: Outputs) -> torch.Tensor:
    """How far two float32 products may lie apart: each rounds a term twice and once for each sum, by 2**-24 of the magnitudes."""
    return 2 * (given["x"].shape[-1] + 2) * 2**-24 * _norms(given, 1)


def _product_off(given: Outputs, got: Outputs, want: Outputs) -> str:
    limit, (found, wanted) = _roundings(given), ({"product": outputs["product"]} for outputs in (got, want))
    if within(found, wanted, limit):
        out, columns = given["packed"].shape[0], given["x"].shape[1]
        sizes = f"the whole weight has {out * columns}, a tile {given['rows'] * columns}"
        return f"right, but on the way there is a tensor of {got['largest']} values: {sizes}. Unpack a tile at a time"
    place, *values = first_difference(found, wanted, limit)
    message, off = f"{place}: {got_and_wanted(*values)}", largest_difference(found["product"], wanted["product"])
    # bfloat16 moves a weight and an activation by up to 2**-9 each, some up and some down.
    if off > (short := 2**-7 * _norms(given, 2).max().item()):
        return message
    allowed = f"float32 allows {limit.max().item():.1g} and 16 bits {short:.1g}"
    return f"{message}. Nearly right, off by {off:.2g} where {allowed}: is something computed in 16 bits?"


TILED = Exercise(
    id="11.2", name="tiled_product", title="Unpack without keeping", minutes=15, difficulty=3, points=3,
    returns=("product",), inputs=tiled_inputs, reference=twin.multiply, drive=drive_tiled,
    allowed=lambda given, want: {"product": _roundings(given), "largest": 0},
    close=lambda given, want: {"product": _roundings(given), "largest": math.inf},  # a mistake is one however it is tiled
    otherwise=_product_off, hint="A row for each token, a column for each output; the last tile may be shorter",
    mistakes=mistakes_by_option(_tiled, {
        "the nibbles of a byte are exchanged: the first code is in the low one, packed & 15": {"high_first": True},
        "zero_point is not subtracted": {"zero": False}, "the scale is missing": {"step": False},
        "zero_point is a code: subtract it before the scale is applied": {"whole_zero": True},
        "all low nibbles come first, then all high ones. They belong in turns: byte j holds columns 2j and 2j + 1": {"apart": True},
        "codes and zero-points are uint8, in which 3 - 5 is 254: make them float before you subtract": {"wrapping": True},
    }),
    others=(
        Mutant(lambda x, packed, scale, zero, size: _tiled(x, packed, scale, zero, len(packed)), "Unpack a tile at a time"),
        Mutant(lambda *a: _tiled(*a)[:, : len(a[1]) // a[4] * a[4]], "the last tile may be shorter"),
        Mutant(lambda x, *w: _tiled(x.bfloat16(), *w), "computed in 16 bits"),
        Mutant(lambda *a: 1.1 * _tiled(*a), "product[0, 0]: got"),
    ),
)  # fmt: skip


# 11.3 -----------------------------------------------------------------------------------------------------------------
def dialect_inputs(seed: int) -> dict:
    """Among the scales one that bfloat16 holds and two half way between two that it holds, of which one goes down and one up."""
    g = generator(seed)
    scale = (0.01 + 0.05 * torch.rand(7, 5, generator=g)).half()
    scale[0, :3] = torch.tensor([1, 1 + 2**-8, 1 + 3 * 2**-8]) / 32
    zero_point = torch.randint(0, 16, (7, 5), generator=g).float()
    zero_point[0] = torch.tensor([8.0, 0.0, 5.0, 15.0, 7.0])
    return {"scale": scale, "zero_point": zero_point}


def _dialect(scale, zero_point, dtype, zero=lambda z, s: (8 - z) * s, late=False):
    rounded = scale.to(dtype).float()
    zeros = zero(zero_point.float(), scale.float() if late else rounded)
    return torch.stack((rounded, zeros), dim=-1).transpose(0, 1).to(dtype).contiguous()


DIALECT = Exercise(
    id="11.3", name="scales_and_zeros", title="Another kernel's zero", minutes=8, difficulty=2, points=2,
    returns=("grids",), inputs=dialect_inputs, reference=cpu.scales_and_zeros, hint="Groups first, then rows, then scale and zero",
    drive=lambda answer, given: {
        "grids": answer(*given.values(), torch.bfloat16), "grids in float32": answer(*given.values(), torch.float32)
    },
    faults=(
        Fault("{name} is {have}, wanted {wanted}, the dtype asked for: the kernel reads it as x is",
              lambda given, got, want: next(({"name": name, "have": got[name].dtype, "wanted": grids.dtype}
                                             for name, grids in want.items() if got[name].dtype != grids.dtype), None),
              (lambda s, z, d: _dialect(s, z, d).float(), lambda s, z, d: _dialect(s, z, torch.bfloat16)), early=True),
    ),
    mistakes=mistakes_by_option(_dialect, {
        "zero has the wrong sign: (code - 8) * scale + zero must be (code - zero_point) * scale": {
            "zero": lambda z, s: (z - 8) * s},
        "the kernel has already subtracted 8 from a code: zero is what is still missing": {"zero": lambda z, s: -z * s},
        "zero is added after the scale: it is a weight and not a code, so scale it": {"zero": lambda z, s: 8 - z},
        "these are the zero-points themselves: zero is a weight, added after the scale": {"zero": lambda z, s: z},
        "scale and zero are exchanged: the scale comes first": lambda s, z, d: _dialect(s, z, d).flip(-1),
        "zero is made from a scale that is not rounded yet. Then the two do not belong together": {"late": True},
        "right in bfloat16 and not in float32, where it has bfloat16's digits: compute in float32 and round to the dtype asked "
        "for, no more": lambda s, z, d: _dialect(s, z, torch.bfloat16).to(d),
    }),
    others=(Mutant(lambda s, z, d: _dialect(s, z, d).transpose(0, 1), "Groups first"),),
)  # fmt: skip


# 11.4 -----------------------------------------------------------------------------------------------------------------
def kernel_inputs(seed: int) -> dict:
    """The last program has rows that do not exist. One seed in five has two programs and three groups: the interpreter is slow."""
    g = generator(seed)
    out, groups, group_size, rows = (6, 3, 16, 4) if seed % 5 == 0 else (3, 2, 16, 4)
    x = torch.randn(groups * group_size, generator=g).half()
    return {"x": x} | _packed(out, groups * group_size, group_size, g) | {"group_size": group_size, "rows": rows}


def w4_kernel(x, packed, scale, zero_point, out, rows, groups, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """One row of activations [groups * GROUP] times a weight -> out float32 [rows]; a program makes ROWS of them."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    byte = tl.arange(0, GROUP // 2)
    exists = row < rows
    total = tl.zeros([ROWS], tl.float32)
    for group in range(groups):
        place = (row[:, None] * groups + group) * (GROUP // 2) + byte[None, :]
        codes = tl.load(packed + place, mask=exists[:, None], other=0)
        even = tl.load(x + group * GROUP + 2 * byte).to(tl.float32)
        odd = tl.load(x + group * GROUP + 2 * byte + 1).to(tl.float32)
        step = tl.load(scale + row * groups + group, mask=exists, other=0).to(tl.float32)
        zero = tl.load(zero_point + row * groups + group, mask=exists, other=0).to(tl.float32)
        low = (codes & 15).to(tl.float32) - zero[:, None]
        high = (codes >> 4).to(tl.float32) - zero[:, None]
        total += tl.sum(low * even[None, :] + high * odd[None, :], 1) * step
    tl.store(out + row, total, mask=exists)


def launch_kernel(
    kernel: Callable, x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor,
    group_size: int, rows: int, run: Callable = language.launch,
) -> torch.Tensor:  # fmt: skip
    """Run the learner's kernel on x [in] and a weight of any size: float32 [out]. Group size and rows are powers of two."""
    out = torch.full((len(packed),), torch.nan, device=x.device)
    programs = (-(-len(packed) // rows),)
    run(kernel, programs, x, packed, scale, zero_point, out, len(packed), scale.shape[1], GROUP=group_size, ROWS=rows)
    return out


# What our own kernels, the reference and the mistakes, gave on inputs that they had before: a check looks for each mistake again.
_OURS: set[Callable] = set()
_OURS.add(w4_kernel)
_products: dict[tuple, torch.Tensor] = {}


def drive_kernel(answer: Callable, given: dict) -> dict:
    if not language.available():
        answer(*[None] * 9)  # the untouched stub says so; anything else fails, on whatever comes first
    key = (answer, *(v.numpy().tobytes() if isinstance(v, torch.Tensor) else v for v in given.values()))
    if key in _products:
        return {"product": _products[key]}
    # Whoever watches for calls of our own kernel is called for every call that the interpreter makes, which takes twice as long as
    # the kernel, and would see nothing: it runs a rewritten copy.
    watcher = sys.getprofile()
    sys.setprofile(None)
    try:
        product = launch_kernel(answer, **given, run=language.interpret)
    finally:
        sys.setprofile(watcher)
    if answer in _OURS:
        _products[key] = product
    return {"product": product}


def _with(changes: dict[str, str]) -> Callable:
    """The kernel with parts of its text changed for others."""
    text = inspect.getsource(w4_kernel)
    for before, after in changes.items():
        if before not in text:
            raise ValueError(f"the kernel holds no {before!r}")
        text = text.replace(before, after)
    names = dict(globals())
    exec(compile(text, "<mistake>", "exec", dont_inherit=True), names)
    _OURS.add(names["w4_kernel"])
    return names["w4_kernel"]


KERNEL = Exercise(
    id="11.4", name="w4_kernel", title="The inside of a kernel", minutes=25, difficulty=4, points=4,
    returns=("product",), inputs=kernel_inputs, reference=w4_kernel, drive=drive_kernel,
    allowed=lambda given, want: _roundings(given), otherwise=_product_off,
    faults=(
        Fault("outputs {missing} are NaN: nothing was stored there, or NaN was",
              lambda given, got, want: (empty := got["product"].isnan()).any() and {"missing": empty.nonzero()[:, 0].tolist()},
              (_with({"    tl.store(out + row, total, mask=exists)": "    pass"}),), early=True),
    ),
    mistakes=mistakes_of(_with, {
        "the nibbles of a byte are exchanged: the first code is in the low one, codes & 15": {
            "codes & 15": "codes >> 4 ", "(codes >> 4).to": "(codes & 15).to"},
        "zero_point is not subtracted": {" - zero[:, None]": ""}, "the scale is missing": {" * step": ""},
        "codes and zero-points are uint8, in which 3 - 5 is 254: make them float before you subtract": {
            "other=0).to(tl.float32)": "other=0)", ".to(tl.float32) - zero[:, None]": " - zero[:, None]",
            "low * even": "low.to(tl.float32) * even", "high * odd": "high.to(tl.float32) * odd"},
        "only the even columns count: the high nibbles are missing": {" + high * odd[None, :]": ""},
        "only the last group counts: add every group's part to total": {"total += ": "total = "},
        "every group is scaled by the first group's scale: scale is [rows, groups]": {
            "scale + row * groups + group": "scale + row * groups"},
        "every group has the first group's zero-point: zero_point is [rows, groups]": {
            "zero_point + row * groups + group": "zero_point + row * groups"},
        "every group multiplies the first group's activations: x moves on by GROUP": {
            "x + group * GROUP + 2 * byte": "x + 2 * byte"},
        "low nibbles meet the first half of a group of x, high ones the second. A byte holds neighbors, 2j and 2j + 1": {
            "+ 2 * byte + 1": "+ GROUP // 2 + byte", "+ 2 * byte)": "+ byte)"},
    }),
    others=(
        Mutant(_with({", mask=exists[:, None], other=0": ""}), "reads outside of the tensors"),
        Mutant(_with({", total, mask=exists": ", total"}), "writes outside of the tensors"),
        Mutant(_with({"odd[None, :], 1) * step": "odd[None, :], 1).to(tl.float16).to(tl.float32) * step"}), "computed in 16 bits"),
        Mutant(_with({"row[:, None] * groups + group": "row[:, None] + rows * group"}), "product["),
    ),
)  # fmt: skip


# 11.5 -----------------------------------------------------------------------------------------------------------------
def crossover_inputs(seed: int) -> dict:
    """Pairs of kernels by where they meet: at a whole batch, close above and below one, below 1, and with the same rate.

    Bandwidth, read and the whole batch are powers of two, so that it comes out whole in whatever order it is computed. Read and
    operations differ, as where rows are padded: so exchanging them shows.
    """
    r = random.Random(seed)
    bandwidth, read = 2.0 ** r.randrange(36, 42), 2.0 ** r.randrange(22, 29)
    cases = {}
    for meet in (2 ** r.randrange(4, 8), r.randrange(20, 99) + 0.03, r.randrange(100, 200) - 0.03, 0.4, r.randrange(20, 99) + 0.5):
        operations = float(round(read / r.uniform(1.1, 1.25)))
        narrow_rate = meet * operations * (bandwidth / read)
        faster = 1.0 if meet % 1 == 0.5 else 1 / r.uniform(0.3, 0.8)
        cases[f"kernels that meet at {meet:g}"] = (read, operations, bandwidth, faster * narrow_rate, narrow_rate)
    return {"cases": cases}


def _misses(by: int) -> Callable:
    """Whether each batch is right or off by `by`, and which is the first that is."""

    def seen(given: Outputs, got: Outputs, want: Outputs) -> dict | None:
        off = [name for name in want if got[name] != want[name]]
        return {"place": off[0]} if off and all(got[name] == want[name] + by for name in off) else None

    return seen


CROSSOVER = Exercise(
    id="11.5", name="crossover", title="Where four bits stop paying", minutes=12, difficulty=3, points=3,
    returns=("batch",), inputs=crossover_inputs, reference=paper.crossover,
    drive=lambda answer, given: {name: answer(*case) for name, case in given["cases"].items()},
    # A mistake is one whichever way it is rounded.
    alike=lambda given, got, theirs: all(got[name] in (batch, batch - 1) for name, batch in theirs.items()),
    faults=(
        Fault("a batch is a whole number, got {batch:.6g}",
              lambda given, got, want: next(({"batch": batch} for batch in got.values() if batch % 1), None),
              (lambda w, f, b, r, n: w / b * n / f,)),
        Fault("{place}: one too few. At this batch the 4-bit kernel is still ahead by a little", _misses(-1),
              (lambda w, f, b, r, n: math.floor(w / b * n / f), lambda w, f, b, r, n: math.ceil(w / b * n / f) - 1)),
        Fault("{place}: one too many. It takes at least as long already at the batch before", _misses(1),
              (lambda w, f, b, r, n: math.floor(w / b * n / f) + 1, lambda w, f, b, r, n: math.ceil(w / b * n / f) + 1)),
    ),
    mistakes=mistakes_of(lambda rule: lambda *case: math.ceil(rule(*case)), {
        "this is where the 16-bit kernel stops waiting for memory. The other computes more slowly, and meets it before":
            lambda w, f, b, r, n: w / b * r / f,
        "this is where the 4-bit kernel stops waiting for memory. It is still ahead then: the other has four times as much to read":
            lambda w, f, b, r, n: w / 4 / b * n / f,
        "the operations are those of one row already, additions and all": lambda w, f, b, r, n: w / b * n / (2 * f),
        "this takes the ratio of the two rates: they tell how far it falls behind, not where": lambda w, f, b, r, n: r / n,
        "read and bandwidth are both in bytes: nothing needs a factor 8": lambda w, f, b, r, n: 8 * w / b * n / f,
        "read and operations are exchanged: read / bandwidth is a time, and so is operations / rate":
            lambda w, f, b, r, n: f / b * n / w,
    }),
    others=(Mutant(lambda w, f, b, r, n: round(w / b * n / f), "one too few"),),
)  # fmt: skip

EXERCISES = (BYTES_MOVED, TILED, DIALECT, KERNEL, CROSSOVER)
