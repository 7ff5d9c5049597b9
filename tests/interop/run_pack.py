"""AutoGPTQ's and AutoAWQ's own packing of given codes. Runs in the peers' environment: `python -m interop.run_pack FOLDER`.

Every FOLDER/NAME.in.safetensors holds codes uint8 [out, in], scale float16 and zero_point uint8 [out, groups], g_idx int32 [in],
and in its metadata bits, group_size and peer. FOLDER/NAME.out.safetensors gets the peer's qweight, qzeros and scales, by AutoGPTQ
also g_idx, and weight float32 [out, in]: what the peer itself reads back from them, on a CPU.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def linear_of(given: dict[str, torch.Tensor]) -> torch.nn.Linear:
    """A float16 layer whose weight lies on the grid, as it does after quantization."""
    groups = given["g_idx"].long()
    values = given["scale"].float()[:, groups] * (given["codes"].float() - given["zero_point"].float()[:, groups])
    layer = torch.nn.Linear(values.shape[1], values.shape[0], bias=False, dtype=torch.float16)
    layer.weight.data = values.half()
    return layer


def by_autogptq(given: dict[str, torch.Tensor], bits: int, group_size: int) -> dict[str, torch.Tensor]:
    layer = linear_of(given)
    packed = QuantLinear(bits, group_size, layer.in_features, layer.out_features, bias=False, weight_dtype=torch.float16)
    # It subtracts 1 from the zero-points in place.
    packed.pack(layer, given["scale"].float(), given["zero_point"].float(), given["g_idx"].clone())
    packed.scales_half, packed.scales = packed.scales, packed.scales.float()
    weight = packed(torch.eye(layer.in_features)).t()  # on a CPU it dequantizes and multiplies
    parts = {name: getattr(packed, name) for name in ("qweight", "qzeros", "g_idx")}
    return parts | {"scales": packed.scales_half, "weight": weight}


def by_autoawq(given: dict[str, torch.Tensor], bits: int, group_size: int) -> dict[str, torch.Tensor]:
    layer = linear_of(given)
    scales, zeros = given["scale"].t().contiguous(), given["zero_point"].t().contiguous()
    packed = WQLinear_GEMM.from_linear(layer, bits, group_size, scales=scales, zeros=zeros)
    parts = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
    return parts | {"weight": dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"].float(), bits, group_size).t()}


@torch.no_grad()
def main(folder: Path) -> None:
    for path in sorted(folder.glob("*.in.safetensors")):
        with safe_open(path, "pt") as file:
            about = file.metadata()
        pack = {"autogptq": by_autogptq, "autoawq": by_autoawq}[about["peer"]]
        out = pack(load_file(path), int(about["bits"]), int(about["group_size"]))
        name = path.name.replace(".in.", ".out.")
        save_file({key: tensor.contiguous().clone() for key, tensor in out.items()}, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
