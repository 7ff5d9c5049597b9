"""AutoGPTQ itself, layer by layer, on a CPU. Runs in the peers' environment: `python -m interop.run_gptq FOLDER`.

Every FOLDER/NAME.in.safetensors holds a weight [out, in] and a Hessian [in, in], float32, or instead of it the layer's inputs
[windows, tokens, in], of which AutoGPTQ makes its own, and in its metadata the settings as JSON. FOLDER/NAME.out.safetensors gets,
for each setting, codes uint8 [out, in], scale float32 and zero_point uint8 [out, groups], g_idx int16 [in] (the group of each
column) and the seconds that the solver took; its metadata says how this environment rounds. A setting that is asked for several
times keeps the least of its seconds.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from auto_gptq.quantization.gptq import GPTQ
from interop.cases import BLOCK_SIZE, DAMPING, Setting, rounding_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

# The solver waits for a GPU before it reads the clock. Without one this raises.
torch.cuda.synchronize = lambda *_: None


def own_hessian(weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """What AutoGPTQ sums up of a layer's inputs, window by window."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    gptq = GPTQ(layer)
    for window in inputs:
        gptq.add_batch(window[None], None)
    return gptq.H


def solve(weight: torch.Tensor, hessian: torch.Tensor, setting: Setting) -> dict[str, torch.Tensor]:
    """Codes, grids, groups and seconds of one layer."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.clone()
    gptq = GPTQ(layer)
    gptq.quantizer.configure(
        setting.bits, perchannel=True, sym=setting.symmetric, mse=setting.mse, norm=2.4, grid=100, maxshrink=0.8, trits=False
    )
    gptq.H = hessian.clone()
    gptq.nsamples = 1  # it divides its log message by this
    start = time.perf_counter()
    scale, zero_point, g_idx = gptq.fasterquant(
        blocksize=BLOCK_SIZE,
        percdamp=DAMPING,
        group_size=setting.group_size or -1,
        actorder=setting.act_order,
        static_groups=setting.static_groups,
    )
    seconds = time.perf_counter() - start
    # The solver leaves scale * (code - zero_point) in the layer: dividing gives back a whole number to within rounding.
    groups = g_idx.long()
    steps = layer.weight.data / scale[:, groups]
    codes = steps.round() + zero_point[:, groups]
    if (steps - steps.round()).abs().max() > 1e-4 or codes.min() < 0 or codes.max() >= 2**setting.bits:
        raise RuntimeError(f"{setting.name}: what AutoGPTQ leaves in the layer is not on its grid")
    return {
        "codes": codes.to(torch.uint8),
        "scale": scale,
        "zero_point": zero_point.to(torch.uint8),
        "g_idx": g_idx.to(torch.int16),
        "seconds": torch.tensor(seconds, dtype=torch.float64),
    }


@torch.no_grad()
def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.in.safetensors")):
        name = path.name.removesuffix(".in.safetensors")
        with safe_open(path, "pt") as file:
            about = file.metadata()
        known, settings = load_file(path), [Setting(**fields) for fields in json.loads(about["settings"])]
        weight = known["weight"]
        hessian = known["hessian"] if "hessian" in known else own_hessian(weight, known["inputs"])
        results = {}
        for setting in settings:
            solved = solve(weight, hessian, setting)
            results |= {f"{setting.name}/{key}": tensor.contiguous() for key, tensor in solved.items() if key != "seconds"}
            least = torch.minimum(solved["seconds"], results.get(f"{setting.name}/seconds", solved["seconds"]))
            results[f"{setting.name}/seconds"] = least
        save_file(results, folder / f"{name}.out.safetensors", {"rounding": rounding_of(hessian)})
        print(f"AutoGPTQ: {name}, {len(settings)} settings", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
