"""What notebook 07 shows of AutoGPTQ: one layer of the golden file, small enough for the course's data.

`python -m interop.lesson_07`, run in tests/, writes data/golden/autogptq.safetensors from tests/interop/golden/gptq.safetensors.
"""

from __future__ import annotations

from pathlib import Path

import torch
from interop import golden
from safetensors import safe_open

LAYER = "course-o_proj"
SAID = "model.layers.2.self_attn.o_proj, its first 48 rows"
PATH = Path(__file__).resolve().parents[2] / "data" / "golden" / "autogptq.safetensors"
COMMAND = "cd tests && python -m interop.lesson_07"


def excerpt() -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Tensors and metadata: weight float16 [out, in], inputs int8 [n, in], and for each setting codes packed to their bits, scale
    float32, zero_point uint8 [out, groups] and g_idx uint8 [in]. settings: by name, as labsupport.quant.gptq.quantize takes them.
    """
    prefix = f"{LAYER}/"
    with safe_open(golden.GPTQ, "pt") as file:
        tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    said = golden.about(golden.GPTQ)
    settings = {setting.name: vars(setting) for setting in golden.read_gptq()[LAYER].results}
    about = {"layer": SAID, "versions": said["versions"], "source": said["command"], "command": COMMAND, "settings": settings}
    return tensors, about


if __name__ == "__main__":
    golden.write(PATH, *excerpt())
    print(f"wrote {PATH.name}, {PATH.stat().st_size} bytes")
