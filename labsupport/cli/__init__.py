"""`labs`: one file a command group. Heavy libraries are imported inside the commands, so that `labs --help` is quick."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from labsupport.cli import build, capstone, checkpoint, claims, env, fetch, lab, messages, model, plan, serve, teach
from labsupport.install import get_extra
from labsupport.model import quick

NOTEBOOKS = ("lab", "check")  # the commands whose notebooks LABS_QUICK makes short
UsageError = typer.BadParameter.__base__  # typer has it from click, or since 0.29 from its own copy of click


class Commands(TyperGroup):
    """The commands. An option or argument that is refused is one line on standard error, like every other mistake.

    So is a file that cannot be written, and a package that is missing: a learner's environment lacks what only teachers and those
    who work on the course need.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a folder's name may have letters that this terminal has not
        try:
            # In standalone mode typer answers a wrong option with five lines and a box.
            code = super().main(*args, **extra | {"standalone_mode": False, "prog_name": "labs"})
        except UsageError as error:
            command = error.ctx.command_path if error.ctx else "labs"
            message = " ".join(error.format_message().split()).removesuffix(".") or "a command is missing"
            messages.echo(f"{command}: {message}; `{command} --help` lists what there is", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            from labsupport.model.files import WriteError

            if not isinstance(error, WriteError):
                raise
            messages.echo(f"labs: {error}", err=True)
            sys.exit(1)
        except ModuleNotFoundError as error:
            if (error.name or "labsupport").partition(".")[0] == "labsupport":
                raise
            messages.echo(f"labs: {error.name} is not installed, and this needs it: {get_extra('dev')}", err=True)
            sys.exit(1)
        sys.exit(code or 0)


app = typer.Typer(cls=Commands, add_completion=False, pretty_exceptions_enable=False)
for group in (lab, env, fetch, plan, model, checkpoint, serve, capstone, claims, build, teach):
    app.add_typer(group.app)


@app.callback(invoke_without_command=True)
def labs(context: typer.Context) -> None:
    """Quantization from First Principles: the course's commands."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    if context.invoked_subcommand not in NOTEBOOKS:
        os.environ.pop(quick.VARIABLE, None)  # what is measured for others is measured in full
