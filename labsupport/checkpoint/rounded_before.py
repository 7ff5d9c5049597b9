"""Whether a model was quantized to 4 bits before and then dequantized, as one that was read from a GGUF file."""

from __future__ import annotations

from labsupport.checkpoint.skeleton import Skeleton
from labsupport.model import models
from labsupport.quant import lattice

LINEARS, ROWS = 8, 16  # that are looked at


def remark(skeleton: Skeleton) -> str:
    """A sentence about linears whose weights lie on a 4-bit lattice, "" where none was found. Looks at a block in the middle."""
    start = skeleton.name(skeleton.blocks[len(skeleton.blocks) // 2]) + "."
    names = [name for name in models.linears(skeleton.model) if name.startswith(start)]
    names = names[:: -(-len(names) // LINEARS)] if names else names
    looked = [skeleton.some_rows(f"{name}.weight", ROWS) for name in names]
    found = [on for rows in looked if rows.isfinite().all() and (on := lattice.find(rows)) is not None]
    if not found:
        return ""
    count = f"all {len(names)}" if len(found) == len(names) else f"{len(found)} of the {len(names)}"
    sizes = " or ".join(str(size) for size in sorted({on.group_size for on in found}))
    points = f"each group of {sizes} weights holds at most {lattice.LEVELS} values, evenly spaced"
    if all(on.has_zero for on in found):
        what_now = "only the same bits, groups and zero-points give them back; any others add an error of their own"
    else:
        what_now = (
            "0 is not among their points, so that no 4-bit grid with an integer zero-point holds them: rounding again adds an error"
        )
    return f"{count} linears that were looked at lie on a 4-bit lattice, as in a dequantized file: {points}; {what_now}"
