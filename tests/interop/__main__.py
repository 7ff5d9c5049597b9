"""`make interop`: AutoGPTQ and AutoAWQ run again, live, and are compared with the golden files and with labsupport.

A line a case; the exit code is 1 where something differs that may not. ARGS=--write makes the golden files anew.
"""

from __future__ import annotations

import argparse
import sys

import torch
from interop import environment, golden, live


def about(threads: int) -> dict[str, object]:
    """What a golden file says about where it is from."""
    processor = torch.backends.cpu.get_cpu_capability()
    return {"command": golden.COMMAND, "versions": environment.versions(), "threads": threads, "processor": processor}


def write(threads: int) -> None:
    golden.write_gptq(live.gptq(threads), about(threads))
    golden.write_awq(live.awq(threads), about(threads))
    for path in (golden.GPTQ, golden.AWQ):
        print(f"wrote {path.name}, {path.stat().st_size / 1e6:.2f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make interop", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make the golden files anew instead of comparing with them")
    parser.add_argument("--threads", type=int, default=1, help="of the peers and of labsupport; the golden files are of one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.write:
        write(options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
