"""Chunkwise forward, side by side with its peers, in both gate regimes; outputs are verified before anything is timed.

python -m bench.python.bench_chunk_fwd [--json FILE] [--shapes ten|large|all] [--only SHAPE ...] [--no-peers]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import kda_cuda
from kda_cuda import variants

from .shapes import LARGE, REGIMES, TEN, Shape, inputs, traffic_bytes


def relative_error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x.float() - truth.float()).norm() / truth.float().norm()).item()


def truth(arguments: dict) -> torch.Tensor:
    """The fp32 reference on the same device: the arguments as chunk_kda hands them on, in the reference's namespace."""
    streams = ("q", "k", "v", "g", "beta")
    wide = {name: x.float() if name in streams else x for name, x in arguments.items()}
    with torch.inference_mode(), variants.planning():
        try:
            kda_cuda.chunk_kda(**wide)
        except variants.Planned as planned:
            call = planned
    with torch.inference_mode():
        return torch.ops.kda_cuda_reference.chunk_fwd(*call.arguments)[0]


def peers() -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    try:
        from fla.ops.kda import chunk_kda as fla_chunk_kda
    except ImportError:
        return found

    def fla(**a):
        return fla_chunk_kda(**a, safe_gate=a["lower_bound"] is not None)

    found["fla"] = fla
    return found


def microseconds(run: Callable[[dict], object], sets: list[dict], budget_s: float = 0.4) -> float:
    """Median time of one call on the GPU, over input sets that together exceed the L2."""
    for a in sets[:2]:
        run(a)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run(sets[0])
    torch.cuda.synchronize()
    count = max(5, min(100, int(budget_s / max(1e-5, time.perf_counter() - begin))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for i, (start, end) in enumerate(events):
        start.record()
        run(sets[i % len(sets)])
        end.record()
    torch.cuda.synchronize()
    return 1000 * sorted(s.elapsed_time(e) for s, e in events)[count // 2]


def graph_microseconds(run: Callable[[dict], object], sets: list[dict]) -> float:
    """Time of one call on the GPU alone: all input sets in one CUDA graph, replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for a in sets:
            run(a)
    return microseconds(lambda _: graph.replay(), [{}]) / len(sets)


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a large device copy."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    y = torch.empty_like(x)
    return 2 * x.numel() / (microseconds(lambda a: y.copy_(a["x"]), [{"x": x}]) * 1e-6)


def bench(shape: Shape, regime: str, providers: dict[str, Callable], bandwidth: float) -> dict:
    element = 2
    need = traffic_bytes(shape, 128, element)
    sets = [inputs(shape, regime, "cuda", torch.bfloat16, seed=i) for i in range(max(2, min(8, (150 << 20) // need)))]
    reference = truth(sets[0])
    row = {"shape": str(shape), "regime": regime, "floor_us": round(1e6 * need / bandwidth, 1)}
    for name, provider in providers.items():
        try:
            with torch.inference_mode():
                error = relative_error(provider(**sets[0])[0], reference)
                row[f"{name}_error"] = float(f"{error:.2e}")
                row[f"{name}_us"] = round(microseconds(lambda a, f=provider: f(**a), sets), 1)
                row[f"{name}_gpu_us"] = round(graph_microseconds(lambda a, f=provider: f(**a), sets), 1)
        except Exception as e:  # a peer that cannot run this shape is a result, not a failure of the benchmark
            row[f"{name}_failed"] = f"{type(e).__name__}: {str(e)[:120]}"
    return row


def peer_version(name: str) -> str:
    from importlib.metadata import version

    return version({"fla": "flash-linear-attention"}[name])


def git_head() -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", choices=("ten", "large", "all"), default="all")
    parser.add_argument("--only", nargs="*", metavar="SHAPE", help="shapes by name, such as T8192_H64_N1")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    providers = {"kda_cuda": kda_cuda.chunk_kda, **({} if args.no_peers else peers())}
    bandwidth = copy_bandwidth()
    rows: list[dict] = []
    result = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": os.environ.get("KDA_CUDA_COMMIT") or git_head(),
        "copy_bandwidth_tb_s": round(bandwidth / 1e12, 3),
        "dtype": "bfloat16",
        "head_dim": 128,
        "peers": {name: peer_version(name) for name in providers if name != "kda_cuda"},
        "columns": "us: eager, host included; gpu_us: replay of a CUDA graph; floor_us: traffic at copy bandwidth",
        "rows": rows,
    }
    shapes = {"ten": TEN, "large": LARGE, "all": TEN + LARGE}[args.shapes]
    for shape in shapes if args.only is None else [s for s in shapes if str(s) in args.only]:
        for regime in REGIMES:
            rows.append(bench(shape, regime, providers, bandwidth))
            print(rows[-1], flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
