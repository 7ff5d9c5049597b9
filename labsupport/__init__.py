"""Quantization from First Principles: what stands behind the notebooks. Heavy libraries are imported late."""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"
_WHERE = {
    "load_model": "labsupport.models",
    "quantize_model": "labsupport.quantize",
    "perplexity": "labsupport.evaluate",
    "load_text": "labsupport.text",
}
__all__ = ["load_model", "load_text", "perplexity", "quantize_model"]


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'labsupport' has no attribute {name!r}")
