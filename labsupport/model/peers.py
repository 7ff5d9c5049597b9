"""bitsandbytes and peft, to compare with: imported without their log messages, and models that are loaded through them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn

from labsupport.model import models


@cache
def bitsandbytes() -> ModuleType:
    """The module. It logs to standard error on import and at every int8 product in float32; neither is shown."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def load_with_bitsandbytes(
    method: Literal["nf4", "fp4", "int8"],
    name: str | None = None,
    double_quant: bool = False,
    threshold: float = 6.0,
    dtype: torch.dtype = torch.float32,
    exact: bool = True,
):
    """The model as transformers loads it with a BitsAndBytesConfig, and its tokenizer; the output head is left as it is.

    name: as in `load_model`. dtype: of the other weights and of all products. exact: multiply by the dequantized weight; without
    it a 4-bit layer repacks itself at its first use on a processor with avx512_bf16, and from then on multiplies in bfloat16.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    bitsandbytes()
    transformers_logging.disable_progress_bar()
    if method not in ("nf4", "fp4", "int8"):
        raise ValueError(f"method is {method!r}, wanted 'nf4', 'fp4' or 'int8'")
    if method == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=method, bnb_4bit_use_double_quant=double_quant, bnb_4bit_compute_dtype=dtype
        )
    path = models.directory(models.model_name(name))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=settings, dtype=dtype, device_map=device, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    model.eval()
    if method != "int8" and exact:
        # Its layers take the plain path in training mode. The model has no dropout, so nothing else changes.
        for module in model.modules():
            if isinstance(module, bitsandbytes().nn.Linear4bit):
                module.train()
    return model, tokenizer


def load_with_peft(start: Mapping[str, Tensor], alpha: float, name: str | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model in NF4 with double quantization by bitsandbytes, peft's adapters on it, and their A and B by the names in `start`.

    start: NAME.lora_a, float [rank, in_features], and NAME.lora_b, float [out_features, rank], for each linear NAME that gets an
    adapter, as training.trainable has them; peft's begin with these values. alpha: the adapters' output is multiplied by
    alpha / rank. name: as in `load_model`. Raises ModelError without peft, ValueError for a name in `start` for which the model
    has no linear.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise models.ModelError("peft is not installed: pip install peft") from error
    layers = {key.removesuffix(".lora_a"): value for key, value in start.items() if key.endswith(".lora_a")}
    model = load_with_bitsandbytes("nf4", name, double_quant=True)[0]
    linears = models.linears(model)
    if missing := [layer for layer in layers if layer not in linears]:
        raise ValueError(f"start names {missing[0]}, which is no linear of the model's blocks")
    rank = len(next(iter(layers.values())))
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(layers), lora_dropout=0.0, task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # peft asks transformers for something by its old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = peft.get_peft_model(model, settings)
    parameters = {}
    with torch.no_grad():
        for layer in layers:
            module = model.base_model.model.get_submodule(layer)
            for theirs, ours in ((module.lora_A, "lora_a"), (module.lora_B, "lora_b")):
                parameters[f"{layer}.{ours}"] = theirs["default"].weight
                theirs["default"].weight.copy_(start[f"{layer}.{ours}"])
    return model, parameters
