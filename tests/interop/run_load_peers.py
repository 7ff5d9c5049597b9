"""Checkpoints run by AutoGPTQ's and AutoAWQ's own linears: `python -m interop.run_load_peers FOLDER OUT NAME...`, in `legacy`.

FOLDER/NAME is a checkpoint; what is written to OUT, `interop.measure` says. AutoGPTQ's `from_quantized` insists on CUDA, and
AutoAWQ's on a GPU or Intel's extension of PyTorch; so their linears take the place of the model's, and the files' tensors go into
them as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear
from awq.modules.linear.gemm import WQLinear_GEMM
from interop import measure
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM


def with_linears(folder: Path, packed_like: Callable[[torch.nn.Linear], torch.nn.Module]) -> torch.nn.Module:
    """The model with a peer's linears in place of the blocks' own, and what the files hold in them."""
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, torch_dtype=torch.float16)
    for name, module in list(model.named_modules()):
        if name.endswith("_proj"):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, packed_like(module))
    tensors = {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if set(missing) - {"lm_head.weight"} or unexpected:  # the head is the embedding's weight, which the files hold once
        raise ValueError(f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


def by_autogptq(plain: torch.nn.Linear, said: dict) -> torch.nn.Module:
    shape = plain.in_features, plain.out_features, plain.bias is not None
    return QuantLinear(said["bits"], said["group_size"], *shape, weight_dtype=torch.float16)


def by_autoawq(plain: torch.nn.Linear, said: dict) -> torch.nn.Module:
    return WQLinear_GEMM(said["bits"], said["group_size"], plain.in_features, plain.out_features, plain.bias is not None, "cpu")


def found(folder: Path, tokens: measure.Measured) -> tuple[measure.Measured, str]:
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    linear = {"awq": by_autoawq, "gptq": by_autogptq}[said["quant_method"]]
    model = with_linears(folder, lambda plain: linear(plain, said))
    return measure.measure(model.eval(), tokens), measure.linears(model)


if __name__ == "__main__":
    measure.main(found)
