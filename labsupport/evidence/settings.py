"""Which settings each sweep measures: a row of data/measurements/NAME.json for each.

The command line lists the sweeps, so nothing heavy is imported here before a sweep begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

GROUP_SIZES = (16, 32, 64, 128, "row", "tensor")


def _fitting(model: nn.Module, sizes: Iterable[int | str]) -> list[int | str]:
    """Those of the group sizes that divide the inputs of every linear; "row" and "tensor" fit any."""
    from labsupport.model import opened

    widths = {layer.in_features for layer in opened.linears(model).values()}
    return [size for size in sizes if isinstance(size, str) or not any(width % size for width in widths)]


def _usual(model: nn.Module) -> int:
    """The group size that is taken where none is named: 128 for the course model."""
    from labsupport.model import opened
    from labsupport.quant import grid

    return grid.largest_group_size(layer.in_features for layer in opened.linears(model).values())


def _rtn(model: nn.Module) -> Iterator[dict[str, Any]]:
    for group_size in _fitting(model, GROUP_SIZES):
        for bits in range(8, 1, -1):
            yield {"bits": bits, "group_size": group_size, "symmetric": False}
        for bits in (4, 3, 2):
            yield {"bits": bits, "group_size": group_size, "symmetric": True}


# What a budget can be spent on, from coarse to fine.
CHOICES = ((2, "row"), (2, 32), (3, "row"), (3, 128), (3, 64), (3, 32), (3, 16), (4, "row"), (4, 128))


def _layers(model: nn.Module) -> Iterator[dict[str, Any]]:
    """One linear at a time, the others as they are."""
    from labsupport.model import opened

    linears = opened.linears(model)
    for bits, group_size in CHOICES:
        for layer, module in linears.items():
            if group_size == "row" or module.in_features % group_size == 0:
                yield {"layer": layer, "bits": bits, "group_size": group_size, "symmetric": False}


# The model as trained, and with outliers planted: factors on a few channels of what every norm gives.
PLANTED = (None, 8, 40)


def _int8(model: nn.Module) -> Iterator[dict[str, Any]]:
    for planted in PLANTED:
        for granularity in ("row", "tensor"):
            yield {"planted": planted, "method": "int8-weights", "granularity": granularity}
            yield {"planted": planted, "method": "int8", "granularity": granularity, "threshold": 0.0}
        for threshold in (3.0, 6.0, 12.0, 24.0, 48.0):
            yield {"planted": planted, "method": "int8", "granularity": "row", "threshold": threshold}
        yield {"planted": planted, "method": "int8", "granularity": "row", "threshold": 6.0, "paper": True}
        yield {"planted": planted, "method": "int8", "granularity": "tensor", "threshold": 6.0}


def _nf4(model: nn.Module) -> Iterator[dict[str, Any]]:
    for planted in PLANTED[:2]:
        for codebook in ("nf4", "fp4", "int4"):
            for block_size in (32, 64, 128, 256):
                for absmax in ("float32", "float16", "double"):
                    yield {"planted": planted, "method": "nf4", "codebook": codebook, "block_size": block_size, "absmax": absmax}
        for symmetric in (False, True):
            for group_size in _fitting(model, (64, 128)):
                yield {"planted": planted, "method": "rtn", "bits": 4, "group_size": group_size, "symmetric": symmetric}


def _gptq(model: nn.Module) -> Iterator[dict[str, Any]]:
    usual = _usual(model)
    for planted in PLANTED[:2]:
        for bits in (4, 3, 2):
            setting = {"planted": planted, "bits": bits, "group_size": usual}
            yield setting | {"method": "rtn"}
            yield setting | {"method": "gptq", "samples": 64}
            yield setting | {"method": "gptq", "samples": 64, "act_order": True, "static_groups": True}
        for bits in (4, 3):
            yield {"planted": planted, "bits": bits, "group_size": 32, "method": "gptq", "samples": 64}
    for bits in (4, 3):  # the defaults of `labs quantize`, and with more damping
        heard = {"act_order": True, "static_groups": True, "token_weights": "attention"}
        setting = {"planted": None, "bits": bits, "group_size": usual, "method": "gptq", "samples": 64} | heard
        yield setting
        yield setting | {"damping": 0.1}
    trained = {"planted": None, "bits": 3, "group_size": usual, "method": "gptq"}
    for samples in (2, 8, 32):
        yield trained | {"samples": samples}
    yield trained | {"samples": 64, "text": "prose"}
    yield trained | {"samples": 64, "mse": True}
    yield trained | {"samples": 64, "group_size": 32, "stale_grids": True}


def _awq(model: nn.Module) -> Iterator[dict[str, Any]]:
    for planted in PLANTED[:2]:
        for bits in (4, 3):
            setting = {"planted": planted, "bits": bits, "group_size": _usual(model)}
            yield setting | {"method": "rtn"}
            yield setting | {"method": "gptq", "samples": 64}
            for change in ({}, {"clip": False}, {"base": "gptq"}, {"rule": "autoawq"}):
                yield setting | {"method": "awq", "samples": 64} | change
        yield {"planted": planted, "bits": 4, "group_size": 32, "method": "awq", "samples": 64}


def _kv(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Weights and cache together, keys alone, values alone, both; groups of 32.

    Where no residual is given, tokens wait for a block of 32, by token as by channel, so that the same tokens are in float.
    """
    float_ = {"planted": None, "weights": None, "keys": 16, "values": 16}
    kivi = {"key_axis": "channel", "value_axis": "token"}
    fp8 = {"keys": "fp8", "values": "fp8"}
    caches = [fp8, *({"keys": bits, "values": bits, "residual": 32} | kivi for bits in (4, 2))]
    for weights in (None, "rtn4", "awq4", "rtn3"):
        for setting in ({}, *caches):
            yield float_ | {"weights": weights} | setting
    for bits in (4, 3, 2):
        for axis in ("channel", "token"):
            for before_rope in (None, True):
                yield float_ | {"keys": bits, "key_axis": axis, "before_rope": before_rope}
            yield float_ | {"planted": "keys", "keys": bits, "key_axis": axis, "before_rope": None}
            yield float_ | {"values": bits, "value_axis": axis}
        yield float_ | {"planted": "keys", "keys": bits, "key_axis": "channel", "before_rope": True}
    for setting in caches:
        yield float_ | {"planted": "keys"} | setting
    for planted in (None, "keys"):
        yield float_ | {"planted": planted} | caches[-1] | {"key_axis": "token"}
    yield float_ | caches[1] | {"keys": 8, "values": 8}
    for residual in (0, 128):
        yield float_ | caches[-1] | {"residual": residual}
    for setting in ({}, *caches):
        yield float_ | setting | {"bins": 4}


