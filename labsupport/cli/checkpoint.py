"""labs quantize, labs inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from labsupport.cli.messages import echo, fail, stopped
from labsupport.pipeline.methods import METHODS, stored_layouts, stored_methods, stored_settings

app = typer.Typer()


def _is_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch raises a RuntimeError then, as for many other things."""
    message = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in message or "can't allocate memory" in message


def _taking(setting: str) -> str:
    """The methods that have a setting, by name."""
    return ", ".join(name for name, storage in stored_methods().items() if setting in storage.settings)


def _sizes() -> str:
    """What --group-size is by default: for most methods a rule, for those that have blocks a number."""
    blocks = [f"{name} {storage.group_size}" for name, storage in stored_methods().items() if storage.group_setting != "group_size"]
    return f"the largest of 128, 64, 32 that divides the inputs of every linear layer; {', '.join(blocks)}"


def _default(setting: str) -> str:
    """Of a setting, as the command line takes it."""
    value = stored_settings()[setting]
    names = {"symmetric": "asymmetric", "act_order": "column-order"}
    off = names.get(setting, f"no-{setting.replace('_', '-')}")
    shown = f"--{setting.replace('_', '-') if value else off}" if isinstance(value, bool) else value
    return f"Default: {shown}."


TEXT_METHODS = ", ".join(name for name in stored_methods() if METHODS[name].needs_text)


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(help="A model directory (config.json, safetensors), smollm2 (see labs fetch), or a hub id.")
    ],
    out: Annotated[Path, typer.Option(help="The directory to write. It must not exist.")],
    method: Annotated[str, typer.Option(help=f"{', '.join(stored_methods())}.")] = "gptq",
    bits: Annotated[
        int | None, typer.Option(help="4, 3, 8 or 2. Default: 4, or the only number that the method and the format have.")
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help=f"Weights that share a scale, of nf4 a block; -1 for a whole row. Default: {_sizes()}."),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help=f"Whether the zero-point is in the middle of every grid, as vLLM asks of GPTQ. {_default('symmetric')}",
        ),
    ] = None,
    act_order: Annotated[
        bool | None,
        typer.Option(
            "--act-order/--column-order",
            help=f"{_taking('act_order')}: columns with the largest inputs first, or left to right. {_default('act_order')}",
        ),
    ] = None,
    static_groups: Annotated[
        bool | None,
        typer.Option(
            "--static-groups/--no-static-groups",
            help=f"{_taking('static_groups')}: groups stay neighbors under --act-order. {_default('static_groups')}",
        ),
    ] = None,
    token_weights: Annotated[
        str | None,
        typer.Option(
            help=f"{_taking('token_weights')}: how much a token of calibration text counts. even: as much as every other. "
            "attention: for v_proj by the attention that it gets. not_first: evenly, but the first of each window not at all. "
            "Measured at 4 bits with the other defaults: on SmolLM2-135M attention loses 0.6 of the perplexity that even loses, "
            "and not_first 5.7 times as much; on the course model attention and even lose the same (notebook 07). "
            f"{_default('token_weights')}"
        ),
    ] = None,
    damping: Annotated[
        float | None,
        typer.Option(
            help=f"{_taking('damping')}: share of the Hessian's mean diagonal that is added to it. Measured at 4 bits on "
            f"SmolLM2-135M and the course model: 0.1 was no better. {_default('damping')}"
        ),
    ] = None,
    double_quant: Annotated[
        bool | None,
        typer.Option(
            "--double-quant/--no-double-quant",
            help=f"{_taking('double_quant')}: store the blocks' magnitudes in 8 bits. {_default('double_quant')}",
        ),
    ] = None,
    calibration: Annotated[
        str, typer.Option(help=f"{TEXT_METHODS}: a text file, a directory, code, prose, wiki (see labs fetch), or a dataset.")
    ] = "code",
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    windows: Annotated[int, typer.Option(min=0, help="Windows that perplexity is measured on; 0 to leave it out.")] = 32,
    layout: Annotated[
        str | None, typer.Option("--format", help=f"{', '.join(stored_layouts())}; by default the method's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="The dtype of what is not quantized: float16 or bfloat16.")] = "float16",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default a GPU if there is one.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an unfinished run for the same directory.")] = False,
) -> None:
    """Quantize a model block by block and write it as AutoGPTQ, AutoAWQ, bitsandbytes, compressed-tensors or llama.cpp have it.

    One block is in memory at a time.

    A run that was stopped continues after its last finished block.
    """
    from labsupport import checkpoint
    from labsupport.checkpoint import card
    from labsupport.model import memory

    memory.return_freed(2**16)
    choices = {
        "symmetric": symmetric, "act_order": act_order, "static_groups": static_groups, "token_weights": token_weights,
        "damping": damping, "double_quant": double_quant,
    }  # fmt: skip
    try:
        checkpoint.quantize(
            model, out, method, bits=bits, group_size=group_size,
            **{name: value for name, value in choices.items() if value is not None}, calibration=calibration, samples=samples,
            length=length, windows=windows, layout=layout, dtype=dtype, device=device, restart=restart, progress=True,
            warn=lambda line: echo(f"labs quantize: {line}", err=True),
        )  # fmt: skip
    except (ValueError, OSError) as error:
        fail("quantize", error)
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        fail("quantize", "not enough memory. Finished blocks are kept; fewer --samples need less memory")
    except KeyboardInterrupt:
        stopped("quantize", "The same command continues after the last finished block")
    for line in card.remarks(out):
        echo(f"labs quantize: {line}", err=True)
    echo(f"wrote {out}; its card is {out / 'README.md'}")


@app.command()
def inspect(
    directory: Annotated[
        Path,
        typer.Argument(help="A quantized model: GPTQ, AWQ, 4-bit bitsandbytes, compressed-tensors, or GGUF (or the .gguf file)."),
    ],
) -> None:
    """Show what a quantized checkpoint holds, and look for known faults. Exit code 1 if there is one."""
    from labsupport import checkpoint

    try:
        inspection = checkpoint.inspect(directory)
    except (ValueError, OSError) as error:
        fail("inspect", error)
    for line in inspection.lines():
        echo(line)
    if inspection.findings:
        raise typer.Exit(1)
