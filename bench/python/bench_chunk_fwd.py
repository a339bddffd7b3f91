"""Chunkwise forward, side by side with its peers, in both gate regimes; outputs are verified before anything is timed.

python -m bench.python.bench_chunk_fwd [--json FILE] [--shapes ten|large|all] [--only SHAPE ...]
                                       [--peers [fla|flash_kda|cudnn ...] | --no-peers]

A peer that is not installed, or cannot do what a row asks, is named with the reason. fla compiles for minutes unless
`python -m bench.python.peers compile-fla` ran before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

import kda_cuda
from kda_cuda import variants

from .peers import PEERS, Call, load_peers
from .shapes import REGIMES, Shape, add_arguments, from_arguments, inputs, traffic_bytes
from .timing import copy_bandwidth, graph_microseconds, machine, microseconds
from .truth import relative_error

LARGEST_ERROR = 2e-2  # relative, of bf16 outputs


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


def ours(a: dict) -> Call:
    return lambda: kda_cuda.chunk_kda(**a)[0]


@torch.inference_mode()
def measure(bind: Callable[[dict], Call], sets: list[dict], reference: torch.Tensor) -> dict:
    calls = [bind(a) for a in sets]
    error = relative_error(calls[0](), reference)
    if not error <= LARGEST_ERROR:
        return {"error": error, "failed": "wrong output, not timed"}
    return {
        "error": float(f"{error:.2e}"),
        "us": round(microseconds(calls), 1),
        "gpu_us": round(graph_microseconds(calls), 1),
    }


def bench(shape: Shape, regime: str, providers: dict[str, Callable[[dict], Call]], bandwidth: float) -> dict:
    need = traffic_bytes(shape, 128, 2)
    sets = [inputs(shape, regime, "cuda", torch.bfloat16, seed=i) for i in range(max(2, min(8, (150 << 20) // need)))]
    reference = truth(sets[0])
    row = {"shape": str(shape), "regime": regime, "floor_us": round(1e6 * need / bandwidth, 1)}
    if split := kda_cuda.explain(**sets[0]).forward.plan.get("split"):
        row["kda_cuda_split"] = split
    for name, bind in providers.items():
        if name in PEERS and (reason := PEERS[name].unsupported(sets[0])):
            row[f"{name}_unsupported"] = reason
            continue
        try:
            columns = measure(bind, sets, reference)
        except Exception as e:  # a peer that cannot run this shape is a result, not a failure of the benchmark
            columns = {"failed": f"{type(e).__name__}: {str(e)[:160]}"}
        if name not in PEERS and "failed" in columns:
            raise SystemExit(f"{name} in {shape}, {regime}: {columns}")
        row |= {f"{name}_{column}": value for column, value in columns.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    add_arguments(parser)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--no-peers", dest="peers", action="store_const", const=[])
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    loaded, said = load_peers(args.peers)
    providers = {"kda_cuda": ours, **loaded}
    bandwidth = copy_bandwidth()
    rows: list[dict] = []
    result = {
        **machine("cuda"),
        "copy_bandwidth_tb_s": round(bandwidth / 1e12, 3),
        "dtype": "bfloat16",
        "head_dim": 128,
        "peers": said,
        "columns": "us: eager, host included; gpu_us: replay of a CUDA graph; floor_us: traffic at copy bandwidth",
        "rows": rows,
    }
    print(f"peers: {said}", flush=True)
    for shape in from_arguments(args):
        for regime in REGIMES:
            rows.append(bench(shape, regime, providers, bandwidth))
            print(rows[-1], flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
