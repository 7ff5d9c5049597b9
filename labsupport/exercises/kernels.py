"""Chapter 11: what a kernel must move, unpacking without keeping, another's zero-point, Triton, and where it stops paying."""

from __future__ import annotations

import inspect
import math
import random
import sys
import textwrap
from collections.abc import Callable
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from labsupport.exercises.base import Exercise, Mutant, Verdict, generator, largest_difference, right, shape_fault, wrong
from labsupport.kernels import cpu, language, paper, twin
from labsupport.quant import rtn

tl = language.tl  # the interpreter looks for it among the globals of a kernel


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-9)


# 11.1 -----------------------------------------------------------------------------------------------------------------


def bytes_inputs(seed: int) -> dict:
    """Sizes in which no two parts of the bill are alike."""
    r = random.Random(seed)
    return {
        "batch": r.choice([1, 3, 7]),
        "in_features": 64 * r.randrange(20, 60),
        "out_features": 16 * r.randrange(301, 400),
        "bits": r.choice([3, 4]),
        "group_size": r.choice([16, 32, 64]),
    }


def drive_bytes(answer: Callable, given: dict) -> dict:
    kept = {"fused": None, "unfused": 16, "unfused, in 32 bits": 32}
    return {name: answer(*given.values(), width) for name, width in kept.items()}


def _bytes(
    b, i, o, bits, group, kept,
    zero_bits=None, scale_bits=16, times=2, of_activations=16, inputs=True, outputs=True, stored=True, eighth=8, grid=True,
):  # fmt: skip
    zero_bits = bits if zero_bits is None else zero_bits
    weights = i * o
    codes = weights * bits + (weights / group * (scale_bits + zero_bits) if grid else 0)
    between = 0 if kept is None else times * weights * kept
    total = (codes if stored or kept is None else 0) + between + of_activations * b * (i * inputs + o * outputs)
    return total / eighth


BYTES_MISTAKES: dict[str, Callable] = {
    "scales and zero-points are missing: they are read with the codes": partial(_bytes, grid=False),
    "the zero-points are missing": partial(_bytes, zero_bits=0),
    "the scales are missing": partial(_bytes, scale_bits=0),
    "a zero-point is stored in as many bits as a code, not in 16": partial(_bytes, zero_bits=16),
    "the weight in between is counted once. It is written, and then it is read": partial(_bytes, times=1),
    "where the weight is unpacked first, the codes have still to be read": partial(_bytes, stored=False),
    "the outputs are missing: they are written": partial(_bytes, outputs=False),
    "the inputs are missing: they are read": partial(_bytes, inputs=False),
    "inputs and outputs are missing": partial(_bytes, inputs=False, outputs=False),
    "these are bits: eight of them make a byte": partial(_bytes, eighth=1),
    "the weight in between was taken to have 16 bits. It has kept_width": lambda *a: _bytes(*a[:5], a[5] and 16),
    "an activation has 16 bits, which are 2 bytes": partial(_bytes, of_activations=8),
}


