"""Compiles the kernels of peers before they are timed, in processes beside each other.

python -m bench.python.peers compile-fla [--backward] [--tuned] [--shapes ten|large|all] [--only SHAPE ...]
                                         [--workers N] [--seconds N]
python -m bench.python.peers compile-cudnn

compile-fla compiles fla's kernels for every configuration that its autotuner will try, in as many processes as there
are cores: Triton compiles on one core, and fla's autotuning keys contain the heads and whether there is cu_seqlens. The
processes of one key share its configurations. The benchmark in the same TRITON_CACHE_DIR then only times them. --tuned
compiles what an earlier run found best, where that folder has its *.autotune.json, and nothing else.
compile-cudnn lets cudnn-frontend compile the kernels of its core, forward and backward, into its own cache.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from . import shapes, truth
from .providers import Call, load_cudnn_core, load_fla
from .shapes import Shape


def cores() -> int:
    """Those that this process may use, at most 16: each compiling process takes memory on the GPU too."""
    return min(16, len(os.sched_getaffinity(0)))


def tuning_keys(chosen: tuple[Shape, ...]) -> list[tuple[Shape, str]]:
    """One shape for each key of fla's autotuners: heads, cu_seqlens or not, and the regime (another kernel)."""
    first: dict[tuple[int, bool], Shape] = {}
    for shape in chosen:
        first.setdefault((shape.heads, len(shape.lengths) > 1), shape)
    return [(shape, regime) for shape in first.values() for regime in shapes.REGIMES]


def launch_share(share: int, shares: int) -> Callable:
    """A benchmark for Triton's autotuner: launches every ``shares``-th configuration once, and times none. What was
    launched is preferred to what was not, and that to what cannot be."""
    turn = itertools.count()

    def launch(kernel_call, quantiles):
        if next(turn) % shares != share:
            return [2.0] * len(quantiles)
        kernel_call()
        return [1.0] * len(quantiles)

    return launch


def launch_configurations(share: int, shares: int) -> None:
    """From here on Triton's autotuner launches a share of the configurations, and times none. Nothing is remembered but
    the compiled code."""
    os.environ["FLA_CACHE_RESULTS"] = "0"
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = staticmethod(launch_share(share, shares))


def launch_first() -> None:
    """From here on Triton's autotuner takes the first configuration of each kernel, and times and compiles no other."""
    from triton.runtime.autotuner import Autotuner

    def untimed(kernel_call, quantiles):
        return [1.0] * len(quantiles)

    Autotuner.do_bench = staticmethod(untimed)


def run_once(bind: Callable[[dict], Call], form: str, shape: Shape, regime: str, backward: bool) -> None:
    (arguments,), do = shapes.training_inputs(form, shape, regime, "cuda", sets=1)
    if backward:
        leaves = truth.leaves_of(arguments)
        truth.step(bind(arguments | leaves), leaves, do)
    else:
        with torch.inference_mode():
            bind(arguments | {"output_final_state": True})()
    torch.cuda.synchronize()


def compile_one(shape: Shape, regime: str, share: int, shares: int, backward: bool, tuned: bool) -> None:
    """A share of the configurations, none of them timed. If tuned, the configuration that an earlier run found best,
    and an error where none did."""
    os.environ["FLA_CACHE_RESULTS"] = "1" if tuned else "0"
    bind = load_fla()
    if tuned:
        from triton.runtime.autotuner import Autotuner

        Autotuner.do_bench = staticmethod(refuse_to_tune)
    else:
        launch_configurations(share, shares)
    run_once(bind, "fused", shape, regime, backward)


def refuse_to_tune(kernel_call, quantiles):
    raise RuntimeError("a kernel has no result of an earlier run in TRITON_CACHE_DIR, expected one with --tuned")


def compile_tasks(chosen: tuple[Shape, ...], workers: int) -> list[tuple[Shape, str, int, int]]:
    """Shape, regime, share and shares of each process: a process at least for each key, and all workers busy."""
    keys = tuning_keys(chosen)
    shares = max(1, workers // len(keys))
    return [(*key, share, shares) for key in keys for share in range(shares)]


def in_processes(commands: dict[str, list[str]], workers: int, seconds: float | None = None) -> dict[str, str]:
    """Runs commands beside each other, within so many seconds together; says of each how it ended, and returns by name
    why the others failed."""
    start, failed = time.perf_counter(), {}
    limit = "" if seconds is None else f", at most {seconds:g} s"
    print(f"{len(commands)} processes, {workers} at once{limit}", flush=True)

    def work(name: str) -> None:
        begin = time.perf_counter()
        left = None if seconds is None else seconds - (begin - start)
        try:
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(commands[name], seconds)
            done = subprocess.run(commands[name], capture_output=True, text=True, timeout=left)
            error = "" if done.returncode == 0 else f"failed: {done.stderr.strip()[-300:]}"
        except subprocess.TimeoutExpired:
            error = f"{seconds:g} s were not enough"
        if error:
            failed[name] = error
        print(f"{name}: {time.perf_counter() - begin:.0f} s{error and ', ' + error}", flush=True)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        list(pool.map(work, commands))
    return failed


def compile_fla(chosen: tuple[Shape, ...], workers: int, flags: list[str], seconds: float | None) -> dict[str, str]:
    """Why processes failed, by their names."""
    tasks = compile_tasks(chosen, 1 if "--tuned" in flags else workers)
    commands = {}
    for task in tasks:
        arguments = [*(str(x) for x in task), *flags]
        commands[" ".join(arguments)] = [sys.executable, "-m", "bench.python.peers", "compile-one", *arguments]
    return in_processes(commands, workers, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    everything = commands.add_parser("compile-fla")
    shapes.add_arguments(everything)
    everything.add_argument("--workers", type=int, default=cores())
    everything.add_argument("--seconds", type=float, help="after which no more is compiled")
    commands.add_parser("compile-cudnn")
    one = commands.add_parser("compile-one", help="what each process of compile-fla runs")
    one.add_argument("shape", type=shapes.shape_argument)
    one.add_argument("regime", choices=shapes.REGIMES)
    one.add_argument("share", type=int)
    one.add_argument("shares", type=int)
    for command in (everything, one):
        command.add_argument("--backward", action="store_true", help="forward and backward, as in training")
        command.add_argument("--tuned", action="store_true", help="only what an earlier run found best")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("peers' kernels are compiled for a CUDA device, and there is none")
    if args.command == "compile-one":
        return compile_one(args.shape, args.regime, args.share, args.shares, args.backward, args.tuned)
    if args.command == "compile-cudnn":
        return run_once(load_cudnn_core(), "core", shapes.CORE[0], "fast", backward=True)
    chosen = shapes.FUSED if args.backward and not args.only else shapes.from_arguments(args)
    flags = [f"--{name}" for name in ("backward", "tuned") if getattr(args, name)]
    sys.exit(bool(compile_fla(chosen, args.workers, flags, args.seconds)))


if __name__ == "__main__":
    main()
