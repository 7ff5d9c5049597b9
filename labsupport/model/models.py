"""The course model, or any Hugging Face causal language model in its place: loading it, its blocks, its linear layers."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from labsupport import PACKAGE
from labsupport.model import fetched, hub, memory, source
from labsupport.model.source import SMALL
from labsupport.model.source import ModelError as ModelError  # by this name it is known elsewhere
from labsupport.quant import checks, grid

LARGE = 2**26  # parameters

# Linears that decide which experts see a token, or how much of one counts: small, and never quantized.
ROUTERS = ("gate", "router", "shared_expert_gate")


def data_dir() -> Path:
    """The course's data: beside the package in a checkout, inside it in an installed wheel."""
    for candidate in (PACKAGE.parent / "data", PACKAGE / "data"):
        if (candidate / "claims.yaml").is_file():
            return candidate
    raise ModelError(f"the course data is neither beside {PACKAGE} nor in it: the installation is incomplete")


def course_model_dir() -> Path:
    return data_dir() / "course-model"


# A second model of the course's: the same text and tokenizer, about a quarter of the parameters.
SMALL_COURSE_MODEL = "course-model-small"


def model_name(name: str | None = None) -> str:
    """`name`, or else LABS_MODEL, or else the directory of the course model."""
    return name or os.environ.get("LABS_MODEL") or str(course_model_dir())


def title(name: str | None = None) -> str:
    """What to call the model of `model_name` in a sentence: the course model, or the last part of its directory or hub id."""
    path = Path(model_name(name))
    return "the course model" if path == course_model_dir() else path.name


def located(name: str) -> str:
    """The directory of a model that `labs fetch` made or of the small course model, for their names; every other name as it is.

    A directory of the same name is `./NAME`. Raises ModelError for one that has not been fetched.
    """
    if name == SMALL_COURSE_MODEL:
        return str(data_dir() / SMALL_COURSE_MODEL)
    try:
        return str(fetched.find(name, "model") or name)
    except fetched.NotFetched as error:
        raise ModelError(str(error)) from error


def directory(name: str, look: hub.Look = lambda config, nbytes: None) -> Path:
    """The directory of a model: `name` itself, or what the hub has under this id.

    Only for an id is the network used, and not for one that was downloaded before where there is no network. look: see hub.Look;
    for a directory it is called, too. Raises ModelError for one without a model or weights, for one that is no causal language
    model, and what `look` raises.
    """
    path = Path(located(name))

    def look_first(config: dict[str, Any], nbytes: int) -> None:
        source.check_causal(name, config)
        look(config, nbytes)

    if os.path.isfile(path):
        raise ModelError(f"{name!r} is a file, wanted a model's directory or a hub id")
    if not os.path.isdir(path):
        try:
            path = hub.snapshot(str(path), look=look_first)
        except hub.HubError as error:
            raise ModelError(str(error)) from error
    look_first(source.read_config(path), source.nbytes(path))
    return path


