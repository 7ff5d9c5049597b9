"""What notebook 08 compares with: a part of the golden file of AutoAWQ, small enough to travel with the course's data.

`python -m interop.lesson_awq`, in tests/, writes data/golden/autoawq.safetensors: a Llama of one block with made-up weights (int8,
in steps of tiny.STEP), the tokens it was calibrated with, and what AutoAWQ found in it. For each group of linears that share an
input RUN/GROUP/scale and RUN/GROUP/ratio, for RUN "autoawq" and "llm-awq", which name the rule; by the first also LINEAR/clip. For
RUN "scaled" and "stock" logits_change, how far scaling alone moves the logits with the repaired search and with the published one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from interop import golden, tiny
from interop.cases import AwqRun

PATH = Path(__file__).resolve().parents[2] / "data" / "golden" / "autoawq.safetensors"
MODEL = "mha"
RUNS = {
    "autoawq": AwqRun(64),
    "llm-awq": AwqRun(64, duo_scaling=False, quantize=False),
    "scaled": AwqRun(128, clip=False, quantize=False),
    "stock": AwqRun(128, clip=False, quantize=False, patched=False),
}


def contents() -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Tensors and metadata, taken from the golden file."""
    model, said = golden.read_awq()[MODEL], golden.about(golden.AWQ)
    tensors = {f"weights/{name}": weight for name, weight in model.weights.items()}
    tensors["tokens"] = model.tokens.to(torch.uint8)
    for name, run in RUNS.items():
        found = model.results[run]
        for number in range(len(found.groups)):
            if name in ("scaled", "stock"):
                continue
            tensors[f"{name}/{number}/scale"] = found.tensors[f"group.{number}/scale"]
            tensors[f"{name}/{number}/ratio"] = torch.tensor(found.ratio(number), dtype=torch.float64)
        if "logits_change" in found.tensors:
            tensors[f"{name}/logits_change"] = found.tensors["logits_change"]
        if name == "autoawq":
            tensors |= {key: tensor for key, tensor in found.tensors.items() if key.endswith("/clip")}
    about = {
        "config": tiny.SHAPES[MODEL].config, "step": tiny.STEP, "groups": model.results[RUNS["autoawq"]].groups,
        "group_size": {name: run.group_size for name, run in RUNS.items()},
        "versions": said["versions"], "processor": said["processor"],
        "command": f"{said['command']}, then python -m interop.lesson_awq",
    }  # fmt: skip
    return tensors, about


def main() -> None:
    tensors, about = contents()
    golden.write(PATH, tensors, about)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes")


if __name__ == "__main__":
    main()
