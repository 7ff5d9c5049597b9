"""Claims that are settled by arithmetic, on published shapes and formats, and by what others have published."""

from __future__ import annotations

import torch

from labsupport.evidence import libraries, planner
from labsupport.evidence.audit import Finding, Given, all_or_some, audits
from labsupport.evidence.claims import CANNOT
from labsupport.quant import kv, packing, rtn

SEVEN, BIG = planner.LLAMA_7B, planner.LLAMA_34B
HEAD = 128  # channels of a head of Llama-2-7B, Mistral-7B and Llama-3-8B
MHA, GQA = kv.Shape(32, 32, HEAD, HEAD), kv.Shape(32, 8, HEAD, HEAD)
MLA = kv.Shape(27, 1, 64, 512)  # DeepSeek-V2-Lite: one rotated key and one latent vector for all heads
FP8 = kv.Scheme(kv.Part("fp8"), kv.Part("fp8"))


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB"


@audits(1)
def bf16_7b(given: Given) -> Finding:
    size = planner.model_bytes(SEVEN, 16)
    return Finding(abs(size / 14e9 - 1) < 0.05, {"weights of Llama-2-7B in 16 bits": _gb(size)})


@audits(2)
def four_bit_7b(given: Given) -> Finding:
    size = planner.model_bytes(SEVEN, 4)
    figures = {"weights of Llama-2-7B in 4 bits": _gb(size), "the same in GiB": f"{size / planner.GIB:.2f} GiB"}
    return Finding(size <= 3.5e9, figures)


@audits(9)
def gptq_takes_hours(given: Given) -> Finding:
    """Minutes; the run times of two papers' models, and of the tool that took over."""
    minutes = dict(given.says("GPTQ, arXiv:2210.17323")) | dict(given.says("LLM Compressor's documentation"))
    figures = {model: f"{m:g} minutes" if m < 60 else f"{m / 60:.1f} hours" for model, m in minutes.items()}
    return Finding(all_or_some(m >= 30 for m in minutes.values()), figures)


@audits(22)
def under_three_percent(given: Given) -> Finding:
    published = dict(given.says("AWQ, arXiv:2306.00978"))
    in_float = published.pop("16 bits")
    rises = {method: perplexity / in_float - 1 for method, perplexity in published.items()}
    return Finding(all_or_some(r < 0.03 for r in rises.values()), {m: f"{100 * r:+.1f} %" for m, r in rises.items()})


@audits(23)
def bytes_of_groups(given: Given) -> Finding:
    """Both halves within a fifth of what is said, by either kind of grid."""

    def added(group_size: int, symmetric: bool) -> float:
        return 100 * (rtn.quantize(torch.zeros(256, 768), 4, group_size, symmetric).bits_per_weight / 4 - 1)

    by_size = {size: [added(size, True), added(size, False)] for size in (128, 32)}
    near = [any(abs(value / said - 1) <= 0.2 for value in by_size[size]) for size, said in ((128, 3), (32, 10))]
    figures = {
        f"g{size}, {kind}": f"{v:.1f} %"
        for size, vs in by_size.items()
        for kind, v in zip(("symmetric", "zero-points"), vs, strict=True)
    }
    return Finding(all(near), figures)


@audits(25)
def thirty_four_billion(given: Given) -> Finding:
    stored = {bits: planner.model_bytes(BIG, bits) for bits in (16, 4, 3)}
    as_said = all(abs(stored[bits] / said - 1) < 0.05 for bits, said in ((16, 68e9), (4, 17e9), (3, 13e9)))
    fitting = [bits for bits, size in stored.items() if size < 16e9]
    figures = {f"CodeLlama-34B in {bits} bits": _gb(size) for bits, size in stored.items()}
    figures["16 GB hold the weights in"] = " and ".join(f"{bits} bits" for bits in fitting) or "none of these"
    return Finding(all_or_some([as_said, bool(fitting)]), figures)


