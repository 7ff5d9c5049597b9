"""The package on a CUDA device: on a GPU where there is one, and otherwise on a pretended one (pretend_cuda/)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "pretend_cuda"


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Another Python: the pretend GPU has to be there before torch is imported."""
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent), str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], env=os.environ | {"PYTHONPATH": path} | env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_package_runs_on_a_cuda_device():
    real = torch.cuda.is_available()
    if not real and (reason := re.search("ImportError: (the pretend GPU .*)", python("-c", "import pretend_cuda").stderr)):
        pytest.skip(reason[1])
    files = [str(FOLDER / name) for name in ("on_cuda.py", "gpu_against_cpu.py")]
    done = python("-m", "pytest", "-p", "no:cacheprovider", *files, PRETEND_CUDA="0" if real else "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 60
    assert real or "skipped" not in done.stdout
