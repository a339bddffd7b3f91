"""Two builds of kda_cuda beside each other on one GPU, in alternating repeats: forwards, serving prompts, decoding.

python -m bench.python.compare_builds OLD [--json FILE] [--repeats N] [--device cuda|cpu] [--small-decode]
                                      [--ops chunk_kda|prefill|decode ...] [--shapes ten|large|all] [--only SHAPE ...]

OLD is another checkout, or any folder that contains a built package ``kda_cuda``. Each build runs in a process of its
own. Both get the same inputs, and every row says whether they returned the same bits. A ratio is new over old.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import torch

from .shapes import REGIMES, add_arguments, even, from_arguments, inputs, named, traffic_bytes
from .timing import eager_us, elapsed_us, graph_of, machine, side_stream, summary, synchronize

ROOT = Path(__file__).parents[2]
DECODE = {"batch": (1, 8, 32, 128, 512), "heads": (8, 32, 64), "tokens": (1, 4, 8), "state": ("fp32", "bf16")}
SMALL_DECODE = {"batch": (1,), "heads": (8,), "tokens": (1, 4), "state": ("fp32",)}
PROMPTS = tuple(even(*s) for s in ((1024, 32, 8), (2048, 8, 1), (4096, 32, 1), (8192, 16, 8)))
TIMES = ("gpu_us", "eager_us")
ROTATED_BYTES = 150 << 20  # inputs of a row together: more than the L2 holds
SERVE = "import sys; sys.path.insert(0, sys.argv[1]); from bench.python.compare_builds import serve; serve(sys.argv[2])"


# ---- in the process of one build -----------------------------------------------------------------------------------


class Row:
    """The calls of one row: what they return first, as a hash, then how long they take."""

    def __init__(self, row: dict, device: str):
        self.device = device
        self.stack = ExitStack()
        self.stack.enter_context(torch.inference_mode())
        self.stack.enter_context(side_stream(device))
        self.calls, self.results = CALLS[row["op"]](row, device)
        for call in self.calls:
            call()
        synchronize(device)
        self.graph = graph_of(self.calls, device)

    def bits(self) -> str:
        digest = hashlib.sha256()
        for x in self.results():
            digest.update(x.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def time(self) -> dict[str, float]:
        self.graph()
        gpu = min(elapsed_us(self.graph, self.device) for _ in range(3)) / len(self.calls)
        return {"gpu_us": gpu, "eager_us": eager_us(self.calls * 4, self.device)[1]}

    def close(self) -> None:
        self.graph = None
        self.stack.close()


def sets_of(bytes_of_one: int, most: int, device: str) -> int:
    """How many sets of inputs a row rotates through."""
    return max(2, min(most, ROTATED_BYTES // bytes_of_one)) if device == "cuda" else 2


def chunk_calls(row: dict, device: str) -> tuple[list[Callable], Callable]:
    from kda_cuda import chunk_kda

    shape = named(row["shape"])
    count = sets_of(traffic_bytes(shape, 128, 2), 8, device)
    sets = [inputs(shape, row["regime"], device, torch.bfloat16, seed=i) for i in range(count)]
    return [lambda a=a: chunk_kda(**a) for a in sets], lambda: chunk_kda(**sets[0])


def prefill_calls(row: dict, device: str) -> tuple[list[Callable], Callable]:
    """Prompts into every second slot of a pool, as an engine serves them."""
    from kda_cuda import prefill

    shape = named(row["shape"])
    bounds = torch.tensor([0, *shape.lengths]).cumsum(0).to(device, torch.int32)
    slots = 2 * torch.arange(len(shape.lengths), dtype=torch.int32, device=device)

    def arguments(seed: int) -> dict:
        a = inputs(shape, row["regime"], device, torch.bfloat16, seed=seed)
        del a["output_final_state"]
        pool = torch.zeros(2 * len(shape.lengths), shape.heads, 128, 128, device=device)
        return a | {"cu_seqlens": bounds, "state_pool": pool, "slot_of": slots, "state_v_first": True}

    def results() -> tuple[torch.Tensor, ...]:
        fresh = arguments(0)
        return prefill(**fresh), fresh["state_pool"]

    sets = [arguments(i) for i in range(sets_of(traffic_bytes(shape, 128, 2), 8, device))]
    return [lambda a=a: prefill(**a) for a in sets], results


def decode_calls(row: dict, device: str) -> tuple[list[Callable], Callable]:
    from . import bench_decode

    dtype = bench_decode.STATE_DTYPES[row["state"]]
    need = row["batch"] * row["heads"] * 2 * bench_decode.DIM**2 * dtype.itemsize
    count = sets_of(need, 64, device)
    shape = row["batch"], row["heads"], row["tokens"], dtype
    sets = [bench_decode.inputs(*shape, seed, device) for seed in range(count)]

    def results() -> tuple[torch.Tensor, ...]:
        fresh = bench_decode.inputs(*shape, 0, device)
        return bench_decode.ours(fresh)(), fresh["initial_state"]

    return [bench_decode.ours(a) for a in sets], results


CALLS = {"chunk_kda": chunk_calls, "prefill": prefill_calls, "decode": decode_calls}


def serve(device: str) -> None:
    """Answers the requests that come as lines of JSON: a row to set up, or None for its times."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints goes to the error stream
    row = None
    for line in sys.stdin:
        request = json.loads(line)
        if request is None:
            answer = row.time()
        else:
            if row is not None:
                row.close()
            row = Row(request, device)
            answer = {"bits": row.bits()}
        print(json.dumps(answer), file=out, flush=True)


