"""Quantization from First Principles: what stands behind the notebooks. Heavy libraries are imported late."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"
PACKAGE = Path(__file__).resolve().parent
# What a notebook imports from labsupport itself, and where it is.
_FUNCTIONS = {
    "load_model": "labsupport.model.models",
    "load_text": "labsupport.model.text",
    "perplexity": "labsupport.model.evaluate",
    "quantize_model": "labsupport.pipeline.quantize",
}
_MODULES = {
    "model": ("evaluate", "models", "peers", "text"),
    "pipeline": ("budget", "cache", "calibrate", "fold", "listening", "lora", "training"),
    "evidence": ("choosing", "claims", "machine", "planner", "published", "roofline", "sink", "sweep", "tables", "training_memory"),
    "figures": ("widgets",),
}
_PACKAGE_OF = {name: package for package, names in _MODULES.items() for name in names}
__all__ = ["load_model", "load_text", "perplexity", "quantize_model"]


def __getattr__(name: str):
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    if name in _PACKAGE_OF:
        return import_module(f"labsupport.{_PACKAGE_OF[name]}.{name}")
    raise AttributeError(f"module 'labsupport' has no attribute {name!r}")
