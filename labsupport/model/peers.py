"""bitsandbytes, to compare with: imported without its log messages, and a model that transformers loads through it."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType
from typing import Literal

import torch

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
    name = models.located(models.model_name(name))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        name, quantization_config=settings, dtype=dtype, device_map=device, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    model.eval()
    if method != "int8" and exact:
        # Its layers take the plain path in training mode. The model has no dropout, so nothing else changes.
        for module in model.modules():
            if isinstance(module, bitsandbytes().nn.Linear4bit):
                module.train()
    return model, tokenizer
