"""AutoAWQ itself on a whole model, on a CPU. Runs in the peers' environment: `python -m interop.run_awq FOLDER`.

FOLDER/model is a Llama directory, FOLDER/tokens.safetensors holds `tokens`, int64 [samples, length], FOLDER/runs.json a list of
cases.AwqRun. FOLDER/NAME.out.safetensors gets, for every group G of linears that share an input, in AutoAWQ's order:
  group.G/scale [in], group.G/x_mean and group.G/w_mean [in], what it was made of, group.G/losses float64 [20], one for each ratio;
for every linear: LINEAR/clip float32 [out, groups], where one was searched; LINEAR/qweight, qzeros and scales as AutoAWQ stores
them; for every norm NORM/weight after folding; logits_change, the largest change of a logit relative to the largest logit, and
seconds. The metadata's `groups` says which linears, after what, each G stands for.
"""

from __future__ import annotations

import inspect
import json
import sys
import textwrap
import time
from pathlib import Path

import awq.quantize.quantizer as autoawq
import torch
from awq import AutoAWQForCausalLM
from interop.cases import AwqRun
from safetensors.torch import load_file, save_file


def patched_search():
    """AutoAWQ's search with one word added: it keeps the weights to restore as aliases of those that it is about to scale."""
    source = textwrap.dedent(inspect.getsource(autoawq.AwqQuantizer._compute_best_scale))
    if source.count("v.cpu()") != 1:
        raise RuntimeError("AutoAWQ's search is not the one of 0.2.9: v.cpu() was expected in it once")
    scope = dict(vars(autoawq))
    exec(source.replace("v.cpu()", "v.cpu().clone()"), scope)
    return scope["_compute_best_scale"]


class Watched(autoawq.AwqQuantizer):
    """AutoAWQ's quantizer, keeping what it finds on the way."""

    search = staticmethod(patched_search())

    def quantize(self):
        self.found, self.groups, self.losses = {}, [], []
        super().quantize()

    def _search_best_scale(self, module, prev_op, layers, **given):
        self.losses = []
        before, names, scale = super()._search_best_scale(module, prev_op, layers, **given)
        block = f"model.layers.{list(self.modules).index(module)}"
        prefix = f"group.{len(self.groups)}"
        self.groups.append({"after": f"{block}.{before}", "linears": [f"{block}.{name}" for name in names]})
        self.found |= {f"{prefix}/scale": scale, f"{prefix}/losses": torch.tensor(self.losses, dtype=torch.float64)}
        return before, names, scale

    def _compute_best_scale(self, x, w_mean, x_mean, *given):
        prefix = f"group.{len(self.groups)}"
        self.found |= {f"{prefix}/w_mean": w_mean.clone(), f"{prefix}/x_mean": x_mean.clone()}
        return self.search(self, x, w_mean, x_mean, *given)

    def _compute_loss(self, *given):
        self.losses.append(super()._compute_loss(*given))
        return self.losses[-1]

    def _search_best_clip(self, layer, named_linears, input_feat):
        clips = super()._search_best_clip(layer, named_linears, input_feat)
        block = f"model.layers.{list(self.modules).index(layer)}"
        self.found |= {f"{block}.{name}/clip": value.squeeze(-1) for name, value in clips}
        return clips


class Stock(Watched):
    """As published: on a CPU it returns ratio 0 and leaves the weights scaled."""

    search = staticmethod(autoawq.AwqQuantizer._compute_best_scale)


def quantize(folder: Path, tokens: torch.Tensor, run: AwqRun) -> tuple[dict[str, torch.Tensor], list[dict[str, object]]]:
    """The tensors described above, and the groups."""
    model = AutoAWQForCausalLM.from_pretrained(
        str(folder / "model"), device_map="cpu", torch_dtype=torch.float32, safetensors=True, use_cache=False
    )
    before = model.model(input_ids=tokens[:2], use_cache=False).logits
    start = time.perf_counter()
    model.quantize(
        None,
        quant_config={"zero_point": True, "q_group_size": run.group_size, "w_bit": 4, "version": "GEMM"},
        calib_data=tokens.tolist(),
        duo_scaling=run.duo_scaling,
        apply_clip=run.clip,
        export_compatible=not run.quantize,
        max_calib_samples=len(tokens),
        max_calib_seq_len=tokens.shape[1],
        quantizer_cls=Watched if run.patched else Stock,
    )
    tensors = model.quantizer.found | {"seconds": torch.tensor(time.perf_counter() - start, dtype=torch.float64)}
    for name, module in model.model.named_modules():
        if run.quantize and hasattr(module, "qweight"):
            tensors |= {f"{name}/{part}": getattr(module, part) for part in ("qweight", "qzeros", "scales")}
        elif name.endswith("layernorm"):
            tensors[f"{name}/weight"] = module.weight.detach()
    if not run.quantize:
        after = model.model(input_ids=tokens[:2], use_cache=False).logits
        tensors["logits_change"] = (after - before).abs().max() / before.abs().max()
    return tensors, model.quantizer.groups


@torch.no_grad()
def main(folder: Path) -> None:
    tokens = load_file(folder / "tokens.safetensors")["tokens"]
    for fields in json.loads((folder / "runs.json").read_text()):
        run = AwqRun(**fields)
        tensors, groups = quantize(folder, tokens, run)
        tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        save_file(tensors, folder / f"{run.name}.out.safetensors", {"groups": json.dumps(groups)})
        print(f"AutoAWQ: {run.name}, {tensors['seconds'].item():.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
