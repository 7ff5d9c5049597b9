"""What the notebooks show of the golden files, small, in data/golden: `python -m interop.lessons`, run in tests/, writes them.

A learner's installation holds data/ and not tests/. test_lessons.py sees to it that the copies are the originals.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from interop import golden, pack, tiny
from interop.cases import AwqRun
from safetensors import safe_open

from labsupport.model import models

COMMAND = "cd tests && python -m interop.lessons"
Contents = tuple[dict[str, torch.Tensor], dict[str, object]]

GPTQ_LAYER = "course-o_proj"
GPTQ_LAYER_SAID = "model.layers.2.self_attn.o_proj, its first 48 rows"
AWQ_MODEL = "mha"
PACKED = ("autogptq-4b-asym", "autogptq-4b-asym-order", "autogptq-4b-asym-zero", "autogptq-3b-asym", "autoawq-4b-asym")
AWQ_RUNS = {
    "autoawq": AwqRun(64),
    "llm-awq": AwqRun(64, duo_scaling=False, quantize=False),
    "scaled": AwqRun(128, clip=False, quantize=False),
    "stock": AwqRun(128, clip=False, quantize=False, patched=False),
}


def autogptq() -> Contents:
    """Notebooks 06 and 07: a linear of the course model and what AutoGPTQ made of it.

    weight float16 [out, in], inputs int8 [n, in], and for each setting codes packed to their bits, scale float32, zero_point
    uint8 [out, groups] and g_idx uint8 [in]. In the metadata settings: by name, as labsupport.quant.gptq.quantize takes them.
    """
    prefix = f"{GPTQ_LAYER}/"
    with safe_open(golden.GPTQ, "pt") as file:
        tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    said = golden.about(golden.GPTQ)
    settings = {setting.name: vars(setting) for setting in golden.read_gptq()[GPTQ_LAYER].results}
    about = {"layer": GPTQ_LAYER_SAID, "versions": said["versions"], "source": said["command"], "command": COMMAND}
    return tensors, about | {"settings": settings}


def autoawq() -> Contents:
    """Notebook 08: a Llama of one block with made-up weights (int8, in steps of tiny.STEP) and what AutoAWQ found in it.

    With the tokens it was calibrated with. For each group of linears that share an input RUN/GROUP/scale and RUN/GROUP/ratio, for
    RUN "autoawq" and "llm-awq", which name the rule; by the first also LINEAR/clip. For RUN "scaled" and "stock" logits_change,
    how far scaling alone moves the logits with the repaired search and with the published one.
    """
    model, said = golden.read_awq()[AWQ_MODEL], golden.about(golden.AWQ)
    tensors = {f"weights/{name}": weight for name, weight in model.weights.items()}
    tensors["tokens"] = model.tokens.to(torch.uint8)
    for name, run in AWQ_RUNS.items():
        found = model.results[run]
        if name in ("scaled", "stock"):
            tensors[f"{name}/logits_change"] = found.tensors["logits_change"]
            continue
        for number in range(len(found.groups)):
            tensors[f"{name}/{number}/scale"] = found.tensors[f"group.{number}/scale"]
            tensors[f"{name}/{number}/ratio"] = torch.tensor(found.ratio(number), dtype=torch.float64)
        if name == "autoawq":
            tensors |= {key: tensor for key, tensor in found.tensors.items() if key.endswith("/clip")}
    about = {
        "config": tiny.SHAPES[AWQ_MODEL].config, "step": tiny.STEP, "groups": model.results[AWQ_RUNS["autoawq"]].groups,
        "group_size": {name: run.group_size for name, run in AWQ_RUNS.items()}, "versions": said["versions"],
        "processor": said["processor"], "source": said["command"], "command": COMMAND,
    }  # fmt: skip
    return tensors, about


def packing() -> Contents:
    """Notebook 10: a made-up layer, its codes and zero_point (uint8, 8 bits), scale (float16) and g_idx (int32), and for each of
    PACKED what AutoGPTQ or AutoAWQ made of it: CASE/qweight, qzeros, scales, by AutoGPTQ g_idx. What they packed are the highest
    bits of codes and zero_point, no zero-point below 1 but where the case is called zero.
    """
    wanted = ("layer", *PACKED)
    with safe_open(pack.PATH, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if key.partition("/")[0] in wanted}  # noqa: SIM118
    said = golden.about(pack.PATH)
    return tensors, {"versions": said["versions"], "source": said["command"], "command": COMMAND, "group_size": pack.GROUP}


FILES: dict[str, Callable[[], Contents]] = {"autogptq": autogptq, "autoawq": autoawq, "packing": packing}


def path(name: str) -> Path:
    return models.data_dir() / "golden" / f"{name}.safetensors"


if __name__ == "__main__":
    for name, contents in FILES.items():
        golden.write(path(name), *contents())
        print(f"wrote {path(name).name}, {path(name).stat().st_size / 1e3:.0f} kB")
