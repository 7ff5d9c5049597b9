"""A model whose weights are read when they are needed: a block at a time, and the rest is shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from labsupport.checkpoint.weights import FLOATS, CheckpointError, Weights
from labsupport.model import models, names, opened
from labsupport.pipeline.block import Block, Resident

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from labsupport.checkpoint.gguf_file import GGUFWeights


def empty_model(directory: Path, weights: Weights | GGUFWeights) -> PreTrainedModel:
    """The architecture that a directory's config.json names, in evaluation mode, without weights: its parameters are meta tensors.

    `weights` get the names that the model has for them.
    Where the config ties parameters and the files hold different values for them, they are not tied, as transformers has it, and
    the model's config says so. Raises CheckpointError for an architecture that transformers does not know as a causal language
    model, and where such parameters cannot be untied.
    """
    return empty_model_and_ties(directory, weights)[0]


def empty_model_and_ties(directory: Path, weights: Weights | GGUFWeights) -> tuple[PreTrainedModel, tuple[str, str] | None]:
    """`empty_model`, and two parameters that config.json ties and whose values in the files differ; None where there are none."""
    model = _empty_model(weights, {})
    weights.rename(names.from_file(model))
    differing = _differing_ties(model, weights)
    if differing is not None:
        model = _empty_model(weights, {"tie_word_embeddings": False})
        if (tied := _differing_ties(model, weights)) is not None:
            raise CheckpointError(f"{directory} holds different values for {tied[0]} and {tied[1]}, which its architecture ties")
    return model, differing


def _differing_ties(model: PreTrainedModel, weights: Weights | GGUFWeights) -> tuple[str, str] | None:
    """Two names of one parameter for which the files hold different values, or one of which they hold packed."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    for tied in places.values():
        packed = [name for name in tied if name.removesuffix("weight") + "qweight" in weights]
        if packed and len(tied) > 1:  # an embedding is never packed, so the parameters are two
            other = next(name for name in tied if name != packed[0])
            return other, packed[0]
        held = [name for name in tied if name in weights]
        for name in held[1:]:
            if not _equal(weights, held[0], name):
                return held[0], name
    return None


def _equal(weights: Weights | GGUFWeights, one: str, other: str) -> bool:
    """Whether two tensors of the files hold the same numbers, perhaps in different dtypes."""
    if weights.shape(one) != weights.shape(other) or not {weights.kind(one), weights.kind(other)} <= set(FLOATS):
        return False
    pairs = zip(weights.in_parts(one), weights.in_parts(other), strict=True)
    return all(torch.equal(a.double(), b.double()) for a, b in pairs)


