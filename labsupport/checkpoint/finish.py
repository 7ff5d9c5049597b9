"""The last step of writing a checkpoint: its config, its card and report, its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from labsupport.checkpoint import card, layouts
from labsupport.checkpoint.card import Facts
from labsupport.checkpoint.parts import Parts
from labsupport.checkpoint.tokenizers import copied_files


def finish(parts: Parts, source: Path | None, config: Mapping[str, Any], facts: Facts) -> Path:
    """Write what stands beside the tensors and let the directory appear. Returns it.

    source: the directory of the original model, whose tokenizer and generation settings are copied. config: its config.json.
    """
    dtype = facts.settings["dtype"]
    new_config = dict(config) | {"quantization_config": layouts.config(parts.layout, facts.settings, dtype)}
    # transformers 5 writes dtype, older ones torch_dtype.
    for key in {"torch_dtype", "dtype"} & new_config.keys() or {"torch_dtype"}:
        new_config[key] = dtype
    sizes = card.sizes(parts.shard(index) for index in range(len(parts.names) + 1))
    contents = {
        "config.json": json.dumps(new_config, indent=1),
        "quantization_report.json": json.dumps(facts.report(sizes), indent=1),
        "README.md": facts.text(sizes),
    }
    for name, content in layouts.other_configs(parts.layout, facts.settings).items():
        contents[name] = json.dumps(content, indent=1)
    return parts.finish(contents, copied_files(source) if source else {})
