"""One check of arguments for all methods: whatever is passed, a method computes, or says by its name what is wrong with it."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from labsupport import quant
from labsupport.quant import awq, checks, gptq, grid, int8, kv, nf4, obq, packing, rtn

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(32, 32, generator=GENERATOR)
X = torch.randn(64, 32, generator=GENERATOR)
GRAM = X.t() @ X
CODES = torch.randint(0, 16, (32, 32), generator=GENERATOR).to(torch.uint8)
STATES = torch.randn(1, 2, 16, 32, generator=GENERATOR)


def kv_quantize(states, bits=4, axis="token", group_size=8, residual=0, block=None, scale=1.0):
    return kv.quantize(states, kv.Part(bits, axis, group_size, residual, block, scale)).dequantize()


# What is called, with arguments that it takes.
CALLS = {
    "rtn": (rtn.quantize, {"weight": WEIGHT, "bits": 4, "group_size": 8, "symmetric": False, "scale_dtype": torch.float16}),
    "nf4": (
        nf4.quantize,
        {"weight": WEIGHT, "codebook": "nf4", "block_size": 32, "double_quant": False, "absmax_dtype": torch.float32},
    ),
    "int8": (int8.quantize, {"matrix": WEIGHT, "granularity": "row"}),
    "int8.linear": (
        int8.linear,
        {"activations": X, "weight": int8.quantize(WEIGHT), "bias": torch.zeros(32), "threshold": 6.0, "outlier_weight": WEIGHT},
    ),
    "gptq": (
        gptq.quantize,
        {"weight": WEIGHT, "hessian": GRAM, "bits": 4, "group_size": 8, "symmetric": False, "damping": 0.01, "block_size": 16},
    ),
    "obq": (obq.quantize, {"weight": WEIGHT[:2], "hessian": GRAM, "bits": 4, "group_size": 8, "symmetric": False, "damping": 0.01}),
    "awq": (
        awq.search,
        {
            "weights": [WEIGHT],
            "gram": GRAM,
            "mean_abs": X.abs().mean(0),
            "bits": 4,
            "group_size": 8,
            "n_grid": 2,
            "rule": "autoawq",
        },
    ),
    "awq.clip": (
        awq.search_clip,
        {"weight": WEIGHT, "gram": GRAM, "bits": 4, "group_size": 8, "n_grid": 4, "max_shrink": 0.5},
    ),
    "autoawq": (awq.quantize_as_autoawq, {"weight": WEIGHT, "bits": 4, "group_size": 8, "dtype": torch.float16}),
    "saliency": (awq.saliency, {"inputs": X}),
    "pack_gptq": (packing.pack_gptq, {"codes": CODES, "bits": 4}),
    "pack_awq": (packing.pack_awq, {"codes": CODES}),
    "zero-points": (packing.pack_gptq_zeros, {"zero_point": CODES, "bits": 4, "version": 1}),
    "pack_bits": (grid.pack_bits, {"codes": CODES, "bits": 4}),
    "unpack_bits": (grid.unpack_bits, {"packed": CODES.view(-1), "bits": 4, "count": 8}),
    "kv": (kv_quantize, {"states": STATES, "bits": 4, "axis": "token", "group_size": 8, "residual": 0, "block": 2, "scale": 1.0}),
}
# Where the message has another name than the argument.
NAMES = {
    ("int8", "matrix"): "weight", ("awq", "weights"): "weights", ("autoawq", "dtype"): "dtype", ("kv", "states"): "states",
}  # fmt: skip
NAN, INF = float("nan"), float("inf")
OF_ANY_KIND = {
    "None": None, "text": "4", "list": [4], "complex": 1j, "tensor on meta": WEIGHT.to("meta"), "sparse": WEIGHT.to_sparse(),
    "csr": WEIGHT.to_sparse_csr(), "float8": WEIGHT.to(torch.float8_e4m3fn), "complex tensor": WEIGHT.to(torch.complex64),
    "bools": WEIGHT > 0, "no axis": torch.tensor(4.0), "three axes": WEIGHT[None], "nothing": WEIGHT[:0], "NumPy": WEIGHT.numpy(),
    "NaN": torch.full_like(WEIGHT, NAN), "infinity": torch.full_like(WEIGHT, INF), "zero": 0, "negative": -3, "huge": 10**30,
    "half": 2.5, "not a number": NAN, "endless": INF, "yes": True,
}  # fmt: skip
ARGUMENTS = [(call, argument) for call, (_, arguments) in CALLS.items() for argument in arguments]
ARGUMENTS.remove(("int8.linear", "weight"))  # what int8.quantize made
WITH_NUMBERS = [call for call, (_, arguments) in CALLS.items() if {"bits", "block_size"} & arguments.keys()]


def made(call, **changes):
    function, arguments = CALLS[call]
    return function(**arguments | changes)


@pytest.mark.parametrize(("call", "argument"), ARGUMENTS)
def test_whatever_is_passed_is_taken_or_named(call, argument):
    """An error is a ValueError or a TypeError, and its message starts with the argument's name."""
    wrong = []
    for kind, value in OF_ANY_KIND.items():
        try:
            made(call, **{argument: value})
        except (ValueError, TypeError) as error:
            name = NAMES.get((call, argument), argument)
            if not re.match(rf"{name}\b", str(error)):
                wrong.append(f"{kind}: {error}")
        except Exception as error:
            wrong.append(f"{kind}: {type(error).__name__}: {error}")
    assert not wrong