def load_model(name: str | None = None, device: str | torch.device | None = None, dtype: torch.dtype | None = None):
    """A causal language model ready to evaluate, and its tokenizer.

    name: a directory, course-model-small, a model that `labs fetch` made or a hub id; without it LABS_MODEL decides, and without
    that it is the course model. Only a hub id may download. dtype: by default float32 on a CPU, where half precision is slow and
    less exact, and on every device for a model of at most SMALL parameters, as the course model is: what a lesson shows is then
    the same everywhere. A larger model on a GPU keeps the dtype that is stored, and so does one that is stored quantized.
    Weights are read from safetensors only. Raises ModelError with what is wrong, before anything large is downloaded or read:
    another kind of model, and one that the free memory does not hold.
    """
    import transformers
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    name = model_name(name)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    asked = dtype or (torch.float32 if device.type == "cpu" else "auto")
    # The argument was renamed in transformers 4.56; the old name still works there, with a warning.
    dtype_argument = {"dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype": asked}
    path = directory(name, lambda config, nbytes: source.check_memory(name, config, nbytes, asked, device))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, local_files_only=True, trust_remote_code=False, **dtype_argument
        )
    except SafetensorError as error:
        raise ModelError(f"the weights of {name!r} are damaged: {error}") from error
    except OSError as error:
        raise ModelError(f"the model in {str(path)!r} cannot be read: {source.first_line(error)}") from error
    tokenizer = None
    if any((path / file).is_file() for file in source.TOKENIZER_FILES):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ModelError(f"the tokenizer in {str(path)!r} cannot be read: {source.first_line(error)}") from error
    if tokenizer is None:
        raise ModelError(f"the directory {str(path)!r} holds no tokenizer: wanted {' or '.join(source.TOKENIZER_FILES)}")
    if model.num_parameters() > LARGE:
        memory.return_freed(2**18)  # copies of such a model come and go in a notebook
    if dtype is None and model.num_parameters() <= SMALL and not hasattr(model.config, "quantization_config"):
        model = model.float()
    return model.to(device).eval(), tokenizer


def check_values(model: nn.Module) -> None:
    """Raise ModelError for what is no model, and for one whose weights are not there or are computed anew at each use.

    A weight under torch.nn.utils.parametrize, weight_norm or pruning is such a one: what is put into it is lost.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ModelError(f"model is a {type(model).__name__}, wanted a causal language model of transformers")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(f"{name} is on the meta device, which holds shapes and no values: load the weights first")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "weight" not in module._parameters:
            sources = ", ".join(source for source, _ in module.named_parameters() if source != "bias")
            raise ModelError(
                f"the weight of {name} is computed from {sources} at each use, and what is put in its place would be lost: "
                "remove the parametrization first"
            )


def vocabulary(model: nn.Module) -> int:
    """How many tokens the model has an embedding for."""
    return len(next(model.get_input_embeddings().parameters()))


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks in order: the one list of modules whose length the config gives."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(f"found no list of {count} blocks in a {type(model).__name__}")


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks, by full name. The embedding and the output head are not among them, nor are routers.

    See model.opened for layers that are linears in all but their class.
    """
    inside = {id(m) for block in blocks(model) for m in block.modules() if isinstance(m, nn.Linear)}
    return {name: m for name, m in model.named_modules() if id(m) in inside and name.rpartition(".")[2] not in ROUTERS}


def group_size(model: nn.Module, wanted: int = 128) -> int:
    """The group size for this model: `wanted` or the largest of 64 and 32 below it that divides the inputs of all linears.

    Raises ValueError where none of them does.
    """
    return grid.largest_group_size((layer.in_features for layer in linears(model).values()), wanted)


def left_in_float(model: nn.Module) -> dict[str, int]:
    """The matrices of the blocks that are of no linear, which no method changes: how many values they hold, by full name."""
    of_linears = {f"{name}.weight" for name in linears(model)}
    inside = {id(parameter) for block in blocks(model) for parameter in block.parameters() if parameter.ndim > 1}
    return {name: p.numel() for name, p in model.named_parameters() if id(p) in inside and name not in of_linears}


def address(parameter: torch.Tensor) -> int:
    """The same number for two parameters on one memory. A meta tensor has no memory, an empty one no address of its own."""
    return id(parameter) if parameter.is_meta else parameter.data_ptr() or id(parameter)