def _empty_model(weights: Weights | GGUFWeights, changes: dict[str, Any]) -> PreTrainedModel:
    """With `changes` to what config.json says, and tied as that then asks for.

    Raises CheckpointError as well where the config asks for more blocks than the files hold tensors: to make them would take long.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    settings, place = weights.config | changes, weights.described_by
    settings.pop("quantization_config", None)
    kind = settings.pop("model_type", None)
    if kind is None:
        raise CheckpointError(f"{place} names no model_type")
    settings.pop("auto_map", None)  # code that comes with a checkpoint is never run
    try:
        config = AutoConfig.for_model(kind, **settings)
        count = getattr(config.get_text_config(), "num_hidden_layers", None)
        if isinstance(count, int) and count > len(weights):
            raise CheckpointError(f"{place} asks for {count} blocks, the files hold {len(weights)} tensors")
        with init_empty_weights(include_buffers=False), no_init_weights():  # there is nothing to fill, and it takes long
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # a bad configuration can make a constructor raise anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{place} has model_type {kind!r}, of which no model can be made: {reason}") from error
    model.tie_weights()
    return model.eval()


class Skeleton(Resident):
    """A model without weights, taken apart (model.opened), and the files that they are read from. In memory they are float32.

    filled: buffers that transformers lets a file lack and this one lacks, as the model's constructor fills them.
    Raises CheckpointError for tensors that are missing, that do not belong to the model, of another shape, or not floats.
    """

    def __init__(self, directory: Path, device: torch.device | str = "cpu"):
        self.weights, self.device = Weights(directory), torch.device(device)
        self._digests: dict[str, bytes] = {}  # SHA-256 of the tensors that were read so far
        self.model = empty_model(directory, self.weights)
        self.to_file = names.to_file(self.model)
        try:
            self.pieces = opened.open_up(self.model).pieces
        except models.ModelError as error:
            raise CheckpointError(f"{directory}: {error}") from error
        may_lack = names.may_lack(self.model)
        self.filled = {name: b for name, b in self.model.named_buffers() if name not in self.weights and may_lack(name)}
        self.names = {id(module): name for name, module in self.model.named_modules()}
        self.blocks = list(models.blocks(self.model))
        inside = {f"{self.name(block)}.{name}" for block in self.blocks for name in block.state_dict()}
        self.outer = [name for name, _ in self.model.named_parameters() if name not in inside]  # of tied ones, the first
        self._check(directory)

    def name(self, module: nn.Module) -> str:
        """A module's full name."""
        return self.names[id(module)]

    def _check(self, directory: Path) -> None:
        wanted = {name: list(p.shape) for name, p in self.model.state_dict().items()}
        tied = wanted.keys() - {name for name, _ in self.model.named_parameters()} - {n for n, _ in self.model.named_buffers()}
        whole = {name: piece for name, piece in self.pieces.items() if piece.parameter in self.weights}
        shapes = wanted | {piece.parameter: list(piece.shape) for piece in whole.values()}
        target_of, ignored = names.made_of(self.model), names.ignored(self.model)
        for name in sorted(self.weights.keys() - shapes.keys()):
            if (target := target_of(name)) is not None:
                reason = f"of which transformers makes {target} when it loads the model, as labs does not"
                raise CheckpointError(f"{directory} holds {name}, {reason}: save the model in another form")
        if missing := sorted(wanted.keys() - self.weights.keys() - tied - whole.keys() - self.filled.keys()):
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise CheckpointError(f"{directory} lacks {missing[0]}{more}, which its config asks for")
        foreign = sorted(name for name in self.weights.keys() - shapes.keys() if not ignored(name))
        if foreign:
            more = f" and {len(foreign) - 1} more" if foreign[1:] else ""
            raise CheckpointError(f"{directory} holds {foreign[0]}{more}, which its config does not know")
        for name in shapes.keys() & self.weights.keys():
            if self.weights.shape(name) != shapes[name]:
                raise CheckpointError(
                    f"{name} has shape {self.weights.shape(name)} in {directory}, its config asks for {shapes[name]}"
                )
            if self.weights.kind(name) not in FLOATS:
                raise CheckpointError(f"{name} is {self.weights.kind(name)} in {directory}, wanted one of {', '.join(FLOATS)}")

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """float32 copies of tensors, by full name. Raises CheckpointError for NaN and infinity."""
        tensors = {name: self._tensor(name) for name in names}
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise CheckpointError(f"{name} holds NaN or infinity in {self.weights.directory}, wanted numbers")
        return tensors

    def _stored(self, name: str) -> torch.Tensor:
        """A tensor as it lies in its file, or what takes the place of one that the files lack."""
        piece = self.pieces.get(name)
        if name in self.filled:
            return self.filled[name]
        if piece is None or piece.parameter not in self.weights:
            return self.weights[name]
        return piece.take(self.weights[piece.parameter])

    def some_rows(self, name: str, count: int) -> torch.Tensor:
        """At most `count` rows of a matrix, spread evenly, in the dtype of its file. No other rows are read."""
        held = self._stored(name)
        return held[torch.linspace(0, len(held) - 1, min(count, len(held))).long()]

    def _tensor(self, name: str) -> torch.Tensor:
        held = self._stored(name)
        copied = held.to(self.device, torch.float32, copy=True, memory_format=torch.contiguous_format)
        if name not in self._digests:  # 1.4 GB a second were measured: ten seconds for 7B parameters in float16
            self._digests[name] = sha256(held.contiguous().view(-1).view(torch.uint8).numpy().data).digest()
        return copied

    def digest(self, block: Block) -> str:
        """Of the tensors of a block as they stood in the files when they were first read."""
        start = self.name(block.module) + "."
        return self._digest(name for name in self._digests if name.startswith(start))

    def digest_outside(self) -> str:
        """Of the tensors outside the blocks, which have been read where text went through the embedding."""
        return self._digest(self.outer)

    def _digest(self, names: Iterable[str]) -> str:
        return sha256(b"".join(name.encode() + self._digests[name] for name in sorted(names))).hexdigest()

    @contextmanager
    def outside(self) -> Iterator[None]:
        with _holding(self.model, self.read(self.outer)):
            yield

    @contextmanager
    def block(self, index: int) -> Iterator[None]:
        block = self.blocks[index]
        start = self.name(block) + "."
        read = self.read(start + key for key in block.state_dict()).items()
        with _holding(block, {key.removeprefix(start): value for key, value in read}):
            yield


@contextmanager
def _holding(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Inside, a module's parameters hold these tensors, in every place where they are used; afterwards they are empty again."""
    _assign(module, tensors)
    try:
        yield
    finally:
        _assign(module, {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()})


def _assign(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    places: dict[int, list[str]] = {}
    for name, tensor in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)):
        places.setdefault(id(tensor), []).append(name)
    together = {name: names for names in places.values() for name in names}
    for name, tensor in tensors.items():
        value = nn.Parameter(tensor, requires_grad=False)
        for place in together[name]:
            owner, _, leaf = place.rpartition(".")
            holder = module.get_submodule(owner)
            if leaf in holder._parameters:
                holder._parameters[leaf] = value
            else:
                holder._buffers[leaf] = tensor
