"""The cache of keys and values in few bits: what is stored, what it reads back as, and what it weighs.

Keys and values are [batch, heads, tokens, width], as attention sees them. A group shares a scale and a minimum: `group_size`
neighboring channels of one token (axis "token"), or one channel of `group_size` successive tokens (axis "channel"). A code q
stands for minimum + q * scale. KIVI (Liu et al. 2024, arXiv:2402.02750, section 3) quantizes keys by channel, values by token, and
leaves the newest tokens unchanged; KVQuant (Hooper et al. 2024, arXiv:2401.18079, section 3) quantizes keys before the rotary
embedding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from labsupport.quant import checks, grid

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
AXES = ("channel", "token")


@dataclass(frozen=True)
class Part:
    """How keys, or values, are stored.

    bits: 2 to 8 on a uniform grid, "fp8" for e4m3 clamped at 448, or 16 to store them unchanged. axis, group_size: what shares a
    scale. residual: how many of the newest tokens stay unchanged. block: older ones are quantized that many tokens at a time;
    without it as soon as possible, which for axis "channel" is a group at a time. scale: fp8's; values are divided by it.

    KIVI's keys have residual 0 and a block of 128, its values residual 128. Raises ValueError for what does not fit.
    """

    bits: int | Literal["fp8"] = 16
    axis: Literal["channel", "token"] = "token"
    group_size: int = 32
    residual: int = 0
    block: int | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {}
        if not isinstance(self.bits, str) or self.bits != "fp8":
            wanted = "a whole number from 2 to 8, 'fp8', or 16 for unchanged"
            checked["bits"] = checks.whole(self.bits, "bits", 2, 16, wanted)
            if 8 < checked["bits"] < 16:
                raise ValueError(f"bits is {self.bits!r}, wanted {wanted}")
        checks.choice(self.axis, "axis", AXES)
        checked["group_size"] = checks.whole(self.group_size, "group_size")
        checked["residual"] = checks.whole(self.residual, "residual", 0)
        if self.block is not None:
            checked["block"] = checks.whole(self.block, "block")
        # What is divided by a smaller number is beyond float32.
        least = torch.finfo(torch.float32).tiny
        checked["scale"] = checks.number(self.scale, "scale", least, sys.float_info.max, "a number above 0")
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.by_channel and self.step % self.group_size:
            raise ValueError(f"block {self.block} is not a multiple of group_size {self.group_size}: a group would stay half full")

    @property
    def by_channel(self) -> bool:
        """Whether a group runs along tokens."""
        return self.axis == "channel" and self.bits not in ("fp8", 16)

    @property
    def step(self) -> int:
        """Tokens that are quantized together."""
        return self.block or (self.group_size if self.by_channel else 1)

    def stored(self, tokens: int) -> int:
        """How many tokens are quantized once there are `tokens` of them: the oldest; the others are stored unchanged."""
        return 0 if self.bits == 16 else max(0, tokens - self.residual) // self.step * self.step

    def nbytes(self, rows: int, tokens: int, width: int, float_bytes: int = 2) -> int:
        """Bytes for `rows` = batch * heads. float_bytes: of a value that is stored unchanged."""
        stored = self.stored(tokens)
        waiting = rows * (tokens - stored) * width * float_bytes
        if self.bits == "fp8" or self.bits == 16:
            return waiting + rows * stored * width
        codes = rows * stored * width * self.bits // 8
        return waiting + codes + rows * stored * width // self.group_size * 4  # a scale and a minimum in float16


@dataclass(frozen=True)
class Scheme:
    """How a cache is stored. before_rope: keys are rotated back before they are stored, and again when they are read."""

    keys: Part = Part()
    values: Part = Part()
    before_rope: bool = False


FLOAT = Scheme()


def kivi(bits: int, group_size: int = 32, residual: int = 128) -> Scheme:
    """KIVI as in its Algorithm 1: keys wait until there are `residual` of them; of the values the newest `residual` wait."""
    keys = Part(bits, "channel", group_size, block=residual)
    return Scheme(keys, Part(bits, "token", group_size, residual))


@dataclass(frozen=True)
class Shape:
    """What a token adds to the cache: in each of `layers` layers, `heads` keys of key_width numbers and values of value_width."""

    layers: int
    heads: int
    key_width: int
    value_width: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a Hugging Face config; of a model that also sees or hears, from that of its language model.

        Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1) keeps, for all heads together, one rotated key and
        one latent vector, out of which keys and values are made when they are read: here the key, and the value.
        """
        if text_config := getattr(config, "get_text_config", None):
            config = text_config()
        if latent := getattr(config, "kv_lora_rank", None):
            return cls(config.num_hidden_layers, 1, config.qk_rope_head_dim, latent)
        heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or config.num_attention_heads
        # Falcon's and BigCode's switch: one key and one value for all heads, whatever num_kv_heads says (modeling_falcon.py).
        if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
            heads = 1
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, heads, width, width)


