"""Chapter 9: what a cache weighs, which way a group runs, who waits, a layer for `generate`, where a factor cancels, and a sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache as once
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from labsupport.exercises.base import Exercise, Mutant, Verdict, generator, largest_difference, right, shape_fault, wrong
from labsupport.model import models
from labsupport.quant import grid, kv
from labsupport.quant.kv import Part

# 9.1 ------------------------------------------------------------------------------------------------------------------


def bytes_inputs(seed: int) -> dict:
    """Four kinds of attention, as their config.json says it; the widths of heads do not always follow from hidden_size."""
    g = generator(seed)
    layers, heads, width = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((3, 9), (3, 6), (5, 9)))
    heads, width = 4 * heads, 8 * width
    common = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": heads * width}
    configs = {
        "MHA": common,
        "GQA": common | {"num_key_value_heads": heads // 4},
        "GQA with wide heads": common | {"num_key_value_heads": heads // 2, "head_dim": 2 * width},
        "MLA": common | {"num_key_value_heads": heads, "kv_lora_rank": 3 * width, "qk_rope_head_dim": 12},
    }
    return {"configs": configs, "tokens": 100 + seed, "batch": (11, 13)[seed % 2]}


def cache_bytes(config: dict[str, int], tokens: int, batch: int) -> int:
    """labsupport's formula for a cache in 16 bits."""
    return kv.cache_bytes(kv.Shape.of(SimpleNamespace(**config)), tokens, batch)


def drive_bytes(answer: Callable, given: dict) -> dict:
    return {name: answer(dict(config), given["tokens"], given["batch"]) for name, config in given["configs"].items()}


def _counted(
    config, tokens, batch, both=2, shared=True, wide=True, layers=True, per_value=2, latent=True, rope=True, latent_both=1,
    latent_heads=False,
):  # fmt: skip
    """The formula with what can be forgotten as options."""
    heads = config["num_attention_heads"]
    width = config["hidden_size"] // heads
    width = config.get("head_dim", width) if wide else width
    numbers = both * width * (config.get("num_key_value_heads", heads) if shared else heads)
    if latent and "kv_lora_rank" in config:
        numbers = latent_both * (config["kv_lora_rank"] + rope * config["qk_rope_head_dim"]) * (heads if latent_heads else 1)
    return numbers * tokens * batch * per_value * (config["num_hidden_layers"] if layers else 1)


BYTES_MISTAKES: dict[str, dict] = {
    "half of it is missing: a token leaves a key and a value": {"both": 1},
    "every head of queries was given keys and values of its own: with grouped-query attention they are num_key_value_heads": {
        "shared": False
    },
    "the width of a head was taken from hidden_size. Where the config says head_dim, that is the width": {"wide": False},
    "this is the cache of one layer": {"layers": False},
    "these are numbers, wanted bytes: 16 bits are two": {"per_value": 1},
    "these are bits, wanted bytes: 16 bits are two": {"per_value": 16},
    "MLA was counted like the others. It keeps a latent vector of kv_lora_rank for all heads together, and makes keys and values "
    "of it when they are read": {"latent": False},
    "the rotated key of qk_rope_head_dim is missing from MLA's: it is kept beside the latent vector": {"rope": False},
    "MLA's latent vector was counted twice. Keys and values are made from one and the same": {"latent_both": 2},
    "MLA's latent vector was counted for every head. All heads share one": {"latent_heads": True},
}