def _sink(model: nn.Module) -> Iterator[dict[str, Any]]:
    """A row for each block of the model in floating point: see `sink.rows`."""
    from labsupport.model import models

    for block in range(len(models.blocks(model))):
        yield {"block": block}


def _positions(model: nn.Module) -> Iterator[dict[str, Any]]:
    """A row for each block, whose values alone are quantized: see `positions.rows`."""
    for setting in _sink(model):
        yield setting | {"bits": 4, "group_size": _usual(model)}


# A model that is not the course model is larger, so fewer rows of it are measured: none with planted outliers, on SAMPLES windows
# of calibration text, and groups of the size that its linears allow.
SAMPLES = 16
AUTOGPTQ = {"symmetric": True, "act_order": True, "autogptq": True}  # what AutoGPTQ 0.7.1 does where it is told nothing


def _rtn_short(model: nn.Module) -> Iterator[dict[str, Any]]:
    usual = _usual(model)
    for bits, group_size in ((8, "row"), (4, 32), (4, usual), (4, "row"), (3, 32), (3, usual)):
        yield {"bits": bits, "group_size": group_size, "symmetric": False}
    yield {"bits": 4, "group_size": usual, "symmetric": True}


def _gptq_short(model: nn.Module) -> Iterator[dict[str, Any]]:
    ordered = {"act_order": True, "static_groups": True}
    heard = ordered | {"token_weights": "attention"}
    changes: tuple[dict[str, Any], ...] = (
        {}, {"token_weights": "attention"}, ordered, ordered | {"token_weights": "not_first"}, heard, heard | {"damping": 0.1},
        heard | {"samples": 4 * SAMPLES}, AUTOGPTQ,
    )  # fmt: skip
    for bits in (4, 3):
        setting = {"bits": bits, "group_size": _usual(model)}
        yield setting | {"method": "rtn"}
        yield setting | {"method": "rtn", "symmetric": True}
        for change in changes:
            yield setting | {"method": "gptq", "samples": SAMPLES} | change


