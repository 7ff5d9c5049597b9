"""Claims that are settled from the rows of `labs sweep shootout`: every method on one axis of stored bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from labsupport.evidence import shootout
from labsupport.evidence.audit import Finding, Given, all_or_some, audits, of_row, texts
from labsupport.evidence.audit.stored import BARE, PLANTED
from labsupport.evidence.claims import CANNOT, Holds
from labsupport.evidence.sweep import Measurements
from labsupport.model.evaluate import Interval

PLAIN = dict.fromkeys(
    (
        "planted",
        "symmetric",
        "act_order",
        "token_weights",
        "base",
        "embedding",
        "block_size",
        "absmax",
        "mse",
        "text",
        "stale_grids",
        "damping",
    )
)  # fmt: skip  what the plainest row of a method does not have
NF4 = {"method": "nf4", "block_size": 64, "absmax": "double"}
WITHIN = 0.05
TESTS = {"identifiers": "names", "copies": "copies", "parses": "code"}


def _row(rows: Measurements, **setting: Any) -> dict[str, Any]:
    return rows.find(**PLAIN | setting)


@audits(14)
def ranking_at_four_bits(given: Given) -> Finding:
    """AWQ = GPTQ g32: the interval holds 0. GPTQ g32 > g128 > NF4: each step raises perplexity. Holds of a form with all three."""
    rows, gptq, awq = (given.rows(file) for file in ("shootout.json", "gptq.json", "awq.json"))
    figures: dict[str, Interval] = {}
    whole = []
    for form, planted in PLANTED.items():
        own = {"planted": planted, "bits": 4}
        fine, coarse = (_row(gptq, **own, method="gptq", group_size=size, samples=64) for size in (32, 128))
        first = awq.paired(_row(awq, **own, **BARE, method="awq", group_size=128), fine, of=gptq)
        others = {
            "from GPTQ g32 to g128": gptq.paired(fine, coarse),
            "from GPTQ g128 to NF4": rows.paired(
                _row(rows, **own, method="gptq", group_size=128), _row(rows, **NF4, planted=planted)
            ),
        }
        figures |= {f"{step}, {form}": change for step, change in {"from AWQ g128 to GPTQ g32": first, **others}.items()}
        whole.append(first.low <= 0 <= first.high and all(change.low > 0 for change in others.values()))
    return Finding(all_or_some(whole), texts(figures))


def _four_bits(rows: Measurements, planted: int | None) -> list[Mapping[str, Any]]:
    """Every configuration that is sold as 4 bits."""
    of_form = (row for row in rows.rows if row["planted"] == planted and "embedding" not in row)
    return [row for row in of_form if row.get("bits") == 4 or row["method"] == "nf4"]


def _inside(forms: Mapping[str, list[Mapping[str, Any]]]) -> Finding:
    figures: dict[str, str] = {}
    flags: list[bool] = []
    for form, rows in forms.items():
        inside = [row["high"] < WITHIN for row in rows]
        least, most = (of_row(end(rows, key=lambda row: row["change"])) for end in (min, max))
        figures |= {
            f"{form}, intervals that end below 5 %": f"{sum(inside)} of {len(inside)}",
            f"{form}, least": str(least),
            f"{form}, most": str(most),
        }
        flags += inside
    return Finding(all_or_some(flags), figures)


@audits(15)
def all_within_five_percent(given: Given) -> Finding:
    rows = given.rows("shootout.json")
    return _inside({form: _four_bits(rows, planted) for form, planted in PLANTED.items()})


@audits(15, "smollm2")
def all_within_five_percent_of_smollm2(given: Given) -> Finding:
    return _inside({"as shipped": _four_bits(given.rows("smollm2/shootout.json"), None)})


@audits(26)
def large_in_few_bits(given: Given) -> Finding:
    """At no more stored bytes, the whole models counted: the best row of the large one, from the small one in 16 bits."""
    rows, small_rows = given.rows("shootout.json"), given.rows("course-model-small/shootout.json")
    small = _row(small_rows, method="float")
    fits = [row for row in rows.rows if row["planted"] is None and row["nbytes"] <= small["nbytes"]]
    best = min(fits, key=lambda row: row["perplexity"])
    change = small_rows.paired(small, best, of=rows)
    published = given.says("AWQ, arXiv:2306.00978")
    large, float_ = published["Llama-2-13B, AWQ, 4 bits"], published["Llama-2-7B, 16 bits"]
    figures = {
        "from the small course model in float to the large one, both in float, code": str(
            small_rows.paired(small, _row(rows, method="float"), of=rows)
        ),
        "rows of the large one with its embedding in 16 bits that are as small": str(sum("embedding" not in row for row in fits)),
        f"to its best that is as small, {best['method']} {best.get('bits')} bits, embedding {best.get('embedding')}": str(change),
        "published, from Llama-2-7B in 16 bits to 13B in 4": f"{100 * (large / float_ - 1):+.2f} %",
    }
    verdicts = {change.high < 0 or (False if change.low > 0 else None), large < float_}
    return Finding(verdicts.pop() if len(verdicts) == 1 else None, figures)


@audits(32)
def code_needs_eight_bits(given: Given) -> Finding:
    """Plain rounding to 4 bits and the best row of 4 bits, in three tests. For it speaks a loss that is certain (sign test, 5 %),
    against it that a loss of a tenth of the float model's score can be excluded."""
    rows = given.rows("shootout.json")
    whole = _row(rows, method="float")
    best = min(_four_bits(rows, None), key=lambda row: row["perplexity"])
    tried = {"rounding, g128": _row(rows, method="rtn", bits=4, group_size=128), "best of 4 bits": best}
    figures: dict[str, str] = {}
    spoken: set[bool | None] = set()
    for name, row in tried.items():
        for task, called in TESTS.items():
            items = sum(rows.about["items"][task])
            before, after = (torch.tensor(shootout.unpack(each["done"][task], items)) for each in (whole, row))
            lost, gained, score = int((before & ~after).sum()), int((after & ~before).sum()), int(before.sum())
            certain = lost > gained and _sign_test(lost, gained) < 0.05
            excluded = lost - gained + 1.96 * math.sqrt(lost + gained) < 0.1 * score
            spoken.add(True if certain else False if excluded else None)
            figures[f"{name}, {called}"] = f"of {score} right {lost} lost, {gained} gained"
    return Finding(_of_votes(spoken), figures)


def _sign_test(lost: int, gained: int) -> float:
    count = lost + gained
    return min(1.0, 2 * sum(math.comb(count, i) for i in range(min(lost, gained) + 1)) / 2**count)


def _of_votes(spoken: set[bool | None]) -> Holds:
    """Votes for and against: it depends. None of either: it cannot be told."""
    if {True, False} <= spoken:
        return None
    if True in spoken:
        return True
    return False if spoken == {False} else CANNOT
