"""Checkpoints loaded by transformers, whose kernels for them are gptqmodel's: `python -m interop.run_load FOLDER OUT NAME...`.

Runs in `modern`. FOLDER/NAME is a checkpoint; what is written to OUT, `interop.measure` says.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from interop import measure
from transformers import AutoModelForCausalLM, AwqConfig, CompressedTensorsConfig, GPTQConfig


def settings(folder: Path) -> dict[str, object]:
    """The kernels in plain torch: the default ones compute in bfloat16 on a CPU, and hide what the file stands for.

    compressed-tensors 0.20 does not make room for packed zero-points before the file is read: asymmetric grids are dequantized.
    """
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    if said["quant_method"] == "gptq":
        return {"quantization_config": GPTQConfig(bits=said["bits"], backend="torch")}
    if said["quant_method"] == "awq":
        return {"quantization_config": AwqConfig(bits=said["bits"], backend="torch_awq")}
    if said["quant_method"] == "compressed-tensors" and not said["config_groups"]["group_0"]["weights"]["symmetric"]:
        return {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    return {}


def found(folder: Path, tokens: measure.Measured) -> tuple[measure.Measured, str]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu", **settings(folder))
    return measure.measure(model.eval(), tokens), measure.linears(model)


if __name__ == "__main__":
    measure.main(found)
