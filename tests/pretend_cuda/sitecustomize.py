"""Python reads this file when it starts with this folder on PYTHONPATH: with PRETEND_CUDA=1 the process has the pretend GPU."""

import os

if os.environ.get("PRETEND_CUDA") == "1":
    import pretend_cuda  # noqa: F401
