"""`labs`: one file a command group. Heavy libraries are imported inside the commands, so that `labs --help` is quick."""

from __future__ import annotations

import typer

from labsupport.cli import build, checkpoint, env, lab, model

app = typer.Typer(
    help="Quantization from First Principles: the course's commands.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (lab, env, model, checkpoint, build):
    app.add_typer(group.app)
