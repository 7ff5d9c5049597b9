"""Linears packed by compressed-tensors itself: `python -m interop.run_compressed FILE`. Runs in `modern`.

interop.compressed says what FILE holds, and what is added to it.
"""

from __future__ import annotations

import sys

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams, compute_dynamic_scales_and_zp
from interop import compressed
from safetensors.torch import load_file, save_file


def packed(weight: torch.Tensor, case: compressed.Case) -> tuple[dict[str, torch.Tensor], QuantizationScheme]:
    """The tensors of a linear with min-max grids, and the weight that the library reads from them."""
    scheme = QuantizationScheme(**case.config["config_groups"]["group_0"])
    groups = weight.view(len(weight), -1, case.group_size or weight.shape[1])
    scale, zero_point = calculate_qparams(groups.amin(2), groups.amax(2), scheme.weights)
    scale = scale.half()
    given = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point.to(torch.int8)}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    stored = compressor.compress(given, scheme)
    return {**stored, "decompressed": compressor.decompress(stored, scheme)["weight"]}, scheme


if __name__ == "__main__":
    inputs = load_file(sys.argv[1])
    tensors = dict(inputs)
    for name, case in compressed.CASES.items():
        found, scheme = packed(inputs["weight"], case)
        tensors |= {f"{name}/{part}": tensor for part, tensor in found.items()}
        if scheme.input_activations is not None:
            grid = compute_dynamic_scales_and_zp(inputs["tokens"], scheme.input_activations, torch.nn.Identity())
            tensors[f"{name}/rounded"] = fake_quantize(inputs["tokens"], *grid, scheme.input_activations)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, sys.argv[1])
