"""torchao's fake quantizer on one weight, for the golden file that tests/test_qat.py and notebook 13 compare with.

    pip install --no-deps --target DIR torchao==0.18.0
    PYTHONPATH=.:DIR python tests/interop/run_torchao.py

It needs PyTorch alone. It is no dependency of the course, since transformers imports it wherever it is installed.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torchao
from safetensors.torch import save_file
from torchao.quantization.qat import IntxFakeQuantizeConfig
from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).requires_grad_()
values = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True))(weight)
factors = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
(factors * values).sum().backward()
tensors = {"weight": weight, "values": values, "factors": factors, "gradient": weight.grad}
path = Path(__file__).resolve().parents[2] / "data" / "golden" / "torchao.safetensors"
save_file({name: tensor.detach() for name, tensor in tensors.items()}, path, {"torchao": torchao.__version__})
