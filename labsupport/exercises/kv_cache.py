"""Chapter 9: what a cache weighs, which way a group runs, who waits, a layer for `generate`, where a factor cancels, and a sum."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache as once
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from labsupport.exercises.compare import got_and_wanted
from labsupport.exercises.form import Exercise, Fault, Mistake, Mutant, Outputs, generator, mistakes_by_option, mistakes_of, right
from labsupport.model import models
from labsupport.quant import grid, kv
from labsupport.quant.kv import Part


# 9.1 ------------------------------------------------------------------------------------------------------------------
def bytes_inputs(seed: int) -> dict:
    """Four kinds of attention, as their config.json says it; the widths of heads do not always follow from hidden_size."""
    r = random.Random(seed)
    layers, heads, width = r.choice((7, 9)), 4 * r.randrange(3, 6), 8 * r.randrange(5, 9)
    common = {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": heads * width}
    configs = {
        "MHA": common,
        "GQA": common | {"num_key_value_heads": heads // 4},
        "GQA with wide heads": common | {"num_key_value_heads": heads // 2, "head_dim": 2 * width},
        "MLA": common | {"num_key_value_heads": heads, "kv_lora_rank": 3 * width, "qk_rope_head_dim": 18},
    }
    return {"configs": configs, "tokens": 301 + seed, "batch": (11, 13)[seed % 2]}


def cache_bytes(config: dict[str, int], tokens: int, batch: int) -> int:
    """labsupport's formula for a cache in 16 bits."""
    return kv.cache_bytes(kv.Shape.of(SimpleNamespace(**config)), tokens, batch)


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


BYTES = Exercise(
    id="9.1", name="cache_bytes", title="What a cache weighs", minutes=10, difficulty=2, points=3,
    returns=("bytes",), inputs=bytes_inputs, reference=cache_bytes,
    drive=lambda answer, given: {name: answer(dict(c), given["tokens"], given["batch"]) for name, c in given["configs"].items()},
    about=lambda given, want, name, place: f"bytes of {name}, {given['configs'][name]}",
    # A division by a unit rounds.
    alike=lambda given, got, theirs: all(abs(got[name] - value) <= 1e-15 * value for name, value in theirs.items()),
    mistakes=(
        Mistake("this is one sequence: a batch has a cache for each", lambda config, tokens, batch: _counted(config, tokens, 1)),
        *(Mistake(f"this is in {unit}, wanted bytes", lambda *given, size=size: _counted(*given) / size)
          for unit, size in {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "GB": 1e9, "MB": 1e6}.items()),
        *mistakes_by_option(_counted, {
            "half of it is missing: a token leaves a key and a value": {"both": 1},
            "every head of queries was given keys and values of its own: with grouped-query attention they are "
            "num_key_value_heads": {"shared": False},
            "the width of a head was taken from hidden_size. Where the config says head_dim, that is the width": {"wide": False},
            "this is the cache of one layer": {"layers": False},
            "these are numbers, wanted bytes: 16 bits are two": {"per_value": 1},
            "these are bits, wanted bytes: 16 bits are two": {"per_value": 16},
            "MLA was counted like the others. It keeps a latent vector of kv_lora_rank for all heads together, and makes keys and "
            "values of it when they are read": {"latent": False},
            "the rotated key of qk_rope_head_dim is missing from MLA's: it is kept beside the latent vector": {"rope": False},
            "MLA's latent vector was counted twice. Keys and values are made from one and the same": {"latent_both": 2},
            "MLA's latent vector was counted for every head. All heads share one": {"latent_heads": True},
        }),
    ),
    others=(Mutant(lambda config, tokens, batch: _counted(config, tokens + 1, batch), "bytes of MHA, {"),),
)  # fmt: skip


