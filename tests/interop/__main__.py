"""`make interop`: AutoGPTQ and AutoAWQ run again, live, and are compared with the golden files and with labsupport.

A line a case; the exit code is 1 where something differs that may not. ARGS=--write makes the golden files anew.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import torch
from interop import cases, compare, compressed, environment, golden, live, llama, load, ours, pack, served, tiny

from labsupport.install import InstallError

# A line to print, and whether what it says is as it should be.
Line = tuple[str, bool]


def gptq_layers(threads: int) -> Iterator[Line]:
    """Fresh results of the golden file's layers, a line for each setting."""
    kept = golden.read_gptq()
    for name, fresh in live.gptq(threads).items():
        weight, hessian = fresh.weight, fresh.hessian
        same = fresh.rounding == kept[name].rounding
        same_here = fresh.rounding == cases.rounding_of(hessian)
        for setting, result in fresh.results.items():
            file = compare.verdict(kept[name].results[setting], result, same)
            mine = compare.verdict(ours.by_gptq(weight, hessian, setting), result, same_here)
            yield f"AutoGPTQ {name} {setting.name}: golden file {file.said}, labsupport {mine.said}", file.good and mine.good


def gptq_course(threads: int) -> Iterator[Line]:
    """Every linear of the course model, a line for each with all its settings."""
    for name, weight, hessian, answer in live.course(threads):
        same_here = answer.rounding == cases.rounding_of(hessian)
        verdicts = {
            setting: compare.verdict(ours.by_gptq(weight, hessian, setting), result, same_here)
            for setting, result in answer.results.items()
        }
        equal = sum(verdict.said == compare.EQUAL for verdict in verdicts.values())
        bad = [f"{setting.name} {verdict.said}" for setting, verdict in verdicts.items() if not verdict.good]
        yield "; ".join([f"AutoGPTQ {name}: labsupport equal at {equal} of {len(verdicts)} settings", *bad]), not bad


def gptq_streamed(threads: int) -> Iterator[Line]:
    """Every linear of the course model in labsupport's own arithmetic on its own Hessian, AutoGPTQ on its own."""
    for name, weight, hessian, answer in live.course_from_inputs(threads):
        found = [
            compare.apart(weight, hessian, ours.by_gptq(weight, hessian, setting, autogptq=False), result)
            for setting, result in answer.results.items()
        ]
        share, gap = min(share for share, _ in found), max(gap for _, gap in found)
        said = f"{100 * share:.2f} % of codes equal or more, losses {gap:.1e} apart or less, at {len(found)} settings"
        yield f"AutoGPTQ {name}, each with its own Hessian: {said}", share >= compare.SHARE and gap <= compare.LOSS


def awq_models(threads: int) -> Iterator[Line]:
    """Fresh results of the golden file's tiny models, a line for each run. labsupport does not do what stock AutoAWQ does."""
    kept = golden.read_awq()
    for name, fresh in live.awq(threads).items():
        for run, found in fresh.results.items():
            otherwise = compare.rounds_otherwise(kept[name].results[run], found)
            file = compare.found_differences(kept[name].results[run], found, not otherwise)
            equal = "equal but for how this processor rounds" if otherwise else compare.EQUAL
            said = f"AutoAWQ {name} {run.name}: golden file {file or equal}"
            mine = ""
            if run.patched:
                mine = compare.found_differences(ours.by_awq(fresh, tiny.SHAPES[name], run), found.unpacked())
                said += f", labsupport {mine or compare.EQUAL}"
            yield said, not file and not mine


def speed(size: int, threads: int) -> Iterator[Line]:
    """Seconds of AutoGPTQ's solver and of labsupport's on one square layer, 4 bits g128. For the eye: never wrong."""
    for setting, theirs, mine in live.seconds(size, threads):
        said = f"AutoGPTQ {theirs:.2f} s, labsupport {mine:.2f} s, {theirs / mine:.1f} times as fast"
        yield f"{size}x{size} {setting.name}, {threads} threads: {said}", True


def quality(windows: int, threads: int) -> Iterator[Line]:
    """Perplexity of the course model by AutoAWQ and by labsupport, and the seconds that each took. For the eye: never wrong."""
    for who, perplexity, seconds in live.course_awq(windows, threads):
        yield (
            f"AWQ, 4 bits g128, {windows} x 512 tokens, {threads} threads: {who}, perplexity {perplexity:.4f}, {seconds:.1f} s",
            True,
        )


def write(threads: int) -> None:
    """The golden files, from fresh results."""
    processor = torch.backends.cpu.get_cpu_capability()
    about = {"command": golden.COMMAND, "versions": environment.LEGACY.versions(), "threads": threads, "processor": processor}
    golden.write_gptq(live.gptq(threads), about)
    golden.write_awq(live.awq(threads), about)
    pack.write(pack.live(threads), about)
    compressed.write(threads)
    for path in (golden.GPTQ, golden.AWQ, pack.PATH, compressed.PATH):
        print(f"wrote {path.name}, {path.stat().st_size / 1e6:.2f} MB")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make interop", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true", help="make the golden files anew instead of comparing with them")
    parser.add_argument("--small", action="store_true", help="leave out the linears of the course model; with --gguf, SmolLM2")
    parser.add_argument("--time", type=int, metavar="SIZE", help="only time the solvers on one layer of SIZE x SIZE")
    parser.add_argument("--awq", type=int, metavar="WINDOWS", help="only AWQ of the course model on WINDOWS x 512 tokens")
    parser.add_argument(
        "--load", action="store_true", help="only load checkpoints written here in other libraries, vLLM among them"
    )
    parser.add_argument("--serve", action="store_true", help="only `labs serve` with vLLM, on 20 prompts")
    parser.add_argument("--gguf", action="store_true", help="only run GGUF files written here in llama.cpp")
    parser.add_argument("--threads", type=int, default=1, help="of the peers and of labsupport; the golden files are of one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start, wrong, count = time.monotonic(), 0, 0
    try:
        if options.write:
            write(options.threads)
            return 0
        if options.time:
            parts = [speed(options.time, options.threads)]
        elif options.load:
            parts = [compressed.lines(options.threads), load.lines(options.threads)]
        elif options.serve:
            parts = [served.lines(options.threads)]
        elif options.gguf:
            parts = [llama.lines(options.threads, options.small)]
        elif options.awq:
            parts = [quality(options.awq, options.threads)]
        else:
            parts = [pack.lines(options.threads), gptq_layers(options.threads), awq_models(options.threads)]
            parts += [] if options.small else [gptq_course(options.threads), gptq_streamed(options.threads)]
        for part in parts:
            for said, good in part:
                print(said if good else f"DIFFERS {said}", flush=True)
                count, wrong = count + 1, wrong + (not good)
    except InstallError as error:
        print(f"make interop: {error}", file=sys.stderr)
        return 1
    print(f"{count} lines, {wrong} of them differ, {time.monotonic() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
