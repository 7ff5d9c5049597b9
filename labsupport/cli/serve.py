"""labs serve: a checkpoint behind an OpenAI-compatible port."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from labsupport.cli.messages import echo, fail, stopped

app = typer.Typer()


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A model directory, quantized or not, a .gguf file, or a name of labs fetch.")],
    engine: Annotated[str, typer.Option(help="auto, vllm, llama.cpp or transformers, which runs everywhere.")] = "auto",
    host: Annotated[
        str, typer.Option(help="The address to listen on; whoever can reach another than this one may use the model.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 for one that is free.")] = 8000,
    kv_cache: Annotated[
        str,
        typer.Option(help="fp8, which vLLM has; model, for the model's dtype; auto: fp8 where a GPU computes in it."),
    ] = "auto",
    measure: Annotated[
        bool, typer.Option("--measure", help="Ask it through the OpenAI client, store tokens a second and memory, and stop.")
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="--measure: tokens of an answer.")] = 64,
    out: Annotated[Path | None, typer.Option(help="--measure: JSON file; default data/measurements/serving.json.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the server writes.")] = False,
) -> None:
    """Serve a checkpoint on an OpenAI-compatible port with what can run here: vLLM, llama.cpp or a small server of the course.

    Says which was picked, and why the others were not. Ctrl-C stops it.
    """
    from labsupport.checkpoint.serving import choose, launch
    from labsupport.evidence import bench, serving

    def on_line(line: str) -> None:
        if verbose:
            echo(line, err=True)

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # who ends this process ends the server
    try:
        if measure:
            serving.check_client()
            bench.check_writable(out or serving.default_path())
        stored, machine = choose.look_at(model), choose.this_machine()
        port = launch.free_port(host, port)
        choice = choose.choose(stored, machine, engine, host, port, kv_cache)
        echo(choice.reason)
        with launch.running(choice, host, port, on_line) as server:
            if not measure:
                echo(f"{stored.name} is served at {server.url}; Ctrl-C stops it")
                server.wait()
            served = serving.measure(server.url, max_tokens=tokens, pid=server.pid)
    except (ValueError, OSError, launch.ServerError) as error:
        first, *lines = str(error).split("\n")
        echo(f"labs serve: {first}", err=True)
        for line in lines:  # what a server said before it died
            echo(line, err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        stopped("serve", "The server has ended")
    command = f"labs serve {model} --engine {engine} --measure --tokens {tokens}"
    about = {"model": stored.name, "layout": stored.layout, "bits": stored.bits, "nbytes": stored.nbytes, "engine": choice.engine}
    new = serving.row(served, command=command, max_tokens=tokens, versions=choice.version, **about)
    try:
        serving.store(out or serving.default_path(), new)
    except (ValueError, OSError) as error:
        fail("serve", error)
    speed = f"{served.tokens} tokens in {served.seconds:.1f} s, {served.rate:.1f} tokens/s"
    echo(f"{speed}; memory at most {(served.peak or 0) / 1e6:.0f} MB")
    echo(f"wrote {out or serving.default_path()}")