# 9.2 ------------------------------------------------------------------------------------------------------------------
def keys_inputs(seed: int) -> dict:
    """Channels far off zero, loud, tiny, constant, and all negative; heads that differ. No two sizes are alike."""
    g = generator(seed)
    keys = torch.randn(3, 5, 42, 12, generator=g)
    keys += torch.randn(1, 5, 1, 12, generator=g)
    keys[..., 1] += 300  # so far off that float16 rounds its minimum by a good part of a step
    keys[..., 4] *= 30
    keys[..., 6] *= 1e-2
    keys[..., 8] = 1.5
    keys[..., 9] = -keys[..., 9].abs() - 3
    group_size = (7, 6)[seed // 2 % 2]
    keys[:, :, group_size : 2 * group_size, 2] = 0
    return {"keys": keys, "bits": (4, 2)[seed % 2], "group_size": group_size}


def quantize_keys(keys: torch.Tensor, bits: int, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """labsupport's keys per channel, taken apart: codes, scale and minimum."""
    stored = kv.quantize(keys, Part(bits, "channel", group_size))
    codes = grid.unpack_bits(stored.codes.flatten(), bits, keys.numel()).view(keys.shape)
    assert stored.scale is not None  # fp8 alone has neither
    assert stored.minimum is not None
    return codes, stored.scale, stored.minimum


def _keys(
    keys, bits, group_size, ends=lambda low, high: (low, high), levels=1, rounded=torch.round, stride=False, alike=True, stored=True
):  # fmt: skip
    """Keys per channel with what can go wrong as options. ends(low, high): where the grid of a group begins and ends."""
    groups = keys.unflatten(2, (group_size, -1)).transpose(2, 3) if stride else keys.unflatten(2, (-1, group_size))
    low, high = ends(groups.amin(3, keepdim=True), groups.amax(3, keepdim=True))
    minimum = low.half() if stored else low
    scale = (high - minimum.float()) / (2**bits - levels)
    scale = scale.half() if stored else scale
    if alike:
        scale = torch.where(scale <= 0, torch.ones_like(scale), scale)
    codes = rounded((groups - minimum.float()) / scale.float()).clamp(0, 2**bits - 1)
    codes = (codes.transpose(2, 3) if stride else codes).reshape(keys.shape)
    return codes, scale.squeeze(3).half(), minimum.squeeze(3).half()


def _shared(axis):
    return lambda low, high: (low.amin(axis, keepdim=True).expand_as(low), high.amax(axis, keepdim=True).expand_as(high))


def _grouped(given: Outputs, of: torch.Tensor) -> torch.Tensor:
    return of.unflatten(2, (-1, given["group_size"]))  # [batch, heads, groups, group_size, channels]


def _near(given: Outputs, got: Outputs, want: Outputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Where scale and minimum are those of `want` but for rounding, bool [batch, heads, groups, channels].

    A float16 has 11 bits. The scale is rounded, and the range is taken from the least value as it is or as it is stored. Where
    all values are alike the scale is the learner's choice.
    """
    alike = (values := _grouped(given, given["keys"])).amax(3) == values.amin(3)
    scale, minimum = want["scale"].float(), want["minimum"].float()
    allowed = 2**-10 * scale + 2**-11 * minimum.abs() / (2 ** given["bits"] - 1)
    near_minimum = (got["minimum"].float() - minimum).abs() <= 2**-10 * minimum.abs() + 1e-7
    return ((got["scale"].float() - scale).abs() <= allowed) | alike & (got["scale"] >= 0), near_minimum


def _steps_off(given: Outputs, got: Outputs) -> torch.Tensor:
    """How many steps each value lies from its code, on the grid that was returned; 0 where that has a scale of 0. As keys."""
    codes, scale = _grouped(given, got["codes"].float()), got["scale"].float()[:, :, :, None]
    exact = ((_grouped(given, given["keys"]) - got["minimum"].float()[:, :, :, None]) / scale).clamp(0, 2 ** given["bits"] - 1)
    return (codes - exact).abs().where(scale != 0, torch.tensor(0.0)).flatten(2, 3)


def _keys_off(given: Outputs, got: Outputs, want: Outputs) -> str:
    for name, near in zip(("scale", "minimum"), _near(given, got, want), strict=True):
        if not near.all():
            place = tuple((~near).nonzero()[0].tolist())
            values = got_and_wanted(got[name][place].item(), want[name][place].item())
            return f"{name} of [batch, head, group, channel] {list(place)}: {values}"
    place = tuple(((off := _steps_off(given, got)) > 0.5 + 1e-3).nonzero()[0].tolist())
    where = f"code {got['codes'][place].item()} of [batch, head, token, channel] {list(place)}"
    return f"{where} lies {off[place].item():.3g} steps from its value, wanted half a step at most"


KEYS = Exercise(
    id="9.2", name="quantize_keys", title="Keys per channel", minutes=12, difficulty=3, points=4,
    returns=("codes", "scale", "minimum"), inputs=keys_inputs, reference=quantize_keys, dtypes=("scale", "minimum"),
    # Codes are judged on the grid that was returned. Within 1e-3 of a tie float32 may take either side.
    accepts=lambda given, got, want: (right() if all(near.all() for near in _near(given, got, want))
                                      and _steps_off(given, got).max() <= 0.5 + 1e-3 else None),
    # A scale that is rounded otherwise moves a few codes.
    alike=lambda given, got, theirs: (all(near.all() for near in _near(given, got, theirs))
                                      and (got["codes"] != theirs["codes"]).float().mean() <= 0.02),
    otherwise=_keys_off, hint="Keys are grouped along tokens, each channel apart: [batch, heads, groups, width], no axis of 1",
    faults=(
        Fault("a channel that holds one value all through its group gets scale 0, and its codes are 0 / 0: give it scale 1",
              lambda given, got, want: all(got[name].shape == want[name].shape for name in want)
              and (_grouped(given, got["codes"]).isnan().all(3) & (got["scale"] == 0)).any(),
              (partial(_keys, alike=False),), early=True),
        Fault("codes go from {low} to {high}, wanted whole numbers from 0 to {steps}",
              lambda given, got, want: (got["codes"].min() < 0 or got["codes"].max() >= 2 ** given["bits"])
              and {"low": int(got["codes"].min()), "high": int(got["codes"].max()), "steps": 2 ** given["bits"] - 1},
              (lambda *given: (_keys(*given)[0] - 1, *_keys(*given)[1:]),)),
    ),
    mistakes=mistakes_by_option(_keys, {
        "the grid was made to hold 0. A channel that lies far off 0 then has few levels left for its values: let it reach from the "
        "least to the largest": {"ends": lambda low, high: (low.clamp(max=0), high.clamp(min=0))},
        "the grid is symmetric around 0, and a channel that lies off 0 leaves most of it unused: let it reach from the least to "
        "the largest": {"ends": lambda low, high: (-(far := torch.maximum(high, -low)), far)},
        "there are 2**bits levels, so 2**bits - 1 steps between them": {"levels": 0},
        "the tokens of a group are not neighbors. The first group is the first group_size tokens: it must not wait for the last": {
            "stride": True},
        "all groups of a channel share one scale: later tokens would change what was stored of earlier ones": {"ends": _shared(2)},
        "heads share a scale: every head has channels of its own": {"ends": _shared(1)},
        "sequences of the batch share a scale": {"ends": _shared(0)},
        "the fraction is cut off: round to the nearest level": {"rounded": torch.floor},
        "the codes were chosen before scale and minimum were rounded to float16. Whoever reads them has only what is stored: "
        "choose by that": {"stored": False},
    }),
    others=(
        Mutant(lambda keys, bits, _: tuple(t.transpose(2, 3) for t in _keys(keys.transpose(2, 3), bits, 6)), "along tokens"),
        Mutant(lambda *given: tuple(t.float() for t in _keys(*given)), "wanted torch.float16"),
        Mutant(lambda *given: (_keys(*given)[0].flip(2), *_keys(*given)[1:]), "steps from its value"),
        Mutant(lambda *given: (*_keys(*given)[:2], _keys(*given)[2] + 1), "minimum of [batch, head, group, channel]"),
    ),
)  # fmt: skip


# 9.3 ------------------------------------------------------------------------------------------------------------------
def push_inputs(seed: int) -> dict:
    """Runs, by name, with a residual and numbers of tokens that come: a prompt that fills several blocks, then small lots."""
    g = generator(seed)
    block, residual = (4, 3, 5)[seed % 3], (7, 5, 11)[seed % 3]
    runs = {
        f"residual {residual}": (residual, [3 * block + residual + 1, *[1] * (block + 1), 2 * block + 1, 1]),
        f"residual {residual}, few tokens at first": (residual, [residual - 1, 1, 1, block]),
        "residual 0": (0, [2 * block, 1, block]),
    }
    count = sum(runs[f"residual {residual}"][1])
    return {"tokens": torch.randn(2, 6, count, 8, generator=g), "block": block, "runs": runs}


class Lot:
    """What `quantize` returns in 9.3 and 9.4: values that read back changed, in a way that shows when it is done twice."""

    def __init__(self, states: torch.Tensor):
        self.states = states

    def dequantize(self) -> torch.Tensor:
        return self.states / 2


def push(old: list, recent: torch.Tensor, new: torch.Tensor, residual: int, block: int, quantize: Callable) -> tuple:
    """labsupport's rule of who waits, with blocks in a list: all that have left the newest `residual` tokens, in whole blocks."""
    recent = torch.cat([recent, new], dim=2)
    ready = Part("fp8", residual=residual, block=block).stored(recent.shape[2])
    return ([*old, quantize(recent[:, :, :ready])] if ready else old), recent[:, :, ready:]


def drive_push(answer: Callable, given: dict) -> dict:
    """For each run how many tokens wait after each call, and what reads back at the end."""
    found: dict[str, Any] = {}
    block = given["block"]

    def quantize(states: torch.Tensor) -> Lot:
        if states.shape[2] % block or not states.shape[2]:
            wanted = f"wanted a multiple of the block, {block}, and more than 0"
            raise ValueError(f"quantize was given {states.shape[2]} of {fed} tokens, with residual {residual}: {wanted}")
        return Lot(states.clone())

    for run, (residual, sizes) in given["runs"].items():
        old: list[Lot] = []
        recent, waiting, fed = given["tokens"][:, :, :0], {}, 0
        for piece in given["tokens"][:, :, : sum(sizes)].split(sizes, 2):
            fed += piece.shape[2]
            old, recent = answer(old, recent, piece.clone(), residual, block, quantize)
            waiting[f"after {fed} tokens"] = recent.shape[2]
        read = torch.cat([*(lot.dequantize() for lot in old), recent], dim=2)
        found |= {f"waiting ({run}, blocks of {block})": waiting, f"read ({run}, blocks of {block})": read}
    return found


def _push(
    old, recent, new, residual, block, quantize, rule=lambda n, residual, block: max(0, n - residual) // block * block,
    newest=False, again=False, swap=False, drop=False, end=False, short=False,
):  # fmt: skip
    """The rule with what can go wrong as options. rule(tokens, residual, block): how many are quantized."""
    recent = torch.cat([new, recent] if swap else [recent, new], dim=2)
    count = recent.shape[2]
    ready = rule(count, residual, block)
    if not ready or (short and ready < 0):  # recent[:, :, ready:] of a negative number counts from the end
        return old, recent[:, :, ready:]
    if newest:
        return [*old, quantize(recent[:, :, -ready:])], recent[:, :, :-ready]
    place = ready - count if end else ready  # -0 counts from the front
    taken, left = recent[:, :, :place], recent[:, :, place:]
    if again:
        return [quantize(torch.cat([lot.dequantize() for lot in old] + [taken], dim=2))], left
    return [*old, quantize(taken)], left[:, :, -residual:] if drop else left


PUSH = Exercise(
    id="9.3", name="push", title="Who waits", minutes=10, difficulty=2, points=3,
    returns=("old", "recent"), inputs=push_inputs, reference=push, drive=drive_push,
    hint="Tokens were lost, or kept twice",
    mistakes=mistakes_by_option(_push, {
        "one block is taken at a time: a prompt may fill several at once, and then they never go": {
            "rule": lambda n, r, b: b if n - r >= b else 0},
        "once a block is full, everything goes, the newest tokens too": {"rule": lambda n, r, b: n // b * b if n - r >= b else 0},
        "the newest tokens do not wait: residual of them stay as they are": {"rule": lambda n, r, b: n // b * b},
        "a block that is exactly full is left waiting": {"rule": lambda n, r, b: max(0, n - r - 1) // b * b},
        "tokens wait until there are residual of them, and then all whole blocks go: the newest residual tokens stay in any case": {
            "rule": lambda n, r, b: n // b * b if n >= r else 0},
        "the newest tokens of the prompt are quantized while older ones wait: the oldest go first": {"newest": True},
        "new tokens stand before old ones: what is read back begins with the oldest": {"swap": True},
        "what was quantized before is quantized again, and loses again: an old block is left as it is": {"again": True},
    }),
    others=(
        Mutant(partial(_push, drop=True), "Tokens were lost"), Mutant(partial(_push, end=True), "with residual 0"),
        Mutant(partial(_push, rule=lambda n, r, b: (n - r) // b * b, short=True), "few tokens at first, blocks of"),
        Mutant(partial(_push, rule=lambda n, r, b: (n - r) // b * b), "wanted a multiple of the block"),
    ),
)  # fmt: skip


# 9.4 ------------------------------------------------------------------------------------------------------------------
def layer_inputs(seed: int) -> dict:
    """Keys and values of unlike size and length: a prompt, then tokens; and for one seed in ten a prompt for a tiny model."""
    g = generator(seed)
    shapes = [(2, 3, size, 4) for size in (5, 1, 1, 6)]
    return {
        "keys": [torch.randn(shape, generator=g) for shape in shapes],
        "values": [10 + torch.randn(shape, generator=g) for shape in shapes],
        # Generating takes longer than all the rest.
        "prompt": torch.randint(1, 64, (2, 7 if seed % 10 == 4 else 0), generator=g),
    }


@once
def _tiny() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        initializer_range=0.5,  # large enough that attention is uneven, and a wrong position shows
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def reference_layer(quantize: Callable):
    """A layer as `cache.QuantizedLayer` is one: it returns what it holds. transformers is imported when it is needed."""
    from transformers.cache_utils import DynamicLayer

    class CacheLayer(DynamicLayer):
        old_keys = ()
        old_values = ()

        def update(self, key_states, value_states, *args, **kwargs):
            self.old_keys = [*self.old_keys, quantize(key_states)]
            self.old_values = [*self.old_values, quantize(value_states)]
            return tuple(torch.cat([lot.dequantize() for lot in old], 2) for old in (self.old_keys, self.old_values))

        def get_seq_length(self):
            return sum(lot.dequantize().shape[2] for lot in self.old_keys)

    return CacheLayer()


def drive_layer(answer: Callable, given: dict) -> dict:
    """What each update returns, the lengths, the floats kept, and the tokens that a tiny model generates with such layers."""
    from transformers.cache_utils import Cache, DynamicLayer

    found: dict[str, Any] = {}
    layer = answer(Lot)
    if not isinstance(layer, DynamicLayer):
        raise TypeError(f"CacheLayer(quantize) is a {type(layer).__name__}, wanted a subclass of DynamicLayer")
    for number, (keys, values) in enumerate(zip(given["keys"], given["values"], strict=True), 1):
        read = layer.update(keys.clone(), values.clone())
        if not isinstance(read, tuple | list) or len(read) != 2:
            raise ValueError(f"update returned a {type(read).__name__}, wanted keys and values")
        found |= {f"keys after update {number}": read[0], f"values after update {number}": read[1]}
        found[f"get_seq_length (new tokens take their positions from it) after update {number}"] = layer.get_seq_length()
    held = [t for t in tree_leaves(list(vars(layer).values())) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    found["floats held beside what quantize returned, so that nothing is saved"] = sum(t.numel() for t in held)
    found["generated tokens"] = ""
    if given["prompt"].numel():
        model = _tiny()
        layers = [answer(Lot) for _ in range(model.config.num_hidden_layers)]
        tokens = model.generate(given["prompt"], past_key_values=Cache(layers=layers), max_new_tokens=4, do_sample=False)
        found["generated tokens"] = str(tokens[:, given["prompt"].shape[1] :].tolist())
    return found


STATES = [f"{name} after update {number}" for number in (1, 2, 3, 4) for name in ("keys", "values")]


def _read(lots):
    return torch.cat(lots, 2) / 2


def _tokens(lots):
    return sum(lot.shape[2] for lot in lots)


def _each(of):
    return lambda keys, values: (of(keys), of(values))


def _layer(read=lambda keys, values: (_read(keys), _read(values)), length=_tokens):
    """Layers that keep what they are fed. read(keys, values): what update returns, from lists of what each update was fed."""

    def make(quantize):
        from transformers.cache_utils import DynamicLayer

        def update(keys, values, *args, **kwargs):
            layer.fed[0].append(keys), layer.fed[1].append(values)
            return read(*layer.fed)

        layer = DynamicLayer()
        layer.fed, layer.update, layer.get_seq_length = ([], []), update, lambda: length(layer.fed[0])
        return layer

    return make


LAYER = Exercise(
    id="9.4", name="CacheLayer", title="A cache that generate accepts", minutes=15, difficulty=3, points=4,
    returns=("layer",), inputs=layer_inputs, reference=reference_layer, drive=drive_layer,
    hint="Attention needs the keys and values of all tokens so far",
    # A mistake is told by what update returns.
    alike=lambda given, got, theirs: all(torch.equal(got[name], theirs[name]) for name in STATES),
    mistakes=mistakes_of(_layer, {
        "nothing was quantized: update returns keys and values as they came": _each(lambda lots: torch.cat(lots, 2)),
        "what update returns for the new tokens is what came, not what is stored. A prompt is then read as if there were no "
        "quantization: nothing is measured": _each(lambda lots: _read([*lots[:-1], lots[-1] * 2])),
        "keys and values have changed places": lambda keys, values: (_read(values), _read(keys)),
        "keys and values come back in another order than they came: new tokens stand after old ones":
            _each(lambda lots: _read(lots[::-1])),
        "what was stored before is quantized again at every update, and loses again each time":
            _each(lambda lots: torch.cat([lot / 2 ** (len(lots) - i) for i, lot in enumerate(lots)], 2)),
    }),
    others=(
        Mutant(_layer(_each(lambda lots: lots[-1] / 2)), "of all tokens so far"),
        Mutant(_layer(length=len), "their positions from it) after update 1: got 1, wanted 5"),
        Mutant(_layer(), "so that nothing is saved"), Mutant(_layer(lambda keys, values: _read(keys)), "wanted keys and values"),
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
    query, key = (nn.Linear(weight.shape[1], len(weight), bias=False).requires_grad_(False) for weight in (queries, keys))
    query.weight.copy_(queries)
    key.weight.copy_(keys)
    models.scale_keys(query, key, scale)
    return query.weight, key.weight


def _planted(queries, keys, scale, pair=lambda s: torch.cat([s, s], 1), tiled=False, change=torch.div):
    """The planting with what can go wrong as options."""
    rows, shared = pair(scale), queries.shape[0] // keys.shape[0]
    read = rows.repeat(shared, 1) if tiled else rows.repeat_interleave(shared, 0)
    return change(queries, read.reshape(-1, 1)), keys * rows.reshape(-1, 1)


def _about_channel(given: Outputs, want: Outputs, name: str, place: tuple[int, ...]) -> str:
    factor, (head, channel) = (want[name][place] / given[name][place]).item(), divmod(place[0], WIDTH)
    return f"{name}{list(place)}, channel {channel} of head {head}, wanted {factor:.4g} times what it was"


PLANT = Exercise(
    id="9.5", name="plant", title="Loud keys, the same model", minutes=12, difficulty=3, points=3,
    returns=("queries", "keys"), inputs=plant_inputs, reference=plant, about=_about_channel,
    # A reciprocal and a product, or one division.
    allowed=lambda given, want: {name: 2**-22 * weight.abs() for name, weight in want.items()},
    alike=lambda given, got, theirs: all(torch.allclose(got[name].float(), theirs[name], rtol=2**-21, atol=0) for name in theirs),
    mistakes=mistakes_by_option(_planted, {
        "the pairs are neighbors, 0 and 1, 2 and 3. In transformers' Llama channel i is rotated together with i + width / 2; "
        "neighbors have different factors then, and rotation mixes them": {"pair": lambda s: s.repeat_interleave(2, 1)},
        "heads of queries were given the factors of heads of keys in turns. Those that share a head of keys stand side by side: "
        "with two on each, queries 0 and 1 belong to keys 0": {"tiled": True},
        "queries were multiplied as well: q . k is then another number. Divide them": {"change": torch.mul},
        "queries were made loud and keys quiet, wanted it the other way around: keys are what is stored": {
            "pair": lambda s: torch.cat([1 / s, 1 / s], 1)},
        "only the first channel of each pair was multiplied: after the rotation the two are mixed, and no factor of the query "
        "takes that back": {"pair": lambda s: torch.cat([s, torch.ones_like(s)], 1)},
        "queries are as they were, so q . k has changed": {"change": lambda queries, rows: queries.clone()},
    }),
    others=(Mutant(lambda q, k, s: _planted(q, k, s.flip(0)), "times what it was"),),
)  # fmt: skip


# 9.6 ------------------------------------------------------------------------------------------------------------------
def add_inputs(seed: int) -> dict:
    """Documents of unequal length and difficulty, some with nothing scored; the two kinds of damage make each other worse."""
    g = generator(seed)
    tokens = torch.randint(5, 400, (30,), generator=g)
    tokens[torch.randint(30, (2,), generator=g)] = 0

    def noise() -> torch.Tensor:
        return torch.rand(30, generator=g, dtype=torch.float64)

    level, weights, cache, extra = 2 + noise(), 0.3 + 0.2 * noise(), 0.2 + 0.1 * noise(), 0.08 * (noise() - 0.2)
    losses = {"neither": level, "weights": level + weights, "cache": level + cache, "both": level + weights + cache + extra}
    draws = torch.randint(30, (300, 30), generator=g)
    return {"losses": {name: loss * tokens for name, loss in losses.items()}, "tokens": tokens, "draws": draws}


def interaction(losses: dict[str, torch.Tensor], tokens: torch.Tensor, draws: torch.Tensor) -> tuple[float, float, float]:
    """labsupport's: what both cost beyond the sum, in nats a token, and its interval."""
    from labsupport.pipeline import cache

    found = cache.interaction(losses, tokens, draws)
    return found.change, found.low, found.high


def _added(losses, tokens, draws, rule=lambda both, weights, cache, neither: both - weights - cache + neither, level=0.95):
    """The interaction with what can go wrong as options. rule: of the four losses, in nats a token."""

    def found(pick):
        return rule(*(losses[name][pick].sum(-1) / tokens[pick].sum(-1) for name in ("both", "weights", "cache", "neither")))

    tail = (1 - level) / 2
    return found(slice(None)).item(), *torch.quantile(found(draws), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()


def _document_means(losses, tokens, draws, empty=0.0):
    means = {name: (loss / tokens).nan_to_num(nan=empty) for name, loss in losses.items()}
    return _added(means, torch.ones_like(tokens), draws)


def _added_off(given: Outputs, got: Outputs, want: Outputs) -> str:
    if abs(got["extra"] - want["extra"]) > ADD.allowed(given, want):
        return f"extra: {got_and_wanted(got['extra'], want['extra'])} nats a token"
    ends = ", ".join(f"{name} {got_and_wanted(got[name], want[name])}" for name in ("low", "high"))
    times = (got["high"] - got["low"]) / (want["high"] - want["low"])
    if times > 2:
        ends += f". It is {times:.2g} times too wide: all four losses must come from the same draw of documents"
    return f"extra is right, the interval is not: {ends}"


ADD = Exercise(
    id="9.6", name="interaction", title="Is the damage additive?", minutes=12, difficulty=3, points=4,
    returns=("extra", "low", "high"), inputs=add_inputs, reference=interaction, otherwise=_added_off,
    allowed=lambda given, want: 1e-6, close=lambda given, want: 2e-6,  # of some hundredths of a nat: float32 comes within 3e-7
    faults=(
        Fault("{name} is NaN. Some documents have no tokens, and their own mean is 0 / 0: sum over documents before you divide",
              lambda given, got, want: next(({"name": name} for name, value in got.items() if value != value), None),
              (partial(_document_means, empty=torch.nan),), early=True),
    ),
    mistakes=(
        *mistakes_of(lambda rule: partial(_added, rule=rule), {
            "the rises in percent were subtracted. They do not add up even where the damage does: two rises of 10 % make 21 %. "
            "Subtract losses": lambda b, w, c, n: (b - n).exp() - (w - n).exp() - (c - n).exp() + 1,
            "the loss of the model without any damage was taken out twice: each of the other losses holds it once":
                lambda b, w, c, n: b - w - c,
            "this is what both cost together. Take out what each costs alone": lambda b, w, c, n: b - n,
            "the sign is turned around: a positive number is to say that both together cost more than the sum":
                lambda b, w, c, n: w + c - b - n,
            "this is what the cache adds to quantized weights, whatever it costs by itself": lambda b, w, c, n: b - w,
        }),
        Mistake("every document counts alike, however short. Divide the sum of nats by the sum of tokens", _document_means),
        Mistake("low and high have changed places", lambda *given: (_added(*given)[0], *_added(*given)[:0:-1])),
        *mistakes_of(lambda level: partial(_added, level=level), {
            f"this is an interval of {level:.0%}, wanted 95 %: 2.5 % of the draws on either side": level
            for level in (0.9, 0.99, 0.8, 0.5)}),
    ),
    others=(
        Mutant(lambda *given: (e := _added(*given)) and (e[0], 4 * e[1] - 3 * e[0], 4 * e[2] - 3 * e[0]), "the same draw"),
        Mutant(lambda *given: (_added(*given)[0] * 1.1, *_added(*given)[1:]), "nats a token"),
        Mutant(lambda *given: (*_added(*given)[:2], _added(*given)[2] + 1e-3), "extra is right, the interval is not"),
    ),
)  # fmt: skip

EXERCISES = (BYTES, KEYS, PUSH, LAYER, PLANT, ADD)
