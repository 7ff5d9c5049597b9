"""One checkpoint served by vLLM on a CPU: `python -m interop.run_serve FOLDER OUT NAME-DTYPE`, in `serve`.

FOLDER/NAME is the checkpoint; what is written to OUT, `interop.measure` says.
"""

from __future__ import annotations

from pathlib import Path

import torch
from interop import measure
from vllm import LLM, SamplingParams


def found(asked_for: Path, tokens: measure.Measured) -> tuple[measure.Measured, str]:
    """asked_for: the checkpoint and a dtype. vLLM tells log-probabilities, not logits, and of all tokens only if asked for -1."""
    name, _, dtype = asked_for.name.rpartition("-")
    model = LLM(
        str(asked_for.with_name(name)), dtype=dtype, enforce_eager=True, max_model_len=512, max_logprobs=-1,
        enable_prefix_caching=False, skip_tokenizer_init=True, seed=0,
    )  # fmt: skip
    plain = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    prompt = tokens["prompt"][0].tolist()
    asked = SamplingParams(**plain, max_tokens=measure.NEW_TOKENS, prompt_logprobs=-1, logprobs=-1)
    said = model.generate([{"prompt_token_ids": prompt}], asked)[0]
    tables = [*said.prompt_logprobs[1:], said.outputs[0].logprobs[0]]  # before the first token there is nothing
    log_probabilities = torch.tensor([[table[token].logprob for token in range(len(table))] for table in tables])
    losses = []
    for window in tokens["text"].tolist():
        asked = SamplingParams(**plain, max_tokens=1, prompt_logprobs=0)
        tables = model.generate([{"prompt_token_ids": window}], asked)[0].prompt_logprobs[1:]
        true = [table[token].logprob for table, token in zip(tables, window[1:], strict=True)]
        losses.append(-torch.tensor(true, dtype=torch.float64).mean())
    measured = {
        "log_probabilities": log_probabilities,
        "greedy": torch.tensor(said.outputs[0].token_ids),
        "losses": torch.stack(losses),
    }
    return measured, model.apply_model(_methods)[0]


def _methods(model: torch.nn.Module) -> str:
    methods = {type(module.quant_method).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    return ", ".join(sorted(methods))


if __name__ == "__main__":
    measure.main(found)