def shared(model: nn.Module) -> tuple[str, str] | None:
    """The names of two parameters that are one, the weight of a linear inside the blocks; None where each is by itself."""
    owners: dict[int, str] = {}
    inside = {address(layer.weight) for layer in linears(model).values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        pointer = address(parameter)
        if pointer in inside and owners.setdefault(pointer, name) != name:
            return owners[pointer], name
    return None


def packed(model: nn.Module) -> str | None:
    """The name of the first linear inside the blocks whose weight is not the plain float matrix of its shape; None without one.

    bitsandbytes' layers, for one, are linears whose weight is a column of bytes.
    """
    for name, layer in linears(model).items():
        if not layer.weight.is_floating_point() or tuple(layer.weight.shape) != (layer.out_features, layer.in_features):
            return name
    return None


def role(name: str) -> str:
    """ "attention" or "mlp": which half of its block a linear belongs to, by its name."""
    return "attention" if "attn" in name or "attention" in name else "mlp"


def short(name: str) -> str:
    """A linear's name from the number of its block on: "3.mlp.up_proj" of model.layers.3.mlp.up_proj, for titles of figures."""
    parts = name.split(".")
    first = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[first:])


def duplicate(model: nn.Module) -> nn.Module:
    """A copy of the model whose weights can be changed without touching the original."""
    return copy.deepcopy(model)