def _awq_short(model: nn.Module) -> Iterator[dict[str, Any]]:
    for bits in (4, 3):
        setting = {"bits": bits, "group_size": _usual(model)}
        yield setting | {"method": "rtn"}
        for change in ({}, {"clip": False}, {"token_weights": "not_first"}, {"base": "gptq"}):
            yield setting | {"method": "awq", "samples": SAMPLES} | change


def _nf4_short(model: nn.Module) -> Iterator[dict[str, Any]]:
    for codebook in ("nf4", "fp4", "int4"):
        yield {"method": "nf4", "codebook": codebook, "block_size": 64, "absmax": "float32"}
    yield {"method": "nf4", "codebook": "nf4", "block_size": 64, "absmax": "double"}


def _kv_short(model: nn.Module) -> Iterator[dict[str, Any]]:
    float_ = {"planted": None, "weights": None, "keys": 16, "values": 16}
    kivi = {"key_axis": "channel", "value_axis": "token", "residual": 32}
    for setting in ({"keys": "fp8", "values": "fp8"}, *({"keys": bits, "values": bits} | kivi for bits in (4, 2))):
        yield float_ | setting
    for bits in (4, 3):
        for axis in ("channel", "token"):
            for before_rope in (None, True):
                yield float_ | {"keys": bits, "key_axis": axis, "before_rope": before_rope}
            yield float_ | {"values": bits, "value_axis": axis}


def _shootout_short(model: nn.Module) -> Iterator[dict[str, Any]]:
    from labsupport.evidence import shootout

    return shootout.settings_short(model)


SHORT_SWEEPS: dict[str, Callable[[nn.Module], Iterator[dict[str, Any]]]] = {
    "rtn": _rtn_short, "nf4": _nf4_short, "gptq": _gptq_short, "awq": _awq_short, "kv": _kv_short,
    "sink": _sink, "positions": _positions, "shootout": _shootout_short,
}  # fmt: skip


def _lora(model: nn.Module) -> Iterator[dict[str, Any]]:
    from labsupport.evidence import finetuning

    return finetuning.settings(model)


def _calibration(model: nn.Module) -> Iterator[dict[str, Any]]:
    from labsupport.evidence import calibrating

    return calibrating.settings(model)


def _qat(model: nn.Module) -> Iterator[dict[str, Any]]:
    from labsupport.evidence import retraining

    return retraining.settings(model)


def _shootout(model: nn.Module) -> Iterator[dict[str, Any]]:
    from labsupport.evidence import shootout

    return shootout.settings(model)


SWEEPS: dict[str, Callable[[nn.Module], Iterator[dict[str, Any]]]] = {
    "rtn": _rtn, "layers": _layers, "int8": _int8, "nf4": _nf4, "gptq": _gptq, "awq": _awq, "kv": _kv,
    "sink": _sink, "positions": _positions, "lora": _lora, "calibration": _calibration, "qat": _qat, "shootout": _shootout,
}  # fmt: skip
# By the rows of these sweeps something is chosen, and the choice is judged on held-out text: so they are measured on other text.
SPLITS = {"layers": "train"}
# Sweeps of another text than code, where none is named; and what they look at, where no number of windows is named.
TEXTS = {"lora": "numpy", "calibration": "numpy"}
WINDOWS = {"lora": 32, "calibration": 32, "qat": 96, "shootout": 96}
