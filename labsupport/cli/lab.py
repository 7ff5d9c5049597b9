"""labs lab, reset and check: what a learner types."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from labsupport import PACKAGE
from labsupport.cli.messages import echo, echo_lines, fail, stopped
from labsupport.model import memory

app = typer.Typer()
Chapter = Annotated[str, typer.Argument(metavar="NN", help="The chapter: 2, 02 or 02_rounding.")]
ELSEWHERE = "`--dir FOLDER` keeps your notebooks in another folder"
Folder = Annotated[Path | None, typer.Option("--dir", help="The workbook; by default the one in the repository.")]


def jupyter_command(folder: Path, first: str, browser: bool = True, port: int | None = None) -> list[str]:
    """JupyterLab rooted in `folder`, opening `first`."""
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}", f"--LabApp.default_url=/lab/tree/{first}"]
    if not browser:
        command.append("--no-browser")
    if port is not None:
        command.append(f"--port={port}")
    if hasattr(os, "geteuid") and os.geteuid() == 0:  # in a container; the server listens on this machine only, behind a token
        command.append("--allow-root")
    if os.environ.get("CODESPACES") == "true":  # the browser comes from the address that GitHub forwards the port to
        name, domain = (os.environ.get(n, "") for n in ("CODESPACE_NAME", "GITHUB_CODESPACES_PORT_FORWARDING_DOMAIN"))
        command.append(rf"--ServerApp.allow_origin_pat=https://{re.escape(name)}-\d+\.{re.escape(domain)}")
    return command


def jupyter_environment() -> dict[str, str]:
    """nbgrader's instructor panels and server extensions are off: they are for teachers, and crowd a learner's window."""
    settings = str(PACKAGE / "jupyter")
    paths = os.pathsep.join(filter(None, [settings, os.environ.get("JUPYTER_CONFIG_PATH")]))
    # The kernel is this environment's too, whatever "python3" a user has installed elsewhere.
    return os.environ | {"JUPYTER_CONFIG_PATH": paths, "JUPYTER_PREFER_ENV_PATH": "1"}


@app.command()
def lab(
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser on it.")] = True,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The first port to try.")] = None,
    folder: Folder = None,
) -> None:
    """Lay out your working copies of the notebooks and open JupyterLab on them."""
    import importlib.util

    from labsupport.course import workbook
    from labsupport.model import files

    if importlib.util.find_spec("jupyterlab") is None:
        fail("lab", "JupyterLab is not installed: pip install 'labsupport[lab]'")
    try:
        folder = (folder or workbook.default_dir()).resolve()
        first = next(iter(workbook.chapters().values())).name
        files.check_writable(folder / first)
        for line in workbook.lay_out(folder):
            echo(line)
    except files.WriteError as error:
        fail("lab", f"{error}; {ELSEWHERE}")
    except (workbook.WorkbookError, OSError) as error:
        fail("lab", error)
    if short := memory.warning():
        echo(short)
    echo(f"Your notebooks are in {folder}; Ctrl-C here stops JupyterLab.")
    sys.stdout.flush()
    command, env = jupyter_command(folder, first, browser, port), jupyter_environment()
    if os.name == "posix":
        os.execve(command[0], command, env)  # stopping this process then stops JupyterLab
    raise typer.Exit(subprocess.call(command, env=env))


@app.command()
def reset(
    number: Chapter,
    keep_answers: Annotated[bool, typer.Option("--keep-answers", help="Carry answers and predictions over.")] = False,
    folder: Folder = None,
) -> None:
    """A fresh copy of one notebook. The old one is kept in workbook/backups."""
    from labsupport.course import workbook
    from labsupport.model import files

    try:
        folder = folder or workbook.default_dir()
        files.check_writable(folder / workbook.chapter(number).name)
        for line in workbook.reset(folder, number, keep_answers):
            echo(line)
    except files.WriteError as error:
        fail("reset", f"{error}; {ELSEWHERE}")
    except (workbook.WorkbookError, OSError) as error:
        fail("reset", error)


@app.command()
def check(
    number: Chapter,
    timeout: Annotated[int | None, typer.Option(min=1, help="Seconds for each cell, after which it is interrupted.")] = None,
    folder: Folder = None,
) -> None:
    """Run your copy of one notebook from top to bottom and say how its exercises stand. Exit 1 if one is wrong.

    Ctrl-C ends it, says in which exercise it stood and shows the verdicts so far.
    """
    from rich.console import Console
    from rich.progress import Progress

    from labsupport.course import workbook
    from labsupport.course.headless import check_notebook

    try:
        path = workbook.chapter(number)
        copy = (folder or workbook.default_dir()).resolve() / path.name
        notebook = workbook.read(copy)
    except (workbook.WorkbookError, OSError) as error:
        fail("check", error)
    if short := memory.warning():
        echo(short, err=True)
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"running {copy.name}", total=len(notebook.cells))
        try:
            outcome = check_notebook(
                notebook, int(path.name[:2]), copy.parent, lambda index: progress.update(task, completed=index), timeout
            )
        except RuntimeError as error:  # nbclient raises it when a kernel dies as it starts
            fail("check", f"the kernel for {copy.name} did not start ({error})")
    for text in (*outcome.checks, *outcome.errors):
        echo_lines(text)
    if outcome.tally:
        echo_lines("\n" + outcome.tally)
    if outcome.interrupted:
        stopped("check", f"It stood {outcome.stopped.removeprefix('stopped ')}; what is above is what was found before")
    if outcome.stopped:
        fail("check", outcome.stopped)
    if outcome.wrong:
        raise typer.Exit(1)