# Where a norm's output goes, by names inside a block: the norm of attention and that of the MLP, and the linears that read them.
QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")
NORM_READERS = (
    {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")},  # Llama, Qwen
    {"self_attn_layer_norm": QKV, "final_layer_norm": ("fc1",)},  # OPT
)


def _norms_and_readers(block: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The two norms of a block and the linears that read them. Raises ModelError for a block that is not built so."""
    inside = dict(block.named_modules())
    norms = {name for name, _ in block.named_children() if "norm" in name}
    for shape in NORM_READERS:
        readers = {name for names in shape.values() for name in names}
        # A third norm would stand behind one of the two, as in Gemma 2. OPT-350M's stand behind the linears.
        if norms == shape.keys() and readers <= inside.keys() and getattr(block, "do_layer_norm_before", True):
            found = {inside[norm]: [inside[name] for name in names] for norm, names in shape.items()}
            if all(offset_of(norm) is not None for norm in found):
                return found
    raise ModelError(f"outliers can be planted in Llama-shaped blocks and in OPT's, not in {type(block).__name__}")


@torch.no_grad()
def offset_of(norm: nn.Module) -> float | None:
    """What a norm adds to its weight before it multiplies by it: 1 for Gemma's, 0 for most; None where it does neither."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is None or weight.ndim != 1:
        return None
    x = torch.linspace(-1, 1, len(weight))[None]
    for offset in (0.0, 1.0):
        held = {"weight": torch.full((len(weight),), -offset)} | ({} if bias is None else {"bias": torch.zeros(len(weight))})
        if not torch.func.functional_call(norm, held, (x,)).any():
            return offset
    return None


@torch.no_grad()
def _scale_norm(norm: nn.Module, scale: torch.Tensor) -> None:
    """Multiply what a norm gives by `scale`, float [channels], in place."""
    offset, scale = offset_of(norm), scale.to(norm.weight)
    norm.weight.copy_((norm.weight + offset) * scale - offset if offset else norm.weight * scale)
    if getattr(norm, "bias", None) is not None:
        norm.bias.mul_(scale)


def first_blocks(model: nn.Module, count: int) -> nn.Module:
    """A copy that ends after the first `count` blocks: embedding, those blocks, last norm and head. Raises ValueError."""
    every = list(blocks(model))
    count = checks.whole(count, "count", 1, len(every), f"a whole number from 1 to {len(every)}, the model's blocks")
    copied = copy.deepcopy(model, {id(block): block for block in every[count:]})  # those are named, not copied, and go at once
    del blocks(copied)[count:]
    copied.config.get_text_config().num_hidden_layers = count
    return copied


def plant_outliers(model: nn.Module, sigma: float = 0.7, large: int = 4, factor: float = 8.0, seed: int = 0) -> nn.Module:
    """A copy that computes the same function with outlier channels in its activations, as large models have them.

    What every norm gives is multiplied by a factor for each channel, exp(sigma N(0, 1)) and `factor` times more in
    `large` of them, and the columns of the linears that read the norm are divided by it. In exact arithmetic
    nothing changes; in float32 the logits move by rounding alone. For Llama-shaped blocks and OPT's. Raises ModelError for others.
    """
    planted = duplicate(model)
    for index, block in enumerate(blocks(planted)):
        for half, (norm, layers) in enumerate(_norms_and_readers(block).items()):
            generator = torch.Generator().manual_seed(seed * 1009 + 2 * index + half)
            channels = len(norm.weight)
            scale = torch.exp(sigma * torch.randn(channels, generator=generator))
            scale[torch.randperm(channels, generator=generator)[:large]] *= factor
            _scale_norm(norm, scale)
            with torch.no_grad():
                for layer in layers:
                    layer.weight.div_(scale.to(layer.weight))
    return planted


def plant_key_outliers(model: nn.Module, factor: float = 8.0, pairs: int = 2, seed: int = 0) -> nn.Module:
    """A copy that computes the same function with outlier channels in its keys, as large models have them.

    In every head of keys, `pairs` pairs of channels are multiplied by `factor`, and those channels of all queries that read this
    head are divided by it: q . k stays what it was. The two channels of a pair, i and i + head_dim / 2, are rotated into each other
    by the rotary embedding, so they share a factor. For attention with q_proj and k_proj, as Llama's, Qwen's and OPT's. Where
    queries and keys are normalized after their projections, as in Qwen3, the norms' weights are changed, which all heads share, so
    that the channels are the same in each. Raises ModelError for other attention.
    """
    planted = duplicate(model)
    for index, block in enumerate(blocks(planted)):
        attention = getattr(block, "self_attn", None)
        parts = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "head_dim")]
        norms = [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
        width = parts[2]
        if any(part is None for part in parts) or any(offset_of(n) is None or len(n.weight) != width for n in norms):
            raise ModelError(f"outliers can be planted in keys of Llama-shaped attention, not in {type(block).__name__}")
        queries, keys, _ = parts
        generator = torch.Generator().manual_seed(seed * 1009 + index)
        heads = 1 if norms else keys.out_features // width
        scale = torch.ones(heads, width // 2, dtype=torch.float64)
        for head in range(heads):
            scale[head, torch.randperm(width // 2, generator=generator)[:pairs]] = factor
        if norms:
            of_head = scale[0].repeat(2)
            for norm, by in zip(norms, (1 / of_head, of_head), strict=True):
                _scale_norm(norm, by)
        else:
            scale_keys(queries, keys, scale)
    _check_same_function(model, planted)
    return planted


@torch.no_grad()
def _check_same_function(model: nn.Module, planted: nn.Module) -> None:
    """Raise ModelError where the rotary embedding turns other pairs of channels, or a part of a head: then logits move."""
    parameter = next(model.parameters())
    ids = (torch.arange(16)[None] * 7919 % vocabulary(model)).to(parameter.device)
    before, after = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, planted))
    # Float32 rounds in another place, by some units of 2**-24; other pairs move logits by tenths of their size.
    if not (after - before).norm() <= (1e-3 if parameter.dtype.itemsize >= 4 else 5e-2) * before.norm():
        raise ModelError(f"a {type(model).__name__} does not turn the channels i and i + head_dim / 2 of a key into each other")


@torch.no_grad()
def scale_keys(queries: nn.Linear, keys: nn.Linear, scale: torch.Tensor) -> None:
    """Multiply pairs of key channels by `scale`, float [heads of keys, head_dim / 2], and divide the queries' by it, in place."""
    rows = torch.cat([scale, scale], dim=1).double()  # of one head: channels i and i + head_dim / 2 are a pair
    shared = queries.out_features // rows.numel()  # heads of queries, side by side, that read one head of keys
    for layer, by in ((keys, rows.flatten()), (queries, 1 / rows.repeat_interleave(shared, dim=0).flatten())):
        for parameter in layer.parameters():  # weight and, where there is one, bias
            parameter.mul_(by.to(parameter).view(-1, *[1] * (parameter.ndim - 1)))