def judge_bytes(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    if got == want:
        return right()
    tokens, batch = given["tokens"], given["batch"]
    if all(got[name] * batch == want[name] for name in want):
        return wrong("this is one sequence: a batch has a cache for each")
    for unit, size in {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "GB": 1e9, "MB": 1e6}.items():
        if all(abs(got[name] * size - want[name]) <= 1e-9 * want[name] for name in want):
            return wrong(f"this is in {unit}, wanted bytes")
    for said, options in BYTES_MISTAKES.items():
        if all(got[name] == _counted(config, tokens, batch, **options) for name, config in given["configs"].items()):
            return wrong(said)
    name = next(name for name in want if got[name] != want[name])
    return wrong(f"{name}: got {got[name]:g} bytes, wanted {want[name]} for {given['configs'][name]}")


BYTES = Exercise(
    id="9.1", name="cache_bytes", title="What a cache weighs", minutes=10, difficulty=2, points=3,
    returns=("bytes",), inputs=bytes_inputs, reference=cache_bytes, judge=judge_bytes, drive=drive_bytes,
    mutants=(
        *(Mutant(partial(_counted, **options), said[:40]) for said, options in BYTES_MISTAKES.items()),
        Mutant(lambda config, tokens, batch: _counted(config, tokens, 1), "one sequence"),
        Mutant(lambda config, tokens, batch: _counted(config, tokens, batch) / 2**30, "in GiB, wanted bytes"),
        Mutant(lambda config, tokens, batch: _counted(config, tokens + 1, batch), "MHA: got"),
        Mutant(lambda config, tokens, batch: f"{_counted(config, tokens, batch)}", "is a str, wanted a number"),
    ),
)  # fmt: skip


# 9.2 ------------------------------------------------------------------------------------------------------------------


def keys_inputs(seed: int) -> dict:
    """Channels far off zero, loud, tiny, constant, and all negative; fewer channels than tokens, and heads that differ."""
    g = generator(seed)
    keys = torch.randn(2, 3, 24, 12, generator=g)
    keys += torch.randn(1, 3, 1, 12, generator=g)
    keys[..., 1] += 300  # so far off that float16 rounds its minimum by a good part of a step
    keys[..., 4] *= 30
    keys[..., 6] *= 1e-2
    keys[..., 8] = 1.5
    keys[..., 9] = -keys[..., 9].abs() - 3
    group_size = (8, 6)[seed // 2 % 2]
    keys[:, :, group_size : 2 * group_size, 2] = 0
    return {"keys": keys, "bits": (4, 2)[seed % 2], "group_size": group_size}


def quantize_keys(keys: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """labsupport's keys per channel, taken apart: codes, scale and minimum."""
    stored = kv.quantize(keys, Part(bits, "channel", group_size))
    codes = grid.unpack_bits(stored.codes.flatten(), bits, keys.numel()).view(keys.shape)
    return codes, stored.scale, stored.minimum


def _keys(keys, bits, group_size, zero=False, levels=1, rounded=torch.round, shared=(), stride=False, alike=True, symmetric=False):
    """Keys per channel with what can go wrong as options."""
    sizes = (group_size, -1) if stride else (-1, group_size)
    groups = keys.unflatten(2, sizes)
    groups = groups.transpose(2, 3) if stride else groups
    low, high = groups.amin(3, keepdim=True), groups.amax(3, keepdim=True)
    for axis in shared:
        low, high = low.amin(axis, keepdim=True).expand_as(low), high.amax(axis, keepdim=True).expand_as(high)
    if zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    minimum = low.half()
    scale = ((high - minimum.float()) / (2**bits - levels)).half()
    if alike:
        scale = torch.where(scale <= 0, torch.ones_like(scale), scale)
    codes = rounded((groups - minimum.float()) / scale.float()).clamp(0, 2**bits - 1)
    codes = (codes.transpose(2, 3) if stride else codes).reshape(keys.shape)
    return codes, scale.squeeze(3), minimum.squeeze(3)


def _before_rounding(keys: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = keys.unflatten(2, (-1, group_size))
    low, high = groups.amin(3, keepdim=True), groups.amax(3, keepdim=True)
    scale = torch.where(high > low, (high - low) / (2**bits - 1), 1.0)
    return torch.round((groups - low) / scale).view(keys.shape), scale.squeeze(3).half(), low.squeeze(3).half()


def _by_token(keys, bits, group_size):
    size = keys.shape[3] // 2
    stored = kv.quantize(keys, Part(bits, "token", size))
    return grid.unpack_bits(stored.codes.flatten(), bits, keys.numel()).view(keys.shape), stored.scale, stored.minimum


KEY_MISTAKES: dict[str, dict] = {
    "the grid was made to hold 0. A channel that lies far off 0 then has few levels left for its values: let it reach from the "
    "least to the largest": {"zero": True},
    "the grid is symmetric around 0, and a channel that lies off 0 leaves most of it unused: let it reach from the least to the "
    "largest": {"symmetric": True},
    "there are 2**bits levels, so 2**bits - 1 steps between them": {"levels": 0},
    "the tokens of a group are not neighbors. The first group is the first group_size tokens: it must not wait for the last": {
        "stride": True
    },
    "all groups of a channel share one scale: later tokens would change what was stored of earlier ones": {"shared": (2,)},
    "heads share a scale: every head has channels of its own": {"shared": (1,)},
    "sequences of the batch share a scale": {"shared": (0,)},
}


def judge_keys(given: dict, got: dict, want: dict) -> Verdict:
    scale, shape = got["scale"], list(want["scale"].shape)
    keys, bits = given["keys"], given["bits"]
    if isinstance(scale, torch.Tensor) and scale.shape[:3] == keys.shape[:3] and scale.shape[3:] != keys.shape[3:]:
        said = "the groups run along the channels of a token. Keys are grouped along tokens, a channel apart from the next"
        return wrong(f"{said}: wanted {shape}")
    if isinstance(scale, torch.Tensor) and scale.ndim == 5 and scale.shape[3] == 1:
        return wrong(f"scale has shape {list(scale.shape)}: drop the axis of 1, wanted {shape}")
    finite = {k: v.nan_to_num() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in got.items()}
    if fault := shape_fault(finite, want):
        return wrong(fault)
    if not all(got[name].float().isfinite().all() for name in ("scale", "minimum", "codes")) or not (scale > 0).all():
        return wrong("a channel that holds one value all through its group gets scale 0, and its codes are 0 / 0: give it scale 1")
    for name in ("scale", "minimum"):
        if got[name].dtype != torch.float16:
            return wrong(f"{name} is {got[name].dtype}, wanted torch.float16, which is what is stored")
    codes, scale, minimum = got["codes"].float(), got["scale"].float(), got["minimum"].float()
    steps = 2**bits - 1
    if codes.min() < 0 or codes.max() > steps or (codes != codes.round()).any():
        return wrong(f"codes go from {codes.min().item():g} to {codes.max().item():g}, wanted whole numbers from 0 to {steps}")
    spread = keys.unflatten(2, (-1, given["group_size"]))
    alike = spread.amax(3) == spread.amin(3)  # its scale is anyone's choice
    # A float16 has 11 bits. The scale is rounded, and the range is taken from the least value as it is or as it is stored.
    wide = 2**-10 * want["scale"].float() + 2**-11 * want["minimum"].float().abs() / steps
    near_scale = ((scale - want["scale"].float()).abs() <= wide) | alike
    near_minimum = (minimum - want["minimum"].float()).abs() <= 2**-10 * want["minimum"].float().abs() + 1e-7
    if not (near_scale.all() and near_minimum.all()):
        for said, options in KEY_MISTAKES.items():
            _, theirs, least = (part.float() for part in _keys(**given, **options))
            same = ((scale - theirs).abs() <= 2**-10 * theirs + 2**-11 * least.abs() / steps) | alike
            if same.all() and torch.allclose(minimum, least, rtol=2**-9):
                return wrong(said)
        name = "scale" if not near_scale.all() else "minimum"
        place = [int(i) for i in (~near_scale if name == "scale" else ~near_minimum).nonzero()[0]]
        said = f"{name} of [batch, head, group, channel] {place} is {got[name][tuple(place)].item():.5g}"
        return wrong(f"{said}, wanted {want[name][tuple(place)].item():.5g}")
    # Codes are judged on the grid that was returned. Within 1e-3 of a tie float32 may take either side.
    exact = ((spread - minimum[:, :, :, None]) / scale[:, :, :, None]).clamp(0, steps)
    off = (codes.unflatten(2, (-1, given["group_size"])) - exact).abs()
    if off.max() <= 0.5 + 1e-3:
        return right()
    if torch.equal(codes.unflatten(2, (-1, given["group_size"])), exact.floor()):
        return wrong("the fraction is cut off: round to the nearest level")
    low = spread.amin(3, keepdim=True)
    unrounded = (spread - low) / ((spread.amax(3, keepdim=True) - low) / steps).where(~alike[:, :, :, None], torch.tensor(1.0))
    if (codes.unflatten(2, (-1, given["group_size"])) - unrounded).abs().max() <= 0.5 + 1e-3:
        said = "the codes were chosen before scale and minimum were rounded to float16. Whoever reads them has only what is stored"
        return wrong(f"{said}: choose by that")
    place = [int(i) for i in (off > 0.5 + 1e-3).nonzero()[0]]
    return wrong(f"a code lies {off.max().item():.2g} steps from its value, first in [batch, head, group, token, channel] {place}")


KEYS = Exercise(
    id="9.2", name="quantize_keys", title="Keys per channel", minutes=12, difficulty=3, points=4,
    returns=("codes", "scale", "minimum"), inputs=keys_inputs, reference=quantize_keys, judge=judge_keys,
    mutants=(
        *(Mutant(partial(_keys, **options), said[:40]) for said, options in KEY_MISTAKES.items()),
        Mutant(_by_token, "along the channels of a token"),
        Mutant(partial(_keys, rounded=torch.floor), "the fraction is cut off"),
        Mutant(_before_rounding, "before scale and minimum were rounded"),
        Mutant(partial(_keys, alike=False), "give it scale 1"),
        Mutant(lambda *given: tuple(t.float() for t in _keys(*given)), "wanted torch.float16"),
        Mutant(lambda *given: (_keys(*given)[0] - 1, *_keys(*given)[1:]), "codes go from -1"),
        Mutant(lambda *given: (_keys(*given)[0].flip(2), *_keys(*given)[1:]), "steps from its value"),
    ),
)  # fmt: skip


# 9.3 ------------------------------------------------------------------------------------------------------------------


def push_inputs(seed: int) -> dict:
    """A prompt that fills several blocks, then tokens one by one and in small lots; the residual is no multiple of the block.

    Beside it the sizes of two more runs: one that begins with fewer tokens than the residual, one without a residual.
    """
    g = generator(seed)
    block, residual = (4, 3, 5)[seed % 3], (7, 5, 11)[seed % 3]
    sizes = [3 * block + residual + 1, *[1] * (2 * block), 2 * block + 1, 1, 1]
    pieces = [torch.randn(2, 2, size, 3, generator=g) for size in sizes]
    return {
        "pieces": pieces,
        "residual": residual,
        "block": block,
        "short": [residual - 1, 1, 1, block],
        "even": [2 * block, 1, block],
    }


class Lot:
    """What `quantize` returns in 9.3 and 9.4: values that read back changed, in a way that shows when it is done twice."""

    def __init__(self, states: torch.Tensor):
        self.states = states

    def dequantize(self) -> torch.Tensor:
        return self.states / 2


def push(
    old: list, recent: torch.Tensor, new: torch.Tensor, residual: int, block: int, quantize: Callable
) -> tuple[list, torch.Tensor]:
    """labsupport's rule of who waits, with blocks in a list: all that have left the newest `residual` tokens, in whole blocks."""
    recent = torch.cat([recent, new], dim=2)
    ready = Part("fp8", residual=residual, block=block).stored(recent.shape[2])
    return ([*old, quantize(recent[:, :, :ready])] if ready else old), recent[:, :, ready:]


def drive_push(answer: Callable, given: dict) -> dict:
    """How many tokens wait after each call, how many quantize was given, what reads back after the prompt and at the end."""
    found = _fed(answer, given["pieces"], given["residual"], given["block"])
    waits = {}
    for name, residual in (("short", given["residual"]), ("even", 0)):
        pieces = torch.cat(given["pieces"], 2)[:, :, : sum(given[name])].split(given[name], 2)
        run = _fed(answer, pieces, residual, given["block"])
        waits |= {f"{name} waiting": run["waiting"], f"{name} read": run["read"]}
    return found | waits


def _fed(answer: Callable, pieces: Sequence[torch.Tensor], residual: int, block: int) -> dict:
    old, recent, held, waiting, quantized, read = [], pieces[0][:, :, :0], 0, [], [], []

    def quantize(states: torch.Tensor) -> Lot:
        if states.shape[2] % block or not states.shape[2]:
            said = f"quantize was given {states.shape[2]} of {held} tokens that wait, with residual {residual}"
            raise ValueError(f"{said}: wanted a multiple of the block, {block}, and more than 0")
        quantized.append(states.shape[2])
        return Lot(states.clone())

    for piece in pieces:
        held = recent.shape[2] + piece.shape[2]
        old, recent = answer(old, recent, piece.clone(), residual, block, quantize)
        waiting.append(recent.shape[2])
        read.append(torch.cat([*(lot.dequantize() for lot in old), recent], dim=2))
    return {"waiting": waiting, "quantized": sum(quantized), "first": read[0], "read": read[-1]}


def _push_from_the_end(old, recent, new, residual, block, quantize):
    """Right but for -0, which counts from the front."""
    recent = torch.cat([recent, new], dim=2)
    keep = residual + max(0, recent.shape[2] - residual) % block
    if recent.shape[2] <= keep:
        return old, recent
    return [*old, quantize(recent[:, :, :-keep])], recent[:, :, -keep:]


def _push_while_short(old, recent, new, residual, block, quantize):
    """Right but for a negative number of tokens, which counts from the end."""
    recent = torch.cat([recent, new], dim=2)
    ready = (recent.shape[2] - residual) // block * block
    return ([*old, quantize(recent[:, :, :ready])] if ready > 0 else old), recent[:, :, ready:]


def _push(old, recent, new, residual, block, quantize, rule=None, newest=False, again=False, swap=False, drop=False):
    recent = torch.cat([new, recent] if swap else [recent, new], dim=2)
    count = recent.shape[2]
    ready = max(0, count - residual) // block * block if rule is None else rule(count, residual, block)
    if not ready:
        return old, recent
    if newest:
        return [*old, quantize(recent[:, :, -ready:])], recent[:, :, :-ready]
    taken, left = recent[:, :, :ready], recent[:, :, ready:]
    if again:
        return [quantize(torch.cat([lot.dequantize() for lot in old] + [taken], dim=2))], left
    return [*old, quantize(taken)], left[:, :, -residual:] if drop else left


WAITING_MISTAKES: dict[str, Callable] = {
    "one block is taken at a time: a prompt may fill several at once, and then they never go": lambda n, r, b: (
        b if n - r >= b else 0
    ),
    "once a block is full, everything goes, the newest tokens too": lambda n, r, b: n // b * b if n - r >= b else 0,
    "the newest tokens do not wait: residual of them stay as they are": lambda n, r, b: n // b * b,
    "a block that is exactly full is left waiting": lambda n, r, b: max(0, n - r - 1) // b * b,
    "tokens wait until there are residual of them, and then all whole blocks go: the newest residual tokens stay in any case": (
        lambda n, r, b: n // b * b if n >= r else 0
    ),
}


def judge_push(given: dict, got: dict, want: dict) -> Verdict:
    sizes = [piece.shape[2] for piece in given["pieces"]]
    if got["waiting"] != want["waiting"]:
        for said, rule in WAITING_MISTAKES.items():
            if got["waiting"] == _waiting(sizes, given["residual"], given["block"], rule):
                return wrong(said)
        call = next(i for i, (a, b) in enumerate(zip(got["waiting"], want["waiting"], strict=True)) if a != b)
        fed = sum(sizes[: call + 1])
        said = f"after {fed} tokens {got['waiting'][call]} wait, wanted {want['waiting'][call]}"
        return wrong(f"{said} (residual {given['residual']}, blocks of {given['block']})")
    names = ("first", "read")
    if fault := shape_fault({name: got[name] for name in names}, {name: want[name] for name in names}):
        return wrong(f"{fault}: tokens were lost, or kept twice")
    if got["quantized"] > want["quantized"]:
        return wrong("what was quantized before is quantized again, and loses again: an old block is left as it is")
    if torch.equal(got["first"], want["first"]) and torch.equal(got["read"], want["read"]):
        for name, case in {"short": "as long as fewer tokens have come than may wait", "even": "with residual 0"}.items():
            have, wanted = (found[f"{name} waiting"] for found in (got, want))
            if have != wanted or not torch.equal(got[f"{name} read"], want[f"{name} read"]):
                return wrong(f"right until here, but not {case}: in lots of {given[name]} tokens {have} wait, wanted {wanted}")
        return right()
    prompt, waits = given["pieces"][0], want["waiting"][0]
    if torch.equal(got["first"][:, :, :-waits], prompt[:, :, waits:] / 2):
        return wrong("the newest tokens of the prompt are quantized while older ones wait: the oldest go first")
    place = int((got["read"] != want["read"]).any(3).any(0).any(0).nonzero()[0])
    return wrong(f"place {place} of what is read back holds another token: old tokens come before new ones")


def _waiting(sizes: list[int], residual: int, block: int, rule: Callable) -> list[int]:
    count, found = 0, []
    for size in sizes:
        count += size
        count -= rule(count, residual, block)
        found.append(count)
    return found


PUSH = Exercise(
    id="9.3", name="push", title="Who waits", minutes=10, difficulty=2, points=3,
    returns=("old", "recent"), inputs=push_inputs, reference=push, judge=judge_push, drive=drive_push,
    mutants=(
        *(Mutant(partial(_push, rule=rule), said[:30]) for said, rule in WAITING_MISTAKES.items()),
        Mutant(partial(_push, newest=True), "the oldest go first"),
        Mutant(partial(_push, again=True), "quantized again"),
        Mutant(partial(_push, swap=True), "holds another token"),
        Mutant(partial(_push, drop=True), "wait, wanted"),
        Mutant(_push_from_the_end, "with residual 0"),
        Mutant(_push_while_short, "as long as fewer tokens"),
        Mutant(partial(_push, rule=lambda n, r, b: (n - r) // b * b), "wanted a multiple of the block"),
        Mutant(lambda *given: _push(*given) if given[3] else (given[0], given[2]), "not with residual 0"),
        Mutant(lambda old, recent, new, r, b, q: ([*old, q(torch.cat([recent, new], 2))], recent[:, :, :0]), "a multiple of the"),
    ),
)  # fmt: skip


# 9.4 ------------------------------------------------------------------------------------------------------------------


def layer_inputs(seed: int) -> dict:
    """Keys and values of unlike size and length: a prompt, then tokens; and a prompt for a tiny model."""
    g = generator(seed)
    shapes = [(2, 3, size, 4) for size in (5, 1, 1, 2)]
    return {
        "keys": [torch.randn(shape, generator=g) for shape in shapes],
        "values": [10 + torch.randn(shape, generator=g) for shape in shapes],
        # One seed in five: generating takes longer than all the rest.
        "prompt": torch.randint(1, 64, (2, 6 if seed % 5 == 0 else 0), generator=g),
    }


@once
def _tiny() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model, g = LlamaForCausalLM(config).eval(), generator(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # large enough that attention is uneven, and a wrong position shows
                parameter.copy_(torch.randn(parameter.shape, generator=g) / parameter.shape[1] ** 0.5 * 2)
    return model


def _floats(thing: Any, seen: set[int]) -> int:
    """Numbers in floating-point tensors that an object holds on to, itself or in what it holds, lots of 9.4 left out."""
    if isinstance(thing, Lot) or id(thing) in seen:
        return 0
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        return thing.numel() if thing.is_floating_point() else 0
    if isinstance(thing, list | tuple | set):
        return sum(_floats(part, seen) for part in thing)
    if isinstance(thing, dict):
        return sum(_floats(part, seen) for part in thing.values())
    return _floats(vars(thing), seen) if hasattr(thing, "__dict__") and not callable(thing) else 0


@once
def _reference_layer() -> type:
    """A layer as `cache.QuantizedLayer` is one: it returns what it holds. transformers is imported when it is needed."""
    from transformers.cache_utils import DynamicLayer

    class CacheLayer(DynamicLayer):
        def __init__(self, quantize):
            super().__init__()
            self.quantize, self.old_keys, self.old_values = quantize, [], []

        def update(self, key_states, value_states, *args, **kwargs):
            self.old_keys.append(self.quantize(key_states))
            self.old_values.append(self.quantize(value_states))
            return tuple(torch.cat([lot.dequantize() for lot in old], 2) for old in (self.old_keys, self.old_values))

        def get_seq_length(self):
            return sum(lot.dequantize().shape[2] for lot in self.old_keys)

    return CacheLayer


def reference_layer(quantize: Callable):
    return _reference_layer()(quantize)


def drive_layer(answer: Callable, given: dict) -> dict:
    """What each update returns, the lengths, the floats kept, and what a tiny model generates with such layers."""
    from transformers.cache_utils import Cache, DynamicLayer

    layer, found = answer(Lot), {}
    if not isinstance(layer, DynamicLayer):
        raise TypeError(f"CacheLayer(quantize) is a {type(layer).__name__}, wanted a subclass of DynamicLayer")
    lengths = [layer.get_seq_length()]
    for number, (keys, values) in enumerate(zip(given["keys"], given["values"], strict=True)):
        read = layer.update(keys.clone(), values.clone())
        if not isinstance(read, tuple | list) or len(read) != 2:
            raise ValueError(f"update returned a {type(read).__name__}, wanted keys and values")
        found |= {f"keys {number}": read[0], f"values {number}": read[1]}
        lengths.append(layer.get_seq_length())
    found |= {"lengths": lengths, "floats": _floats(layer, set())}
    if not given["prompt"].numel():
        return found | {"generated": [], "said": ""}
    model = _tiny()
    layers = [answer(Lot) for _ in range(model.config.num_hidden_layers)]
    try:
        tokens = model.generate(given["prompt"], past_key_values=Cache(layers=layers), max_new_tokens=6, do_sample=False)
        found["generated"] = tokens[:, given["prompt"].shape[1] :].tolist()
    except (RuntimeError, ValueError, IndexError) as error:
        found["generated"] = [[-1]]
        found["said"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return {"said": ""} | found


def judge_layer(given: dict, got: dict, want: dict) -> Verdict:
    keys, values = given["keys"], given["values"]
    for number in range(len(keys)):
        for name, fed in (("keys", keys), ("values", values)):
            found, wanted = got[f"{name} {number}"], want[f"{name} {number}"]
            if isinstance(found, torch.Tensor) and found.shape != wanted.shape and found.shape == fed[number].shape:
                return wrong(f"update returns the new {name} alone: attention needs those of all tokens so far")
            if fault := shape_fault({f"{name} after update {number + 1}": found}, {f"{name} after update {number + 1}": wanted}):
                return wrong(fault)
            if torch.equal(found, wanted):
                continue
            last, all_of = fed[number].shape[2], torch.cat(fed[: number + 1], dim=2)
            stored = torch.equal(got[f"{name} 1"][:, :, :last], fed[0] / 2)  # by the next update, at least
            if torch.equal(found, all_of) and not (number == 0 and stored):
                return wrong("nothing was quantized: update returns keys and values as they came")
            if torch.equal(found[:, :, -last:], fed[number]):
                said = "what update returns for the new tokens is what came, not what is stored"
                return wrong(f"{said}. A prompt is then read as if there were no quantization: nothing is measured")
            if torch.equal(found, torch.cat((values if name == "keys" else keys)[: number + 1], dim=2) / 2):
                return wrong("keys and values have changed places")
            if number and (found[:, :, 0] == fed[0][:, :, 0] / 4).all():
                return wrong("what was stored before is quantized again at every update, and loses again each time")
            if torch.equal(found.sort(2).values, wanted.sort(2).values):
                return wrong(f"{name} come back in another order than they came: new tokens stand after old ones")
            return wrong(f"{name} after update {number + 1} are off by up to {largest_difference(found, wanted):.3g}")
    if got["lengths"] != want["lengths"]:
        said = f"get_seq_length says {got['lengths']} after each update, wanted {want['lengths']}"
        return wrong(f"{said}. New tokens take their positions from it")
    if got["floats"]:
        return wrong(f"the layer holds on to {got['floats']} floats beside what quantize returned: then nothing is saved")
    if got["said"]:
        return wrong(f"generate failed: {got['said']}")
    if got["generated"] != want["generated"]:
        return wrong(f"generate gives the tokens {got['generated']}, wanted {want['generated']}")
    return right()


def _layer(returns=None, length=None, keep=False, again=False, swap=False, front=False):
    """A class of layers with what can go wrong as options, made when it is called: transformers is imported late."""

    def make(quantize):
        class Layer(_reference_layer()):
            def update(self, key_states, value_states, *args, **kwargs):
                before = [lot.dequantize() for lot in self.old_keys], [lot.dequantize() for lot in self.old_values]
                if again and before[0]:
                    key_states, value_states = (
                        torch.cat([*b, new], 2) for b, new in zip(before, (key_states, value_states), strict=True)
                    )
                    self.old_keys, self.old_values = [], []
                read = super().update(key_states, value_states)
                if keep:
                    self.keys, self.values = key_states, value_states
                if front:
                    self.old_keys.insert(0, self.old_keys.pop())
                    self.old_values.insert(0, self.old_values.pop())
                    read = tuple(torch.cat([lot.dequantize() for lot in old], 2) for old in (self.old_keys, self.old_values))
                if returns is not None:
                    read = returns(before, (key_states, value_states), read)
                return read[::-1] if swap else read

            def get_seq_length(self):
                return super().get_seq_length() if length is None else length(self)

        return Layer(quantize)

    return make


def _as_they_came(before, new, read):
    return tuple(torch.cat([*old, states], 2) for old, states in zip(before, new, strict=True))


LAYER = Exercise(
    id="9.4", name="CacheLayer", title="A cache that generate accepts", minutes=15, difficulty=3, points=4,
    returns=("layer",), inputs=layer_inputs, reference=reference_layer, judge=judge_layer, drive=drive_layer,
    mutants=(
        Mutant(_layer(_as_they_came), "for the new tokens"),
        Mutant(_layer(lambda before, new, read: tuple(n / 2 for n in new)), "update returns the new keys alone"),
        Mutant(_layer(lambda before, new, read: tuple(2 * r for r in read)), "nothing was quantized"),
        Mutant(_layer(swap=True), "changed places"),
        Mutant(_layer(again=True), "quantized again at every update"),
        Mutant(_layer(front=True), "in another order"),
        Mutant(_layer(length=lambda layer: 0), "get_seq_length says [0, 0, 0, 0, 0]"),
        Mutant(_layer(length=lambda layer: len(layer.old_keys)), "get_seq_length says [0, 1, 2, 3, 4]"),
        Mutant(_layer(keep=True), "then nothing is saved"),
        Mutant(_layer(lambda before, new, read: read[0]), "wanted keys and values"),
        Mutant(lambda quantize: quantize, "wanted a subclass of DynamicLayer"),
    ),
)  # fmt: skip


# 9.5 ------------------------------------------------------------------------------------------------------------------

WIDTH = 8


def plant_inputs(seed: int) -> dict:
    """Three heads of queries on each of two of keys, or two on each of three; a factor for each pair, other in each head."""
    g = generator(seed)
    heads = (2, 3)[seed % 2]
    scale = 1 + 9 * torch.rand(heads, WIDTH // 2, generator=g)
    return {"queries": torch.randn(6 * WIDTH, 11, generator=g), "keys": torch.randn(heads * WIDTH, 11, generator=g), "scale": scale}


def plant(queries: torch.Tensor, keys: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """labsupport's planting, on the weights of two projections."""
    layers = [nn.Linear(weight.shape[1], weight.shape[0], bias=False) for weight in (queries, keys)]
    for layer, weight in zip(layers, (queries, keys), strict=True):
        layer.weight.copy_(weight)
    models.scale_keys(*layers, scale)
    return layers[0].weight.detach(), layers[1].weight.detach()


def _planted(queries, keys, scale, adjacent=False, tiled=False, invert=True, swap=False, both=True, half=False, keys_only=False):
    rows = scale.repeat_interleave(2, 1) if adjacent else torch.cat([scale, torch.ones_like(scale) if half else scale], 1)
    shared = queries.shape[0] // keys.shape[0]
    read = rows.repeat(shared, 1) if tiled else rows.repeat_interleave(shared, 0)
    read, rows = read.reshape(-1, 1), rows.reshape(-1, 1)
    if keys_only:
        return queries.clone(), keys * rows
    if swap:
        return queries * read, keys / rows
    return (queries / read if invert else queries * read), keys * rows


PLANT_MISTAKES: dict[str, dict] = {
    "the pairs are neighbors, 0 and 1, 2 and 3. In transformers' Llama channel i is rotated together with i + width / 2; neighbors "
    "have different factors then, and rotation mixes them": {"adjacent": True},
    "heads of queries were given the factors of heads of keys in turns. Those that share a head of keys stand side by side: with "
    "two on each, queries 0 and 1 belong to keys 0": {"tiled": True},
    "queries were multiplied as well: q . k is then another number. Divide them": {"invert": False},
    "queries were made loud and keys quiet, wanted it the other way around: keys are what is stored": {"swap": True},
    "only the first channel of each pair was multiplied: after the rotation the two are mixed, and no factor of the query takes "
    "that back": {"half": True},
    "queries are as they were, so q . k has changed": {"keys_only": True},
}


def judge_plant(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    off = max(((got[name].float() - want[name]).abs() / want[name].abs()).max().item() for name in want)
    if off <= 2**-22:  # a reciprocal and a product, or one division
        return right(off, 2**-22)
    for said, options in PLANT_MISTAKES.items():
        mistaken = _planted(**given, **options)
        if all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(got.values(), mistaken, strict=True)):
            return wrong(said)
    name = next(name for name in want if not torch.allclose(got[name].float(), want[name], rtol=1e-5))
    ratio = (got[name].float() / given[name]).mean(1)
    wanted = (want[name] / given[name]).mean(1)
    row = int((ratio - wanted).abs().argmax())
    head, channel = divmod(row, WIDTH)
    return wrong(f"channel {channel} of head {head} of the {name} was multiplied by {ratio[row]:.3f}, wanted {wanted[row]:.3f}")


PLANT = Exercise(
    id="9.5", name="plant", title="Loud keys, the same model", minutes=12, difficulty=3, points=3,
    returns=("queries", "keys"), inputs=plant_inputs, reference=plant, judge=judge_plant,
    mutants=(
        *(Mutant(partial(_planted, **options), said[:40]) for said, options in PLANT_MISTAKES.items()),
        Mutant(lambda q, k, s: _planted(q, k, s.sqrt()), "was multiplied by"),
        Mutant(lambda q, k, s: _planted(q, k, s.flip(0)), "was multiplied by"),
        Mutant(lambda q, k, s: _planted(q, k, s)[::-1], "has shape"),
    ),
)  # fmt: skip


# 9.6 ------------------------------------------------------------------------------------------------------------------


def add_inputs(seed: int) -> dict:
    """Documents of unequal length and difficulty, some with nothing scored; the two kinds of damage make each other worse."""
    g = generator(seed)
    tokens = torch.randint(5, 400, (30,), generator=g)
    tokens[torch.randint(30, (2,), generator=g)] = 0
    level = 2 + torch.rand(30, generator=g, dtype=torch.float64)

    def noise() -> torch.Tensor:
        return torch.rand(30, generator=g, dtype=torch.float64)

    weights, cache = 0.3 + 0.2 * noise(), 0.2 + 0.1 * noise()
    extra = 0.08 * (noise() - 0.2)
    losses = {"neither": level, "weights": level + weights, "cache": level + cache, "both": level + weights + cache + extra}
    draws = torch.randint(30, (300, 30), generator=g)
    return {"losses": {name: loss * tokens for name, loss in losses.items()}, "tokens": tokens, "draws": draws}


def interaction(losses: dict[str, torch.Tensor], tokens: torch.Tensor, draws: torch.Tensor) -> tuple[float, float, float]:
    """labsupport's: what both cost beyond the sum, in nats a token, and its interval."""
    from labsupport.pipeline import cache

    found = cache.interaction(losses, tokens, draws)
    return found.change, found.low, found.high


def _added(losses, tokens, draws, extra=None, weighted=True, perplexity=False, level=0.95, apart=False):
    both, weights, cache, neither = (losses[name] for name in ("both", "weights", "cache", "neither"))
    if perplexity:

        def rise(loss, pick=slice(None)):
            return ((loss[pick].sum(-1) - neither[pick].sum(-1)) / tokens[pick].sum(-1)).exp() - 1

        found = [rise(both, pick) - rise(weights, pick) - rise(cache, pick) for pick in (slice(None), draws)]
        return _ends(*found, level)
    beyond = both - weights - cache + neither if extra is None else extra(losses)
    if not weighted:
        each = (beyond / tokens).nan_to_num()
        return _ends(each.mean(), each[draws].mean(1), level)
    drawn = beyond[draws].sum(1) / tokens[draws].sum(1)
    if apart:
        moved = draws.roll(1, 0)
        drawn = (both[draws].sum(1) - weights[moved].sum(1) - cache[draws].sum(1) + neither[moved].sum(1)) / tokens[draws].sum(1)
    return _ends(beyond.sum() / tokens.sum(), drawn, level)


def _ends(value, drawn, level):
    tail = (1 - level) / 2
    low, high = torch.quantile(drawn, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return value.item(), low, high


ADD_MISTAKES: dict[str, dict] = {
    "the rises in percent were subtracted. They do not add up even where the damage does: two rises of 10 % make 21 %. Subtract "
    "losses": {"perplexity": True},
    "the loss of the model without any damage was taken out twice: each of the other losses holds it once": {
        "extra": lambda x: x["both"] - x["weights"] - x["cache"]
    },
    "this is what both cost together. Take out what each costs alone": {"extra": lambda x: x["both"] - x["neither"]},
    "the sign is turned around: a positive number is to say that both together cost more than the sum": {
        "extra": lambda x: -(x["both"] - x["weights"] - x["cache"] + x["neither"])
    },
    "every document counts alike, however short. Divide the sum of nats by the sum of tokens": {"weighted": False},
    "this is what the cache adds to quantized weights, whatever it costs by itself": {"extra": lambda x: x["both"] - x["weights"]},
}


def judge_add(given: dict, got: dict, want: dict) -> Verdict:
    if fault := shape_fault(got, want):
        return wrong(fault)
    names, allowed = list(want), 1e-6  # of some hundredths of a nat: all in float32 comes within 3e-7
    off = max(abs(got[name] - want[name]) for name in names)
    if off <= allowed:
        return right(off, allowed)
    if not all(got[name] == got[name] for name in names):
        return wrong("it is NaN: a document without tokens has no mean of its own. Sum over documents before you divide")
    for said, options in ADD_MISTAKES.items():
        if abs(got["extra"] - _added(**given, **options)[0]) <= 2 * allowed:
            return wrong(said)
    if abs(got["extra"] - want["extra"]) > allowed:
        return wrong(f"extra is {got['extra']:.6f}, wanted {want['extra']:.6f} nats a token")
    if got["low"] > got["high"]:
        return wrong("low and high have changed places")
    for level in (0.9, 0.99, 0.8, 0.5):
        if abs(got["low"] - _added(**given, level=level)[1]) <= 2 * allowed:
            return wrong(f"this is an interval of {level:.0%}, wanted 95 %: 2.5 % of the draws on either side")
    if got["high"] - got["low"] > 2 * (want["high"] - want["low"]):
        return wrong("the interval is several times too wide: all four losses must come from the same draw of documents")
    return wrong(
        f"extra is right, the interval is [{got['low']:.6f}, {got['high']:.6f}], wanted [{want['low']:.6f}, {want['high']:.6f}]"
    )


ADD = Exercise(
    id="9.6", name="interaction", title="Is the damage additive?", minutes=12, difficulty=3, points=4,
    returns=("extra", "low", "high"), inputs=add_inputs, reference=interaction, judge=judge_add,
    mutants=(
        *(Mutant(partial(_added, **options), said[:30]) for said, options in ADD_MISTAKES.items()),
        Mutant(partial(_added, apart=True), "the same draw of documents"),
        Mutant(partial(_added, level=0.9), "an interval of 90%"),
        Mutant(lambda *given: (_added(*given)[0], *_added(*given)[:0:-1]), "changed places"),
        Mutant(lambda *given: (_added(*given)[0] * 1.1, *_added(*given)[1:]), "nats a token"),
    ),
)  # fmt: skip


EXERCISES = (BYTES, KEYS, PUSH, LAYER, PLANT, ADD)
