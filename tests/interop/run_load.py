"""Checkpoints loaded by transformers, whose kernels for them are gptqmodel's: `python -m interop.run_load FOLDER`, in `modern`.

FOLDER holds a folder for each checkpoint and tokens.safetensors: prompt int64 [1, n] and text int64 [windows, length].
FOLDER/NAME.out.safetensors gets logits float32 [n, vocabulary] of the prompt, greedy int64 [32], how it goes on, and losses
float64 [windows], nats a token of the text; in its metadata the class of the linears. What is refused gets NAME.refused, with the
words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

NEW_TOKENS = 32


def settings(folder: Path) -> dict[str, object]:
    """The kernels in plain torch: the default ones compute in bfloat16 on a CPU, and hide what the file stands for."""
    said = json.loads((folder / "config.json").read_text())["quantization_config"]
    if said["quant_method"] == "gptq":
        return {"quantization_config": GPTQConfig(bits=said["bits"], backend="torch")}
    if said["quant_method"] == "awq":
        return {"quantization_config": AwqConfig(bits=said["bits"], backend="torch_awq")}
    return {}


@torch.no_grad()
def measure(model: torch.nn.Module, tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors described above."""
    logits = model(input_ids=tokens["prompt"], use_cache=False).logits[0].float()
    greedy = model.generate(tokens["prompt"], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    losses = []
    for window in tokens["text"]:
        said = model(input_ids=window[None, :-1], use_cache=False).logits[0].double()
        losses.append(torch.nn.functional.cross_entropy(said, window[1:]))
    return {"logits": logits, "greedy": greedy[0, tokens["prompt"].shape[1] :], "losses": torch.stack(losses)}


def main(folder: Path) -> None:
    tokens = load_file(folder / "tokens.safetensors")
    for checkpoint in sorted(path for path in folder.iterdir() if path.is_dir()):
        try:
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float16, device_map="cpu", **settings(checkpoint))
            found = measure(model.eval(), tokens)
        except Exception as error:  # whatever a loader does not take, in its own words: they are the result
            (folder / f"{checkpoint.name}.refused").write_text(f"{type(error).__name__}: {error}")
            continue
        kinds = sorted({type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")})
        save_file(found, folder / f"{checkpoint.name}.out.safetensors", {"linears": ", ".join(kinds)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