@audits(27)
def cache_of_7b(given: Given) -> Finding:
    shapes = {"Llama-2-7B": MHA, "Mistral-7B, Llama-3-8B": GQA, "DeepSeek-V2-Lite, 16B": MLA}
    sizes = {name: kv.cache_bytes(shape, 4096, 32) for name, shape in shapes.items()}
    figures = {name: _gb(size) for name, size in sizes.items()} | {"Llama-2-7B, batch 2": _gb(kv.cache_bytes(MHA, 4096, 2))}
    return Finding(all(3e9 <= size <= 5e9 for name, size in sizes.items() if "7B" in name), figures)


@audits(28)
def four_times_on_both(given: Given) -> Finding:
    """Close to 4: at least 3.2."""
    weights = [planner.model_bytes(SEVEN, bits, 128) for bits in (16, 4)]
    caches = [kv.cache_bytes(MHA, 4096, 32), kv.cache_bytes(MHA, 4096, 32, FP8)]
    smaller = {"weights": weights[0] / weights[1], "cache": caches[0] / caches[1]}
    together = (weights[0] + caches[0]) / (weights[1] + caches[1])
    figures = {f"{part} of Llama-2-7B": f"{by:.2f} times smaller" for part, by in smaller.items()}
    figures["both, 4096 tokens, batch 32"] = f"{together:.2f} times smaller"
    return Finding(min(smaller.values()) > 3.2, figures)


@audits(34)
def standard_stack(given: Given) -> Finding:
    """What is standard is a count of what is served. The sources that we have name what is offered, and count nothing."""
    offered, kernels = given.says("LLM Compressor's documentation"), given.says("vLLM's documentation")
    figures = {
        "schemes with 4-bit weights that vLLM's own quantizer writes": ", ".join(offered["schemes"]),
        "what can choose the codes there": ", ".join(offered["algorithms"]),
        "recommended there for accuracy at 4 bits": " or ".join(offered["at 4 bits"]),
        "vLLM loads files of AutoAWQ": "yes" if "AutoAWQ" in kernels["formats"] else "no",
        "AutoAWQ is maintained": "no" if libraries.named("AutoAWQ").retired else "yes",
    }
    shares = [source["share of deployments"] for source in (offered, kernels) if "share of deployments" in source]
    return Finding(all(share > 0.5 for share in shares) if shares else CANNOT, figures)


@audits(35)
def runs_gptq(given: Given) -> Finding:
    """That either library is still developed, and that nothing else runs GPTQ's files."""
    said = {name: libraries.named(name) for name in ("AutoGPTQ", "ExLlamaV2")}
    others = [*given.says("vLLM, pull request 3922")["runs"], *given.says("transformers' documentation")["runs"]]
    figures = {f"{name} retired": f"by {library.retired}" for name, library in said.items() if library.retired}
    figures["what else runs them"] = ", ".join(others)
    return Finding(all_or_some([*(library.retired is None for library in said.values()), not others]), figures)


@audits(37)
def layout_of_gptq(given: Given) -> Finding:
    """The same codes, scales and zero-points by both writers; then who multiplies with them."""
    g = torch.Generator().manual_seed(0)
    quantized = rtn.quantize(torch.randn(64, 128, generator=g), 4, 128)
    theirs, ours = packing.write_gptq(quantized), packing.write_awq(quantized)
    same = {name: theirs[name].shape == ours[name].shape and torch.equal(theirs[name], ours[name]) for name in ours}
    first = [int(state["qzeros"].flatten()[0]) & 15 for state in (theirs, ours)]
    kernels = given.says("vLLM, pull request 6612")
    figures = {
        "equal of the same codes": ", ".join(name for name, equal in same.items() if equal),
        "qweight of 64 x 128": " and ".join(
            f"{list(state['qweight'].shape)} by {name}" for name, state in (("GPTQ", theirs), ("AWQ", ours))
        ),
        "in a word of AWQ, columns in the order": ", ".join(map(str, packing.AWQ_ORDER)),
        f"a zero-point of {quantized.zero_point[0].item():g} is stored as": f"{first[0]} by GPTQ, {first[1]} by AWQ",
        "in vLLM, after a repacking each of its own": kernels["multiplied by"],
    }
    return Finding(all_or_some([all(same.values()), bool(kernels["one kernel"])]), figures)
