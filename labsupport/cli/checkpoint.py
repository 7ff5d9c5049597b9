"""labs quantize, labs inspect."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()
M_MMAP_THRESHOLD = -3  # malloc.h of glibc


def _return_memory() -> None:
    """Have glibc hand every tensor's memory back when it is freed. By itself it keeps more and more, a little for each block."""
    import ctypes

    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)


def _is_memory(error: BaseException) -> bool:
    """Whether memory ran out. torch says so in a RuntimeError like any other."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in said or "can't allocate memory" in said


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="A model directory (config.json, safetensors), or a hub id.")],
    out: Annotated[Path, typer.Option(help="The directory to write. It must not exist.")],
    method: Annotated[str, typer.Option(help="gptq, awq, nf4 or rtn.")] = "gptq",
    bits: Annotated[int, typer.Option(help="4, 3, 8 or 2; awq and nf4 have 4.")] = 4,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; -1 for a row. By default 128; nf4: the block, 64.")
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Grids with the zero-point in the middle: what vLLM takes of GPTQ.")
    ] = False,
    act_order: Annotated[bool, typer.Option("--act-order", help="gptq: the columns with the largest inputs first.")] = False,
    static_groups: Annotated[bool, typer.Option("--static-groups", help="gptq: groups stay neighbors under --act-order.")] = False,
    damping: Annotated[float, typer.Option(help="gptq: share of the Hessian's mean diagonal that is added to it.")] = 0.01,
    double_quant: Annotated[bool, typer.Option("--double-quant/--no-double-quant", help="nf4: magnitudes in 8 bits.")] = True,
    calibration: Annotated[str, typer.Option(help="gptq, awq: a text file, a directory, code, prose, or a dataset.")] = "code",
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    windows: Annotated[int, typer.Option(min=0, help="Windows that perplexity is measured on; 0: do not measure.")] = 32,
    layout: Annotated[
        str | None, typer.Option("--format", help="gptq, gptq_v2, awq, bitsandbytes; default the method's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what is not quantized: float16 or bfloat16.")] = "float16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda; by default a GPU where there is one.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget an unfinished run for the same directory.")] = False,
) -> None:
    """Quantize a model block by block, with no more than one in memory, and write what AutoGPTQ, AutoAWQ or bitsandbytes would.

    A run that was stopped goes on after its last finished block.
    """
    from labsupport import checkpoint

    _return_memory()
    try:
        checkpoint.quantize(
            model, out, method, bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order,
            static_groups=static_groups, damping=damping, double_quant=double_quant, calibration=calibration, samples=samples,
            length=length, windows=windows, layout=layout, dtype=dtype, device=device, restart=restart, progress=True,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        typer.echo(f"labs quantize: {error}", err=True)
        raise typer.Exit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        typer.echo("labs quantize: there is not memory enough; finished blocks are kept. Fewer --samples take less", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("labs quantize: stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"wrote {out}; its card is {out / 'README.md'}")


@app.command()
def inspect(directory: Annotated[Path, typer.Argument(help="A quantized model: GPTQ, AWQ or 4-bit bitsandbytes.")]) -> None:
    """Say what a quantized checkpoint holds, and find known faults. Exit 1 if there is one."""
    from labsupport import checkpoint

    try:
        found = checkpoint.inspect(directory)
    except (ValueError, OSError) as error:
        typer.echo(f"labs inspect: {error}", err=True)
        raise typer.Exit(1) from None
    for line in found.lines():
        typer.echo(line)
    if found.findings:
        raise typer.Exit(1)
