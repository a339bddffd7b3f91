"""Everything that is measured, in one command: each benchmark beside its peers, then the report.

make bench [ARGS="..."]    or    python -m bench.python.suite [--out FOLDER] [--size full|quick|small] [--only NAME ...]
                                                              [--seconds N] [--device cuda|emulator|cpu]

Nothing is installed: the peers that can be imported are measured, and the others are named. Results are JSON files in
the folder (build/performance), each written after every row, so a run that is killed keeps what it has. README.md and
its figures there are drawn from them alone.

On a GPU each benchmark is a process of its own, so that a fault ends one of them, and has its share of the time. Half
of it may go to fla's kernels, which are compiled first. full takes about 40 minutes at most and quick 11, or --seconds.
Without a GPU the size is small, and the kernels run on the emulator, if `make emulator` has built it; otherwise the
reference is all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from kda_cuda import testing

from . import bench_chunk_bwd, bench_chunk_fwd, bench_decode, bench_layer, bench_surround, report
from .harness import device_argument, positive

OUT = report.ROOT / "build" / "performance"
LATE_S = 60  # a benchmark that has not ended so long after its budget is killed
TINY = "--rounds 1 --head-dim 16"


@dataclass(frozen=True)
class Step:
    """A benchmark: its arguments and seconds by size, and what compiles its peers first, in half of them."""

    main: Callable[[list[str]], None]
    arguments: dict[str, str]
    seconds: dict[str, int]
    compile: dict[str, str]  # arguments of bench.python.peers

    @property
    def module(self) -> str:
        return self.main.__module__


STEPS = {
    "chunk_fwd": Step(
        bench_chunk_fwd.main,
        {"full": "", "quick": "--only T2048_H16_N1 T8192_H16_N1 T8192_H64_N8", "small": f"--only T20_H1_N1 {TINY}"},
        {"full": 480, "quick": 120},
        {"full": "compile-fla", "quick": "compile-fla --only T8192_H16_N1 T8192_H64_N8"},
    ),
    "chunk_bwd": Step(
        bench_chunk_bwd.main,
        {"full": "", "quick": "--quick", "small": f"--shapes T20_H1_N1 {TINY}"},
        {"full": 720, "quick": 180},
        {"full": "compile-fla --backward", "quick": "compile-fla --backward --only T8192_H16_N1"},
    ),
    "decode": Step(
        bench_decode.main,
        {
            "full": "--heads 32 --batches 1 8 32 128 --tokens 1 4",
            "quick": "--heads 32 --batches 1 32 --tokens 1",
            "small": f"--heads 1 --batches 2 --tokens 1 3 --context 20 {TINY}",
        },
        {"full": 300, "quick": 60},
        {},
    ),
    "layer": Step(
        bench_layer.main,
        {
            "full": "",
            "quick": "--tokens 8192 --rounds 5",
            "small": f"--hosts kda_cuda transformers --tokens 20 --hidden 24 --heads 1 --dtype float32 {TINY}",
        },
        {"full": 600, "quick": 240},
        {},
    ),
    "surround": Step(
        bench_surround.main,
        {"full": "", "quick": "--shapes 8192x4096 --ops short_conv", "small": "--shapes 6x2x8 --rounds 1"},
        {"full": 180, "quick": 40},
        {},
    ),
}


def here() -> str:
    """The device that this machine has."""
    if torch.cuda.is_available():
        return "cuda"
    return "emulator" if testing.emulator_path().exists() else "cpu"


def in_process(command: list[str], seconds: float) -> str | None:
    """Runs Python in a process that is killed after so many seconds; why it failed."""
    try:
        done = subprocess.run([sys.executable, *command], timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"killed after {seconds:g} s"
    return f"exit status {done.returncode}" if done.returncode else None


def call(main: Callable[[list[str]], None], arguments: list[str]) -> str | None:
    """Runs a benchmark in this process; why it failed. The others go on, as they do where each one is a process."""
    try:
        main(arguments)
    except SystemExit as e:
        return str(e) if e.code else None
    except Exception as e:
        traceback.print_exc()
        return f"{type(e).__name__}: {e}"
    return None


def seconds_of(step: Step, args: argparse.Namespace) -> float:
    """A step's share of --seconds, if they are given."""
    everything = sum(STEPS[name].seconds[args.size] for name in args.only) if args.seconds else 1
    return step.seconds[args.size] * (args.seconds or 1) / everything


def measure(step: Step, args: argparse.Namespace, path: Path) -> str | None:
    """Runs a benchmark; why it failed."""
    arguments = [*step.arguments[args.size].split(), "--device", args.device.name, "--out", str(path)]
    if args.device != "cuda":
        return call(step.main, arguments)
    seconds, begin = seconds_of(step, args), time.monotonic()
    if step.compile and find_spec("fla"):
        limit = f"{seconds / 2:.0f}"
        compile_peers = ["-m", "bench.python.peers", *step.compile[args.size].split(), "--seconds", limit]
        if why := in_process(compile_peers, seconds / 2 + LATE_S):
            print(f"fla's kernels are not all compiled: {why}", flush=True)
    if step.main is bench_layer.main:
        arguments += ["--compile", f"{seconds / 2:.0f}"]
    left = max(0.0, seconds - (time.monotonic() - begin))
    return in_process(["-m", step.module, *arguments, "--budget", f"{left:.0f}"], left + LATE_S)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--size", choices=("full", "quick", "small"))
    parser.add_argument("--seconds", type=positive, help="for everything, on a GPU")
    parser.add_argument("--device", type=device_argument, default=device_argument(here()))
    args = parser.parse_args(given)
    args.size = args.size or ("full" if args.device == "cuda" else "small")
    if args.device != "cuda" and args.size != "small":
        parser.error(f"size is {args.size!r}, expected small on a CPU")
    if args.device == "cuda" and args.size == "small":
        parser.error("size is 'small', expected full or quick on a GPU")
    if args.device.name == "cpu":
        print("No GPU, and no emulator (make emulator builds it): kda_cuda is its reference here", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    args.only = list(dict.fromkeys(args.only))
    files, failed = {name: args.out / f"{name}.json" for name in args.only}, {}
    for path in files.values():
        path.unlink(missing_ok=True)  # no report shows a result of an earlier run
    report_path = args.out / "README.md"
    for name, path in files.items():
        begin = time.monotonic()
        print(f"=== {name}", flush=True)
        why = measure(STEPS[name], args, path)
        if why:
            failed[name] = why
        print(f"=== {name}: {why or 'ok'}, {time.monotonic() - begin:.0f} s", flush=True)
        written = [path for path in files.values() if path.exists()]
        report.write(written, report_path, failed, figures=name == args.only[-1])
    print(f"The report is {report_path}", flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(files)} benchmarks failed: {failed}")


if __name__ == "__main__":
    main()