def judge_bytes(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    if all(_near(got[k], want[k]) for k in want):
        return right(max(abs(got[k] - want[k]) for k in want), 1e-9 * want["unfused"])
    for said, mistake in BYTES_MISTAKES.items():
        if all(_near(v, got[k]) for k, v in drive_bytes(mistake, given).items()):
            return wrong(said)
    bad = next(k for k in want if not _near(got[k], want[k]))
    kept = {"fused": "None", "unfused": "16"}.get(bad, "32")
    return wrong(f"kept_width {kept}: got {got[bad]:.0f} bytes, wanted {want[bad]:.0f}")


BYTES_MOVED = Exercise(
    id="11.1", name="bytes_moved", title="What a kernel must move", minutes=8, difficulty=2, points=2,
    returns=("bytes",), inputs=bytes_inputs, reference=paper.bytes_moved, drive=drive_bytes, judge=judge_bytes,
    mutants=(
        *(Mutant(rule, said[:35]) for said, rule in BYTES_MISTAKES.items()),
        Mutant(lambda *a: _bytes(*a) + 1, "wanted"),
    ),
)  # fmt: skip


# 11.2 -----------------------------------------------------------------------------------------------------------------


def _packed(rows: int, columns: int, group_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A weight as kernels read it. Some rows have one sign, so that a zero-point is at an end, and not 8."""
    weight = torch.randn(rows, columns, generator=generator)
    weight[1::3] = weight[1::3].abs() + 0.5
    stored = rtn.quantize(weight, 4, group_size)
    return {
        "packed": stored.packed_codes.view(rows, columns // 2).clone(),
        "scale": stored.scale.clone(),
        "zero_point": stored.zero_point.to(torch.uint8),
    }


def tiled_inputs(seed: int) -> dict:
    """The last tile is not a whole one, and no two seeds in turn have a size in common."""
    g = generator(seed)
    batch, out, columns, group_size, rows = ((3, 52, 64, 16, 8), (2, 47, 96, 32, 7))[seed % 2]
    return {"x": torch.randn(batch, columns, generator=g)} | _packed(out, columns, group_size, g) | {"rows": rows}


class _Largest(TorchDispatchMode):
    """Notes how many values the largest tensor holds that is made on the way. Views of what was given are not new."""

    def __init__(self, given: list[torch.Tensor]):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in given}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.count = max(self.count, t.untyped_storage().nbytes() // t.element_size())
        return made


def drive_tiled(answer: Callable, given: dict) -> dict:
    with _Largest([v for v in given.values() if isinstance(v, torch.Tensor)]) as watch:
        product = answer(*given.values())
    return {"product": product, "largest": watch.count}


def _tiled(
    x, packed, scale, zero_point, rows,
    high_first=False, zero=True, step=True, whole_zero=False, apart=False, wrapping=False, short=False, all_at_once=False,
):  # fmt: skip
    """The product, written out, with every step that can go wrong as an option."""
    rows = len(packed) if all_at_once else rows
    parts = []
    for start in range(0, len(packed) - (rows - 1 if short else 0), rows):
        tile = slice(start, start + rows)
        low, high = packed[tile] & 15, packed[tile] >> 4
        pair = (high, low) if high_first else (low, high)
        codes = torch.cat(pair, 1) if apart else torch.stack(pair, -1).flatten(1)
        size = codes.shape[1] // scale.shape[1]
        zeros = zero_point[tile].repeat_interleave(size, 1) if zero else torch.zeros_like(codes)
        values = (codes - zeros).float() if wrapping else codes.float() - zeros.float()
        steps = scale[tile].float().repeat_interleave(size, 1) if step else 1
        values = codes.float() * steps - zeros.float() if whole_zero else values * steps
        parts.append(x.float() @ values.t())
    return torch.cat(parts, 1)


TILED_MISTAKES: dict[str, dict] = {
    "the nibbles of a byte are exchanged: the first code is in the low one, packed & 15": {"high_first": True},
    "zero_point is not subtracted": {"zero": False},
    "the scale is missing": {"step": False},
    "zero_point is a code: subtract it before the scale is applied": {"whole_zero": True},
    "all low nibbles come first, then all high ones. They belong in turns: byte j holds columns 2j and 2j + 1": {"apart": True},
    "codes and zero-points are uint8, in which 3 - 5 is 254: make them float before you subtract": {"wrapping": True},
}


def judge_tiled(given: dict, got: dict, want: dict) -> Verdict:
    product, wanted = got["product"], want["product"]
    rows, columns = len(given["packed"]), given["x"].shape[1]
    if isinstance(product, torch.Tensor) and product.ndim == 2 and product.shape[1] == rows // given["rows"] * given["rows"]:
        return wrong(f"{rows} rows in tiles of {given['rows']} leave a shorter one at the end: got {product.shape[1]} outputs")
    if isinstance(product, torch.Tensor) and product.shape == wanted.shape[::-1]:
        return wrong(f"product has shape {list(product.shape)}, wanted [batch, out]: the other way round")
    if fault := shape_fault({"product": product}, {"product": wanted}):
        return wrong(fault)
    # Two float32 sums of `columns` products of weights below 5 and inputs below 5, in whatever order, each rounding once.
    allowed = 2 * columns * 2**-24 * 25 * columns**0.5
    off = largest_difference(product, wanted)
    if off > allowed:
        for said, options in TILED_MISTAKES.items():
            if largest_difference(product, _tiled(*given.values(), **options)) <= allowed:
                return wrong(said)
        if _short_digits(off, given["x"], [given[name] for name in ("packed", "scale", "zero_point")]):
            return wrong(f"nearly right, off by {off:.2g} where float32 allows {allowed:.1g}: is something computed in 16 bits?")
        token, row = divmod(int((product - wanted).abs().argmax()), rows)
        return wrong(f"token {token}, output {row}: got {product[token, row]:.4f}, wanted {wanted[token, row]:.4f}")
    # A tile of whole numbers and one of the same size beside it. Half of the weight's codes are more than that.
    limit = 2 * given["rows"] * columns
    if got["largest"] > limit:
        whole = f"the whole weight has {rows * columns}, a tile {given['rows'] * columns}"
        return wrong(f"right, but on the way there is a tensor of {got['largest']} values: {whole}. Unpack a tile at a time")
    return right(off, allowed)


def _short_digits(off: float, x: torch.Tensor, weight: list[torch.Tensor]) -> bool:
    """Whether an output is off by no more than 16 bits may lose: bfloat16 has 8, and errors of a sum go either way."""
    return off < 2**-7 * max(twin.multiply(x.abs(), *weight).abs().max().item(), 1)


TILED = Exercise(
    id="11.2", name="tiled_product", title="Unpack without keeping", minutes=15, difficulty=3, points=3,
    returns=("product",), inputs=tiled_inputs, reference=twin.multiply, drive=drive_tiled, judge=judge_tiled,
    mutants=(
        *(Mutant(partial(_tiled, **options), said[:40]) for said, options in TILED_MISTAKES.items()),
        Mutant(partial(_tiled, all_at_once=True), "a tile at a time"),
        Mutant(partial(_tiled, short=True), "a shorter one at the end"),
        Mutant(lambda x, *w: _tiled(x.bfloat16(), *w), "computed in 16 bits"),
        Mutant(lambda *a: _tiled(*a).t(), "the other way round"),
        Mutant(lambda *a: 1.1 * _tiled(*a), "wanted"),
    ),
)  # fmt: skip


# 11.3 -----------------------------------------------------------------------------------------------------------------


def dialect_inputs(seed: int) -> dict:
    g = generator(seed)
    scale = (0.01 + 0.05 * torch.rand(7, 5, generator=g)).half()
    zero_point = torch.randint(0, 16, (7, 5), generator=g).float()
    zero_point[0, :2] = torch.tensor([8.0, 0.0])
    return {"scale": scale, "zero_point": zero_point}


def drive_dialect(answer: Callable, given: dict) -> dict:
    return {"grids": answer(*given.values(), torch.bfloat16), "grids in float32": answer(*given.values(), torch.float32)}


def _dialect(scale, zero_point, dtype, zero=lambda z, s: (8 - z) * s, order=1, turn=True, late=False):
    rounded = scale.to(dtype).float()
    zeros = zero(zero_point.float(), scale.float() if late else rounded)
    grids = torch.stack((rounded, zeros)[::order], dim=-1)
    return (grids.transpose(0, 1) if turn else grids).to(dtype).contiguous()


DIALECT_MISTAKES: dict[str, Callable] = {
    "zero has the wrong sign: (code - 8) * scale + zero must be (code - zero_point) * scale": partial(
        _dialect, zero=lambda z, s: (z - 8) * s
    ),
    "the kernel has already subtracted 8 from a code: zero is what is still missing": partial(_dialect, zero=lambda z, s: -z * s),
    "zero is added after the scale: it is a weight and not a code, so scale it": partial(_dialect, zero=lambda z, s: 8 - z),
    "these are the zero-points themselves: zero is a weight, added after the scale": partial(_dialect, zero=lambda z, s: z),
    "scale and zero are exchanged: the scale comes first": lambda s, z, d: _dialect(s, z, d).flip(-1),
    "zero is made from a scale that is not rounded yet. Then the two do not belong together": partial(_dialect, late=True),
}  # fmt: skip


def judge_dialect(given: dict, got: dict, want: dict) -> Verdict:
    found, wanted = got["grids"], want["grids"]
    rows, groups = given["scale"].shape
    if isinstance(found, torch.Tensor) and found.shape == (rows, groups, 2):
        return wrong(f"grids has shape {[rows, groups, 2]}, wanted groups first: {[groups, rows, 2]}")
    if fault := shape_fault(got, want):
        return wrong(fault)
    for name in want:
        if got[name].dtype != want[name].dtype:
            return wrong(f"grids is {got[name].dtype}, wanted {want[name].dtype}, the dtype asked for: the kernel reads it as x is")
    if all(torch.equal(got[name], want[name]) for name in want):
        return right()
    for said, mistake in DIALECT_MISTAKES.items():
        if torch.equal(found, mistake(*given.values(), torch.bfloat16)):
            return wrong(said)
    if torch.equal(found, wanted):
        return wrong("right in bfloat16 and not in float32: compute in float32 and round to the dtype asked for, no more")
    group, row, which = (int(i) for i in (found != wanted).nonzero()[0])
    name = ("scale", "zero")[which]
    return wrong(f"group {group} of row {row}: {name} is {found[group, row, which]:.5f}, wanted {wanted[group, row, which]:.5f}")


DIALECT = Exercise(
    id="11.3", name="scales_and_zeros", title="Another kernel's zero", minutes=8, difficulty=2, points=2,
    returns=("grids",), inputs=dialect_inputs, reference=cpu.scales_and_zeros, drive=drive_dialect, judge=judge_dialect,
    mutants=(
        *(Mutant(rule, said[:35]) for said, rule in DIALECT_MISTAKES.items()),
        Mutant(partial(_dialect, turn=False), "groups first"),
        Mutant(lambda s, z, d: _dialect(s, z, d).float(), "the dtype asked for"),
        Mutant(lambda s, z, d: _dialect(s, z, torch.bfloat16), "the dtype asked for"),
        Mutant(lambda s, z, d: _dialect(s, z, torch.bfloat16).to(d), "not in float32"),
        Mutant(lambda s, z, d: _dialect(s, z, d) * 2, "scale is"),
    ),
)  # fmt: skip


# 11.4 -----------------------------------------------------------------------------------------------------------------


def kernel_inputs(seed: int) -> dict:
    """Six rows or three for programs of four: the last program has rows that do not exist."""
    g = generator(seed)
    group_size, out, rows = ((16, 6, 4), (8, 3, 4))[seed % 2]
    x = torch.randn(2 * group_size, generator=g).half()
    return {"x": x} | _packed(out, 2 * group_size, group_size, g) | {"group_size": group_size, "rows": rows}


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
        step = tl.load(scale + row * groups + group, mask=exists, other=0.0).to(tl.float32)
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


def drive_kernel(answer: Callable, given: dict) -> dict:
    if not language.available():
        answer(*[None] * 9)  # the untouched stub says so; anything else fails, on whatever comes first
    # Whoever watches for calls of our own kernel is called for every call that the interpreter makes, which takes twice as long as
    # the kernel, and would see nothing: it runs a rewritten copy.
    watcher = sys.getprofile()
    sys.setprofile(None)
    try:
        return {"product": launch_kernel(answer, *given.values(), run=language.interpret)}
    finally:
        sys.setprofile(watcher)


KERNEL_MISTAKES: dict[str, Callable] = {
    "the nibbles of a byte are exchanged: the first code is in the low one, codes & 15": partial(_tiled, high_first=True),
    "zero_point is not subtracted": partial(_tiled, zero=False),
    "the scale is missing": partial(_tiled, step=False),
    "codes and zero-points are uint8, in which 3 - 5 is 254: make them float before you subtract": partial(_tiled, wrapping=True),
    "only the even columns count: the high nibbles are missing": lambda x, *w: _tiled(_every_other(x), *w),
    "only the last group counts: add every group's part to total": lambda x, *w: _tiled(_last_group(x, w[1].shape[1]), *w),
    "every group is scaled by the first group's scale: scale is [rows, groups]": lambda x, p, s, z, r: _tiled(
        x, p, s[:, :1].expand_as(s), z, r
    ),
    "every group has the first group's zero-point: zero_point is [rows, groups]": lambda x, p, s, z, r: _tiled(
        x, p, s, z[:, :1].expand_as(z), r
    ),
    "every group multiplies the first group's activations: x moves on by GROUP": lambda x, *w: _tiled(
        _first_again(x, w[1].shape[1]), *w
    ),
    "low nibbles meet the first half of a group of x, high ones the second. A byte holds neighbors, 2j and 2j + 1": (
        lambda x, *w: _tiled(_halves(x, w[1].shape[1]), *w)
    ),
}  # fmt: skip


def _every_other(x: torch.Tensor) -> torch.Tensor:
    return x * (torch.arange(x.shape[-1]) % 2 == 0)


def _last_group(x: torch.Tensor, groups: int) -> torch.Tensor:
    parts = x.unflatten(-1, (groups, -1)).clone()
    parts[..., :-1, :] = 0
    return parts.flatten(-2)


def _first_again(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x[..., : x.shape[-1] // groups].repeat(1, groups)


def _halves(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x.unflatten(-1, (groups, 2, -1)).transpose(-1, -2).flatten(-3)


def judge_kernel(given: dict, got: dict, want: dict) -> Verdict:
    x, weight = given["x"], [given[name] for name in ("packed", "scale", "zero_point")]
    found, wanted = got["product"], twin.multiply(x[None], *weight)[0]
    if found.isnan().any():
        missing = found.isnan().nonzero().flatten().tolist()
        return wrong(f"outputs {missing} are NaN: nothing was stored there, or NaN was")
    # As in 11.2; half the columns, so less.
    allowed = 2 * len(x) * 2**-24 * 25 * len(x) ** 0.5
    off = largest_difference(found, wanted)
    if off <= allowed:
        return right(off, allowed)
    for said, mistake in KERNEL_MISTAKES.items():
        if largest_difference(found, mistake(x[None], *weight, len(found))[0]) <= allowed:
            return wrong(said)
    if _short_digits(off, x[None], weight):
        return wrong(f"nearly right, off by {off:.2g} where float32 allows {allowed:.1g}: is something summed in 16 bits?")
    row = int((found - wanted).abs().argmax())
    return wrong(f"output {row}: got {found[row]:.4f}, wanted {wanted[row]:.4f}")


def _with(*changes: tuple[str, str]) -> Callable:
    """The kernel with a change in its text."""
    text = textwrap.dedent(inspect.getsource(w4_kernel))
    for before, after in changes:
        if before not in text:
            raise ValueError(f"the kernel holds no {before!r}")
        text = text.replace(before, after)
    names = dict(globals())
    exec(compile(text, "<mutant>", "exec", dont_inherit=True), names)
    return names["w4_kernel"]


KERNEL = Exercise(
    id="11.4", name="w4_kernel", title="The inside of a kernel", minutes=25, difficulty=4, points=4,
    returns=("product",), inputs=kernel_inputs, reference=w4_kernel, drive=drive_kernel, judge=judge_kernel,
    mutants=(
        Mutant(_with(("codes & 15", "codes >> 4 "), ("(codes >> 4).to", "(codes & 15).to")), "nibbles of a byte are exchanged"),
        Mutant(_with((" - zero[:, None]", "")), "zero_point is not subtracted"),
        Mutant(_with((" * step", "")), "the scale is missing"),
        Mutant(
            _with(
                ("mask=exists, other=0).to(tl.float32)", "mask=exists, other=0)"),
                ("(codes & 15).to(tl.float32) - zero[:, None]", "((codes & 15) - zero[:, None]).to(tl.float32)"),
                ("(codes >> 4).to(tl.float32) - zero[:, None]", "((codes >> 4) - zero[:, None]).to(tl.float32)"),
            ),
            "3 - 5 is 254",
        ),
        Mutant(_with((" + high * odd[None, :]", "")), "only the even columns"),
        Mutant(_with(("total += ", "total = ")), "only the last group"),
        Mutant(_with(("scale + row * groups + group", "scale + row * groups")), "first group's scale"),
        Mutant(_with(("zero_point + row * groups + group", "zero_point + row * groups")), "first group's zero-point"),
        Mutant(_with(("x + group * GROUP + 2 * byte", "x + 2 * byte")), "x moves on by GROUP"),
        Mutant(
            _with(("group * GROUP + 2 * byte + 1", "group * GROUP + GROUP // 2 + byte"), ("GROUP + 2 * byte)", "GROUP + byte)")),
            "A byte holds neighbors",
        ),
        Mutant(_with((", mask=exists[:, None], other=0", "")), "reads outside of the tensors"),
        Mutant(_with((", total, mask=exists", ", total")), "writes outside of the tensors"),
        Mutant(_with(("    tl.store(out + row, total, mask=exists)", "    pass")), "NaN"),
        Mutant(
            _with(("high * odd[None, :], 1) * step", "high * odd[None, :], 1).to(tl.float16).to(tl.float32) * step")),
            "summed in 16 bits",
        ),
        Mutant(_with(("row[:, None] * groups + group", "row[:, None] + rows * group")), "output"),
    ),
)  # fmt: skip


# 11.5 -----------------------------------------------------------------------------------------------------------------


def crossover_inputs(seed: int) -> dict:
    """Two kernels that meet a third of the way between two batches, so that rounding either way shows.

    Read and operations differ, as where rows are padded: so exchanging them shows.
    """
    r = random.Random(seed)
    operations, bandwidth = 2.0 * r.randrange(10**7, 10**9), r.uniform(2e10, 3e12)
    read, slower = operations * r.uniform(1.1, 1.25), r.uniform(0.3, 0.8)
    meet = r.randrange(20, 200) + 0.3
    narrow_rate = meet * operations / (read / bandwidth)
    return {
        "read": read, "operations": operations, "bandwidth": bandwidth, "rate": narrow_rate / slower, "narrow_rate": narrow_rate,
    }  # fmt: skip


CROSSOVER_MISTAKES: dict[str, Callable] = {
    "this is where the 16-bit kernel stops waiting for memory. The other computes more slowly, and meets it before": (
        lambda w, f, b, r, n: w / b * r / f
    ),
    "this is where the 4-bit kernel stops waiting for memory. It is still ahead then: the other has four times as much to read": (
        lambda w, f, b, r, n: w / 4 / b * n / f
    ),
    "the operations are those of one row already, additions and all": lambda w, f, b, r, n: w / b * n / (2 * f),
    "this takes the ratio of the two rates: they tell how far it falls behind, not where": lambda w, f, b, r, n: r / n,
    "read and bandwidth are both in bytes: nothing needs a factor 8": lambda w, f, b, r, n: 8 * w / b * n / f,
    "read and operations are exchanged: read / bandwidth is a time, and so is operations / rate": lambda w, f, b, r, n: (
        f / b * n / w
    ),
}


def judge_crossover(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    batch, wanted = got["batch"], want["batch"]
    if batch == wanted:
        return right()
    if not float(batch).is_integer():
        return wrong(f"a batch is a whole number, got {batch:.6g}")
    if batch == wanted - 1:
        return wrong("one too few: at this batch the 4-bit kernel is still ahead by a little")
    if batch == wanted + 1:
        return wrong("one too many: it takes at least as long already at the batch before")
    for said, mistake in CROSSOVER_MISTAKES.items():
        if batch in (math.floor(mistake(*given.values())), math.ceil(mistake(*given.values()))):
            return wrong(said)
    return wrong(f"got {batch:g}, wanted {wanted}")


CROSSOVER = Exercise(
    id="11.5", name="crossover", title="Where four bits stop paying", minutes=12, difficulty=3, points=3,
    returns=("batch",), inputs=crossover_inputs, reference=paper.crossover, judge=judge_crossover,
    mutants=(
        *(Mutant(lambda *a, rule=rule: math.ceil(rule(*a)), said[:45]) for said, rule in CROSSOVER_MISTAKES.items()),
        Mutant(lambda w, f, b, r, n: int(w / b * n / f), "one too few"),
        Mutant(lambda w, f, b, r, n: int(w / b * n / f) + 2, "one too many"),
        Mutant(lambda w, f, b, r, n: w / b * n / f, "whole number"),
        Mutant(lambda w, f, b, r, n: 10**6, "wanted"),
    ),
)  # fmt: skip

EXERCISES = (BYTES_MOVED, TILED, DIALECT, KERNEL, CROSSOVER)
