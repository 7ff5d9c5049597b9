"""The set-up cell, the same in every notebook, and what stands before it so that a notebook also runs where there is only Colab.

`labs badges` writes what stands before it once the repository has a public address. Where the course is installed that part does
nothing, so it is no part of what was executed: a new address or a new version makes no stored output older than its source.
"""

from __future__ import annotations

import re

from nbformat import NotebookNode

from labsupport import __version__

SETUP = """\
import torch

from labsupport import claims, evaluate, figures, models, quantize_model, sweep, text
from labsupport.exercises import check, revisit, score, tally"""
# The notebook's own version of the course, and into this Python what is missing here. Two lines, so that all are six.
COLAB = """\
try: import labsupport
except ImportError: import sys; get_ipython().system("{clone}"); sys.path.insert(0, "course"); {install}
"""
CLONE = "[ -d course ] || git -c advice.detachedHead=false clone -q --depth 1 -b v{version} {repository} course"
INSTALL = "from labsupport.course.missing import install_missing; install_missing()"
ADDRESS = r"https://github\.com/[\w.-]+/[\w.-]+"
# What Colab reads in a notebook's metadata: the kind of machine it offers. The course needs no GPU, and shows more on one.
METADATA = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []}}


def _before(version: str, repository: str) -> str:
    return COLAB.format(clone=CLONE.format(version=version, repository=repository), install=INSTALL)


def setup(repository: str = "") -> str:
    """The source of the set-up cell. `repository`: public address, "" when there is none yet."""
    return (_before(__version__, repository) if repository else "") + SETUP


# With any version and any address.
BEFORE = re.compile(re.escape(_before("VERSION", "ADDRESS")).replace("VERSION", r"\d[\w.]*").replace("ADDRESS", ADDRESS))


def executed(cell: NotebookNode) -> str:
    """The source of a cell without what `setup` puts before it: all that is executed where the course is installed.

    Only those very lines are left out, and only of a cell that has the tag setup.
    """
    before = BEFORE.match(cell.source) if "setup" in cell.metadata.get("tags", []) else None
    return cell.source[before.end() :] if before else cell.source
