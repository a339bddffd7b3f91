"""``python -m kda_cuda.synthetic``: Palindrome, MQAR and Stack, learned by KDA and by two layers that lack a part.

Every task is learned by every variant, at every learning rate, from every seed, in the same number of steps.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch

from .models import VARIANTS
from .picture import best_runs, draw
from .tasks import TASKS, Task
from .training import Run, Sizes, learn

__all__ = ["main"]

# Lengths, symbols, keys. The small ones are learned on two CPU cores, the others are those of the report.
SMALL = {"palindrome": ([32], 16, 0), "mqar": ([64], 16, 32), "stack": ([48], 8, 8)}
FULL = {name: ([256, 512, 1024, 2048], 64, keys) for name, keys in (("palindrome", 0), ("mqar", 1024), ("stack", 64))}
SMALL_SIZES = Sizes(hidden_size=32, num_heads=1, head_dim=16, batch=32, steps=500, evaluations=20)
SMALL_RATES, FULL_RATES = [1e-2], [5e-5, 1e-4, 5e-4, 1e-3]
SIZES = {  # options, and the fields of Sizes that they set
    "hidden": "hidden_size",
    "layers": "num_layers",
    "heads": "num_heads",
    "head_dim": "head_dim",
    "batch": "batch",
    "steps": "steps",
    "evaluations": "evaluations",
    "held_out": "held_out",
}


def options(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kda_cuda.synthetic", description=__doc__)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--variant", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--full", action="store_true", help="the sizes of the report, for a GPU")
    parser.add_argument("--length", nargs="+", type=int, help="tokens of a row; the default depends on the task")
    parser.add_argument("--symbols", type=int, help="how many different symbols or values")
    parser.add_argument("--keys", type=int, help="how many different keys (mqar), or stacks")
    parser.add_argument("--lr", nargs="+", type=float, help="learning rates; the best of each variant is drawn")
    parser.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--workers", type=int, help="runs at once; default: one for each core, on a GPU one")
    parser.add_argument("--out", type=Path, default=Path("synthetic_out"), help="folder for the JSON and the picture")
    return parser.parse_args(given)


def sizes_of(o: argparse.Namespace) -> Sizes:
    known = asdict(Sizes() if o.full else SMALL_SIZES)
    return Sizes(**known | {field: getattr(o, name) for name, field in SIZES.items() if getattr(o, name) is not None})


def runs_of(o: argparse.Namespace) -> Iterator[Run]:
    """Seed by seed, so that an interrupted grid has something of every variant."""
    rates = o.lr or (FULL_RATES if o.full else SMALL_RATES)
    for seed, name, lr in itertools.product(o.seed, o.task, rates):
        lengths, symbols, keys = (FULL if o.full else SMALL)[name]
        symbols, keys = (own if given is None else given for own, given in ((symbols, o.symbols), (keys, o.keys)))
        for length, variant in itertools.product(o.length or lengths, o.variant):
            yield Run(Task(name, length, symbols, keys), variant, lr, seed)


def learned(runs: Sequence[Run], sizes: Sizes, device: str, dtype: torch.dtype, workers: int) -> Iterator[dict]:
    """Rows in the order in which they are ready; with several workers, each is a process with one thread."""
    if workers == 1:
        yield from (learn(run, sizes, device, dtype) for run in runs)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    try:
        for done in as_completed([pool.submit(learn, run, sizes, device, dtype) for run in runs]):
            yield done.result()
    finally:  # after an error or Ctrl-C, what has not begun does not begin
        pool.shutdown(cancel_futures=True)


def summary(rows: Sequence[dict]) -> list[str]:
    """A line for each task, length and variant, over the seeds at its best learning rate."""
    lines = []
    for task, length in dict.fromkeys((row["task"], row["length"]) for row in rows):
        for variant in VARIANTS:
            if best := best_runs(rows, task, length, variant):
                right = [row["accuracy"] for row in best]
                solved = [row["solved_at"] for row in best if row["solved_at"]]
                when = f", at step {round(mean(solved))} on average" if solved else ""
                ends = f"{min(right):.3f} to {max(right):.3f} right, solved by {len(solved)} of {len(best)} seeds{when}"
                lines.append(f"{task:10} {length:5} {variant:14} lr {best[0]['lr']:g}: {ends}")
    return lines


def commit() -> str | None:
    """Of the checkout that runs; None for an installed package, also inside another project's checkout."""
    folder = Path(__file__).parent
    if not (folder.parents[1] / "setup.py").exists():
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def save(out: Path, result: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "synthetic.json").write_text(json.dumps(result, indent=1) + "\n")


def main(given: Sequence[str] | None = None) -> dict:
    """Learns the grid; writes and returns every run."""
    o = options(given)
    sizes, runs = sizes_of(o), list(runs_of(o))
    if o.workers is not None and o.workers < 1:
        raise ValueError(f"kda_cuda.synthetic: --workers is {o.workers}, expected at least 1")
    workers = o.workers or (os.cpu_count() if o.device == "cpu" else 1)
    dtype = getattr(torch, o.dtype or ("float32" if o.device == "cpu" else "bfloat16"))
    gpu = torch.cuda.get_device_name() if o.device.startswith("cuda") else None
    result = {"commit": commit(), "date": datetime.date.today().isoformat(), "machine": platform.platform()}
    result |= {"torch": torch.__version__, "python": platform.python_version(), "cpus": os.cpu_count(), "gpu": gpu}
    result |= {"device": o.device, "dtype": str(dtype).removeprefix("torch."), "workers": workers, "seconds": 0.0}
    result |= {"sizes": asdict(sizes), "rows": []}
    begin = time.monotonic()
    for row in learned(runs, sizes, o.device, dtype, workers):
        result["rows"].append(row)
        result["seconds"] = round(time.monotonic() - begin, 1)
        save(o.out, result)
        done = len(result["rows"])
        left = result["seconds"] * (len(runs) - done) / done
        print(
            f"[{done}/{len(runs)}, about {left:.0f} s left] {row['task']} {row['length']} {row['variant']} "
            f"lr {row['lr']:g} seed {row['seed']}: {row['accuracy']:.3f} right after {row['curve'][-1][0]} steps, "
            f"{row['seconds']} s",
            flush=True,
        )
    print("\n".join(summary(result["rows"])))
    if importlib.util.find_spec("matplotlib"):
        draw(o.out / "synthetic.png", result["rows"])
    else:
        print("no picture: matplotlib is not installed")
    return result


if __name__ == "__main__":
    main()
