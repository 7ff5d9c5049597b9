"""What the notebooks carry of the golden files, small, in data/golden: `python -m interop.lessons`, in tests/.

A learner's installation holds data/ and not tests/. test_lessons.py sees to it that the copies are the originals.
"""

from __future__ import annotations

from pathlib import Path

import torch
from interop import golden

from labsupport import models

LAYER = "course-o_proj"
FOLDER = models.data_dir() / "golden"
GPTQ = FOLDER / "gptq_o_proj.safetensors"


def gptq_tensors() -> dict[str, torch.Tensor]:
    """Notebook 06: one linear of the course model and what AutoGPTQ made of it in column order.

    weight float16 [out, in], inputs int8 [n, in]; for each setting, by its name: codes uint8 [out, in], scale and zero_point.
    """
    layer = golden.read_gptq()[LAYER]
    tensors = {"weight": layer.weight.half(), "inputs": layer.inputs}
    for setting, solved in layer.results.items():
        if not setting.act_order:
            kept = {"codes": solved.codes, "scale": solved.scale, "zero_point": solved.zero_point}
            tensors |= {f"{setting.name}/{key}": tensor for key, tensor in kept.items()}
    return tensors


def gptq_about() -> dict[str, object]:
    """The golden file's metadata: versions, threads, processor; and the command that made the copy."""
    said = golden.about(golden.GPTQ)
    kept = {key: said[key] for key in ("versions", "threads", "processor")}
    return kept | {"layer": LAYER, "command": "python -m interop.lessons", "from": "tests/interop/golden/gptq.safetensors"}


def main(path: Path = GPTQ) -> None:
    golden.write(path, gptq_tensors(), gptq_about())
    print(f"wrote {path.name}, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