# ---- in the process that asks --------------------------------------------------------------------------------------


class Build:
    """One build's process. Only its package is on the path, so that the benchmarks are this checkout's for both."""

    def __init__(self, package: Path, device: str, scratch: Path):
        (scratch / "kda_cuda").symlink_to(package.resolve())
        command = [sys.executable, "-c", SERVE, str(scratch), device]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: dict | None) -> dict:
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"compare_builds: a build ended while it had {request}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def rows_of(args: argparse.Namespace) -> list[dict]:
    prompts = args.only or PROMPTS
    sequences = [("chunk_kda", shape) for shape in from_arguments(args)] + [("prefill", shape) for shape in prompts]
    rows = [{"op": op, "shape": str(shape), "regime": r} for (op, shape), r in product(sequences, REGIMES)]
    rows += [{"op": "decode", **dict(zip(args.decode, row, strict=True))} for row in product(*args.decode.values())]
    return [row for row in rows if row["op"] in args.ops]


def compare(row: dict, builds: dict[str, Build], repeats: int) -> dict:
    bits = {name: build.ask(row)["bits"] for name, build in builds.items()}
    samples = {name: [] for name in builds}
    for i in range(repeats):
        for name in sorted(builds, reverse=bool(i % 2)):
            samples[name].append(builds[name].ask(None))
    row = row | {"same_bits": bits["old"] == bits["new"]}
    for time in TIMES:
        for name in builds:
            row[f"{name}_{time}"] = summary([s[time] for s in samples[name]])
        pairs = [new[time] / old[time] for old, new in zip(samples["old"], samples["new"], strict=True)]
        row[f"{time}_ratio"] = round(statistics.median(pairs), 4)
    return row


def geomeans(rows: list[dict]) -> dict[str, dict]:
    """Of the ratios of every op and regime: the geometric mean, the smallest and the largest."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(f"{row['op']} {row.get('regime') or row['state']}", []).append(row)
    return {
        name: {
            time: {
                "geomean": round(statistics.geometric_mean(ratios), 4),
                "min": min(ratios),
                "max": max(ratios),
            }
            for time in TIMES
            for ratios in [[row[f"{time}_ratio"] for row in group]]
        }
        for name, group in groups.items()
    }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small-decode", dest="decode", action="store_const", const=SMALL_DECODE, default=DECODE)
    parser.add_argument("--ops", nargs="+", choices=CALLS, default=list(CALLS))
    add_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> dict:
    parser = arguments()
    args = parser.parse_args(argv)
    packages = {"old": args.old / "kda_cuda", "new": ROOT / "kda_cuda"}
    for name, package in packages.items():
        if not (package / "__init__.py").is_file():
            parser.error(f"{name} is {package}, expected a package kda_cuda in it")
    with ExitStack() as stack:
        builds = {}
        for name, package in packages.items():
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            builds[name] = Build(package, args.device, scratch)
            stack.callback(builds[name].close)
        rows = []
        for row in rows_of(args):
            rows.append(compare(row, builds, args.repeats))
            print(json.dumps(rows[-1]), flush=True)
    result = {"machine": machine(args.device), "old": os.environ.get("KDA_CUDA_OLD_COMMIT", str(args.old))}
    result |= {"geomeans": geomeans(rows), "rows": rows}
    print(json.dumps(result["geomeans"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
