"""Quantized models on disk, as AutoGPTQ, AutoAWQ and bitsandbytes lay them out: written, read back, inspected.

checkpoint.quantize("path/to/model", "path/to/new", "gptq", symmetric=True)   # block by block: `labs quantize`
checkpoint.save(model, stored, "path/to/new", "awq")                          # a model in memory
model, tokenizer = checkpoint.load("path/to/new")                             # float32, each weight as it reads back
"""

from labsupport.checkpoint.inspection import Finding, Inspection, inspect
from labsupport.checkpoint.run import quantize
from labsupport.checkpoint.save import save
from labsupport.checkpoint.stored import Checkpoint, load, read
from labsupport.checkpoint.weights import CheckpointError

__all__ = ["Checkpoint", "CheckpointError", "Finding", "Inspection", "inspect", "load", "quantize", "read", "save"]