@pytest.mark.parametrize("call", WITH_NUMBERS)
def test_numbers_of_numpy_are_numbers(call):
    _, arguments = CALLS[call]
    numbers = {name: value for name, value in arguments.items() if type(value) in (int, float)}
    as_numpy = {name: (np.int64 if type(value) is int else np.float64)(value) for name, value in numbers.items()}
    one, other = made(call), made(call, **as_numpy)
    assert repr(one) == repr(other)  # no NumPy number is kept in it either


@example(2.5, 4, (0, 0))
@example(float("nan"), 4, (31, 31))
@example(16, 4, (7, 3))
@settings(max_examples=60)
@given(st.integers(-300, 300) | st.floats(width=32), st.integers(2, 8), st.tuples(st.integers(0, 31), st.integers(0, 31)))
def test_a_code_that_is_none_is_refused_wherever_it_stands(value, bits, place):
    codes = torch.zeros(32, 32, dtype=torch.float64)
    codes[place] = value
    is_code = value in range(2**bits)
    for function in (packing.pack_gptq, grid.pack_bits, packing.pack_gptq_zeros):
        pack = partial(function, codes, bits)
        if is_code:
            pack()
        else:
            with pytest.raises(ValueError, match=r"^(codes|zero_point) (holds|reach)"):
                pack()


def spoiled(change):
    gram = GRAM.clone()
    change(gram)
    return gram


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (spoiled(lambda g: g[3].fill_(NAN)), "holds NaN"),
        (spoiled(lambda g: g[3, 5].add_(9)), "is not symmetric"),
        (spoiled(lambda g: g[3, 3].neg_()), "has .* on its diagonal, wanted sums of squares"),
        (spoiled(lambda g: (g[3, 5].add_(500), g[5, 3].add_(500))), "is no X.T X: an entry is .* more than the squares"),
        (X, "has shape"),
        (torch.zeros_like(GRAM), "is zero: the layer never saw an input"),
    ],
)
def test_a_gram_matrix_that_is_none(gram, message):
    for call, argument in (("gptq", "hessian"), ("obq", "hessian"), ("awq", "gram"), ("awq.clip", "gram")):
        with pytest.raises(ValueError, match=f"^{argument} {message}"):
            made(call, **{argument: gram})
    checks.gram(GRAM.half(), "gram", 32)
    checks.gram(GRAM.bfloat16().float(), "gram", 32)


def test_there_is_one_place_for_them():
    """A check of a kind or a dtype in a method's own file would be a second one."""
    folder = Path(quant.__file__).parent
    for path in folder.glob("*.py"):
        if path.name not in ("checks.py", "bnb_format.py"):  # what a file says is not an argument
            assert "isinstance(bits" not in path.read_text(), path
            assert "is_floating_point()" not in path.read_text(), path
