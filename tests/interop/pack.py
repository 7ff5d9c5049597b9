"""Packed layers: which codes are packed, what the peers make of them, and the golden file golden/packing.safetensors."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from interop import environment, golden
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from labsupport.quant import grid, packing
from labsupport.quant.gptq import GPTQTensor

PATH = golden.FOLDER / "packing.safetensors"
ROWS, COLUMNS, GROUP = 32, 96, 16  # 3 bits: three runs of 32 codes along in_features, one along out_features
PEERS = {"autogptq": "AutoGPTQ", "autoawq": "AutoAWQ"}


@dataclass(frozen=True)
class Case:
    """One way to pack the layer. order: groups scattered over the row, as act_order leaves them. zero: a zero-point of 0."""

    peer: str
    bits: int
    symmetric: bool = False
    order: bool = False
    zero: bool = False

    @property
    def name(self) -> str:
        """For example autogptq-4b-asym-order."""
        flags = ("sym" if self.symmetric else "asym", "order" if self.order else "", "zero" if self.zero else "")
        return "-".join([self.peer, f"{self.bits}b", *filter(None, flags)])


CASES = (
    *(Case("autogptq", bits, symmetric, order) for bits in (4, 3, 8, 2) for symmetric in (False, True) for order in (False, True)),
    *(Case("autogptq", bits, zero=True) for bits in (4, 3)),
    *(Case("autoawq", 4, symmetric) for symmetric in (False, True)),
)
# Kept in the golden file: every bits, grid and order; of 4 bits in every combination.
KEPT = tuple(case for case in CASES if case.bits == 4 or (case.symmetric == case.order and not case.zero))


def make() -> dict[str, torch.Tensor]:
    """The layer that is packed, whatever the bits: codes and zero_point are the highest bits of these."""
    generator = torch.Generator().manual_seed(COLUMNS)

    def random(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)

    return {
        "codes": random(ROWS, COLUMNS),
        "zero_point": random(ROWS, COLUMNS // GROUP),
        "scale": (1 + random(ROWS, COLUMNS // GROUP).half()) / 2**14,
        "g_idx": (torch.randperm(COLUMNS, generator=generator) // GROUP).to(torch.int32),
    }


@cache
def layer() -> dict[str, torch.Tensor]:
    """The layer of the golden file, made where there is none yet."""
    return below("layer") if PATH.exists() else make()


def tensor(case: Case) -> GPTQTensor:
    """The layer in a case's bits."""
    given, shift = layer(), 8 - case.bits
    zeros = given["zero_point"] >> shift
    if not case.zero:
        zeros = zeros.clamp(min=1)  # AutoGPTQ spoils the neighbors of a 0
    return GPTQTensor(
        packed_codes=grid.pack_bits(given["codes"] >> shift, case.bits),
        scale=given["scale"],
        packed_zero_points=None if case.symmetric else grid.pack_bits(zeros, case.bits),
        bits=case.bits,
        group_size=GROUP,
        shape=(ROWS, COLUMNS),
        g_idx=given["g_idx"] if case.order else None,
        damping=0.0,
    )


def ours(case: Case) -> dict[str, torch.Tensor]:
    """What labsupport makes of it."""
    return packing.write_awq(tensor(case)) if case.peer == "autoawq" else packing.write_gptq(tensor(case))


def live(threads: int = 1) -> dict[Case, dict[str, torch.Tensor]]:
    """What the peers make of every case, run now."""
    with tempfile.TemporaryDirectory() as name:
        for case in CASES:
            q = tensor(case)
            given = {"codes": q.codes, "scale": q.scale, "zero_point": q.zero_point.to(torch.uint8), "g_idx": packing.groups_of(q)}
            about = {"peer": case.peer, "bits": str(case.bits), "group_size": str(GROUP)}
            save_file({key: value.contiguous() for key, value in given.items()}, Path(name) / f"{case.name}.in.safetensors", about)
        environment.LEGACY.run("run_pack", name, threads=threads)
        return {case: load_file(Path(name) / f"{case.name}.out.safetensors") for case in CASES}


def write(found: dict[Case, dict[str, torch.Tensor]], about: dict[str, object]) -> None:
    tensors = {f"layer/{key}": value for key, value in layer().items()}
    tensors |= {f"{case.name}/{key}": found[case][key] for case in KEPT for key in found[case] if key != "weight"}
    golden.write(PATH, tensors, about)


def below(name: str) -> dict[str, torch.Tensor]:
    """What the golden file holds under a name."""
    with safe_open(PATH, "pt") as file:
        return {key.rpartition("/")[2]: file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}/")}  # noqa: SIM118


@cache
def read() -> dict[Case, dict[str, torch.Tensor]]:
    """What the peers made of the kept cases, by the golden file."""
    return {case: below(case.name) for case in KEPT}


def differences(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
    """Empty where both hold the same bytes, else how much of what differs; `weight` aside."""
    said = []
    for key in sorted((one.keys() | other.keys()) - {"weight"}):
        a, b = one.get(key), other.get(key)
        if a is None or b is None:
            said.append(f"{key} only on one side")
        elif a.shape != b.shape or a.dtype != b.dtype:
            said.append(f"{key} {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}")
        elif not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            said.append(f"{int((a != b).sum())} of {a.numel()} values of {key}")
    return ", ".join(said)


def lines(threads: int) -> Iterator[tuple[str, bool]]:
    """Fresh results compared with the golden file and with labsupport, a line for each case.

    A zero-point of 0 is the one thing that AutoGPTQ packs otherwise: qzeros differ, and nothing else may. What the peers read back
    must be what the tensor stands for, to the rounding of one product in float32.
    """
    kept = read()
    for case, fresh in live(threads).items():
        file, mine = differences(kept.get(case, fresh), fresh), differences(ours(case), fresh)
        good = not file and (mine.endswith("values of qzeros") and "," not in mine if case.zero else not mine)
        said = (
            f"{PEERS[case.peer]} packs {case.name.partition('-')[2]}: golden file {file or 'equal'}, labsupport {mine or 'equal'}"
        )
        if not case.zero:
            same = torch.allclose(fresh["weight"], tensor(case).dequantize(), rtol=2**-22, atol=0)
            said, good = said + ("" if same else ", and it reads another weight back"), good and same
        yield said, good