def cache_bytes(shape: Shape, tokens: int, batch: int = 1, scheme: Scheme = FLOAT, float_bytes: int = 2) -> int:
    """Bytes of a cache of `batch` sequences of `tokens` tokens: exactly what the tensors of `cache.QuantizedCache` hold."""
    rows = batch * shape.heads
    keys = scheme.keys.nbytes(rows, tokens, shape.key_width, float_bytes)
    return shape.layers * (keys + scheme.values.nbytes(rows, tokens, shape.value_width, float_bytes))


@dataclass(frozen=True)
class QuantizedStates:
    """Keys or values as they are stored.

    codes: uint8 [batch, heads, tokens, width * bits / 8], bits packed lowest first; for fp8 float8_e4m3fn [..., width].
    scale, minimum: float16, [batch, heads, tokens, width / group_size] by token, [batch, heads, tokens / group_size, width] by
    channel; None for fp8.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None
    minimum: torch.Tensor | None
    part: Part

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.codes, self.scale, self.minimum) if t is not None]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are stored."""
        return sum(t.nbytes for t in self.tensors)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedStates:
        """A copy in which `change` has been applied to every tensor."""
        scale, minimum = (None if t is None else change(t) for t in (self.scale, self.minimum))
        return replace(self, codes=change(self.codes), scale=scale, minimum=minimum)

    def joined(self, later: QuantizedStates) -> QuantizedStates:
        """These tokens and then those of `later`."""
        return QuantizedStates(
            _joined(self.codes, later.codes),
            None if self.scale is None or later.scale is None else _joined(self.scale, later.scale),
            None if self.minimum is None or later.minimum is None else _joined(self.minimum, later.minimum),
            self.part,
        )

    def dequantize(self) -> torch.Tensor:
        """float32 [batch, heads, tokens, width]."""
        bits, (batch, heads, tokens, size) = self.part.bits, self.codes.shape
        if bits == "fp8" or self.scale is None or self.minimum is None:
            return self.codes.float() * self.part.scale
        width = size * 8 // bits
        codes = grid.unpack_bits(self.codes.flatten(), bits, self.codes.numel() * 8 // bits).view(batch, heads, tokens, width)
        scale, minimum = (_beside(t.float(), self.part) for t in (self.scale, self.minimum))
        return (_grouped(codes.float(), self.part) * scale + minimum).view(batch, heads, tokens, width)


def _joined(first: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
    """Along axis 2, which holds tokens or groups of them. As bytes, since PyTorch cannot join float8 on every device."""
    return torch.cat([first.view(torch.uint8), later.view(torch.uint8)], dim=2).view(first.dtype)


def _grouped(states: torch.Tensor, part: Part) -> torch.Tensor:
    """[..., tokens, width] -> [..., groups, group_size, width] by channel, [..., tokens, groups, group_size] by token."""
    return states.unflatten(2 if part.by_channel else 3, (-1, part.group_size))


def _beside(statistics: torch.Tensor, part: Part) -> torch.Tensor:
    """One number a group, with an axis of 1 where the group's members are."""
    return statistics.unsqueeze(3 if part.by_channel else 4)


def quantize(states: torch.Tensor, part: Part) -> QuantizedStates:
    """Round keys or values, float [batch, heads, tokens, width], to the grids of `part`; they are not changed.

    Scale and minimum are rounded to float16 before codes are chosen. A value is read back within half a step, plus what these two
    roundings move the ends of the group by: 2**-11 of the minimum and of the range. Raises ValueError for NaN, infinity, or a
    shape in which groups or bytes stay half full; TypeError for what is not a floating-point tensor.
    """
    check_states(states, "states")
    if part.bits == 16:
        raise ValueError("bits is 16, so there is nothing to quantize")
    if part.bits == "fp8":
        codes = (states.detach().float() / part.scale).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
        return QuantizedStates(codes, None, None, part)
    check_width(states.shape[3], part, "states")
    if part.by_channel and states.shape[2] % part.group_size:
        raise ValueError(f"group_size {part.group_size} does not divide the {states.shape[2]} tokens of states")

    groups, inside, largest_code = _grouped(states.detach().float(), part), 3 if part.by_channel else 4, 2**part.bits - 1
    minimum = groups.amin(inside, keepdim=True).half()
    scale = ((groups.amax(inside, keepdim=True) - minimum.float()) / largest_code).half()
    if scale.isinf().any() or minimum.isinf().any():
        raise ValueError(f"states reach {states.abs().max().item():.3g}, more than float16 scales hold")
    scale = torch.where(scale <= 0, torch.ones_like(scale), scale)  # all values of the group are equal: code 0, its minimum
    codes = ((groups - minimum.float()) / scale.float()).round_().clamp_(0, largest_code).to(torch.uint8)
    packed = grid.pack_bits(codes, part.bits).view(*states.shape[:3], -1)
    return QuantizedStates(packed, scale.squeeze(inside), minimum.squeeze(inside), part)


def check_states(states: torch.Tensor, name: str) -> None:
    """Raise TypeError for what is not a floating-point tensor, ValueError for another shape, NaN or infinity."""
    checks.tensor(states, name)
    if states.ndim != 4 or states.numel() == 0:
        raise ValueError(f"{name} has shape {list(states.shape)}, wanted [batch, heads, tokens, width], none of them 0")
    checks.finite(states, name)


def check_width(width: int, part: Part, name: str) -> None:
    """Raise ValueError where heads of `width` channels leave a group, or a byte, half full."""
    if part.bits in ("fp8", 16):
        return
    if not part.by_channel and width % part.group_size:
        fitting = checks.dividing([width], str(width))
        raise ValueError(f"group_size {part.group_size} does not divide the width {width} of {name}: {fitting}")
    if width * part.bits % 8:
        raise ValueError(f"a token of {name} takes {width} times {part.bits} bits, which is not a whole number of bytes")


class Stream:
    """Keys, or values, of one layer, growing: quantized blocks of old tokens, and recent tokens unchanged."""

    def __init__(self, part: Part, name: str = "states"):
        self.part, self.name = part, name
        self.old: QuantizedStates | None = None
        self.recent: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        old = 0 if self.old is None else self.old.codes.shape[2]
        return old + (0 if self.recent is None else self.recent.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are stored."""
        old = 0 if self.old is None else self.old.nbytes
        return old + (0 if self.recent is None else self.recent.nbytes)

    def grown(self, states: torch.Tensor) -> Stream:
        """A copy with new tokens, float [batch, heads, tokens, width]; those that have become old enough are quantized for good.

        Raises ValueError where batch, heads or width are not those of the tokens before them.
        """
        check_states(states, self.name)
        check_width(states.shape[3], self.part, self.name)
        recent = states[:, :, :0] if self.recent is None else self.recent
        if (*states.shape[:2], states.shape[3]) != (*recent.shape[:2], recent.shape[3]):
            wanted = f"batch, heads and width {[*recent.shape[:2], recent.shape[3]]} of the tokens before"
            raise ValueError(f"{self.name} has shape {list(states.shape)}, wanted {wanted}")
        after = Stream(self.part, self.name)
        after.old, after.recent = self.old, torch.cat([recent, states.detach()], dim=2)
        ready = self.part.stored(self.tokens + states.shape[2]) - (self.tokens - recent.shape[2])
        if ready:
            new = quantize(after.recent[:, :, :ready], self.part)
            after.old = new if self.old is None else self.old.joined(new)
            after.recent = after.recent[:, :, ready:].clone()  # a slice would keep all of them in memory
        return after

    def read(self) -> torch.Tensor:
        """All tokens as they read back, [batch, heads, tokens, width] in the dtype in which they came.

        Raises ValueError while there are none.
        """
        if self.recent is None:
            raise ValueError(f"{self.name} holds no tokens yet")
        if self.old is None:
            return self.recent
        return torch.cat([self.old.dequantize().to(self.recent.dtype), self.recent], dim=2)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `change`, such as picking sequences of the batch, to every tensor."""
        self.old = None if self.old is None else self.old.map(change)
        self.recent = None if self.recent is None else change(self.recent)


def rotate(states: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor, back: bool = False) -> torch.Tensor:
    """Turn pairs of channels (i, i + width / 2) by positions * frequencies, as Llama's rotary embedding does, or back.

    states [..., tokens, width], positions [tokens], frequencies [width / 2]: `inv_freq` of transformers. Su et al. 2021,
    arXiv:2104.09864, section 3.2; which channels form a pair is the library's choice.
    """
    angles = positions.to(frequencies)[:, None] * frequencies
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second = states.chunk(2, dim=-1)
    if back:
        sin = -sin
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
