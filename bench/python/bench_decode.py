"""Decoding, side by side with its peers: GPU time in a CUDA graph and host time of an eager call; verified, then timed.

python -m bench.python.bench_decode [--json FILE] [--no-peers] [--heads H ...] [--batches B ...] [--tokens T ...]

Every provider gets the same inputs and updates (or returns) the state of every sequence. States and inputs rotate
through more memory than the L2 holds. bench/cpp/bench_decode.cpp has the kernel alone over more shapes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

import kda_cuda

from .peers import PEERS
from .timing import copy_bandwidth, machine
from .truth import relative_error

DIM = 128
BATCHES, HEADS, TOKENS = (1, 8, 32, 128, 512), (8, 32, 64), (1, 4, 8)
STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def inputs(batch: int, heads: int, tokens: int, state_dtype: torch.dtype, seed: int, device: str = "cuda") -> dict:
    make = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=make, device=device)

    streams = {name: normal(batch, tokens, heads, DIM).bfloat16() for name in ("q", "k", "v", "g")}
    return streams | {
        "beta": normal(batch, tokens, heads).bfloat16(),
        "A_log": (1 + 15 * torch.rand(heads, generator=make, device=device)).log(),
        "dt_bias": normal(heads * DIM) - 4,
        "initial_state": normal(batch, heads, DIM, DIM).to(state_dtype),
        "use_qk_l2norm_in_kernel": True,
        "use_gate_in_kernel": True,
        "use_beta_sigmoid_in_kernel": True,
        "state_v_first": True,
    }


def ours(a: dict) -> torch.Tensor:
    rest = {name: x for name, x in a.items() if name != "initial_state"}
    return kda_cuda.decode(**rest, state=a["initial_state"])


def peers() -> dict[str, Callable]:
    """fla's kernel as a serving engine calls it, states in place: its public function would return fp32 copies."""
    try:
        from fla.ops.kda.fused_recurrent import fused_recurrent_kda_fwd
    except ImportError:
        return {}

    def fla(a: dict) -> torch.Tensor:
        return fused_recurrent_kda_fwd(**a, inplace_final_state=True)[0]

    return {"fla": fla}


def truth(a: dict) -> torch.Tensor:
    """The fp32 reference on the same device, from a copy of the state."""
    wide = {name: x.float() if name in ("q", "k", "v", "g", "beta") else x for name, x in a.items()}
    state = wide.pop("initial_state").clone()
    arguments = kda_cuda.decode.bind(**wide, state=state).arguments
    torch.ops.kda_cuda_reference.decode(*arguments)
    return arguments.out


def graph_microseconds(run: Callable[[dict], object], sets: list[dict]) -> float:
    """Median GPU time of one call, all sets in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for a in sets:
            run(a)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(20)]
    graph.replay()
    for begin, end in events:
        begin.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return 1000 * sorted(b.elapsed_time(e) for b, e in events)[10] / len(sets)


def host_microseconds(run: Callable[[dict], object], a: dict, calls: int = 50) -> float:
    """Median over rounds of what the host spends in an eager call, the GPU's queue never full."""
    rounds = []
    for _ in range(7):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(calls):
            run(a)
        rounds.append((time.perf_counter() - begin) / calls)
    torch.cuda.synchronize()
    return 1e6 * sorted(rounds)[3]


def bench(batch: int, heads: int, tokens: int, state: str, providers: dict, bandwidth: float) -> dict:
    dtype = STATE_DTYPES[state]
    need = batch * heads * (2 * DIM * DIM * dtype.itemsize + tokens * (5 * DIM + 1) * 2)
    sets = [inputs(batch, heads, tokens, dtype, seed) for seed in range(max(2, min(64, (200 << 20) // need)))]
    row = {"batch": batch, "heads": heads, "tokens": tokens, "state": state, "bytes": need,
           "floor_us": round(1e6 * need / bandwidth, 2)}  # fmt: skip
    for name, provider in providers.items():
        try:
            first = sets[0] | {"initial_state": sets[0]["initial_state"].clone()}  # as the last provider left it
            reference = truth(first)
            row[f"{name}_error"] = float(f"{relative_error(provider(first), reference):.2e}")
            if row[f"{name}_error"] > 2e-2:
                raise RuntimeError("wrong output, not timed")
            row[f"{name}_us"] = round(graph_microseconds(provider, sets), 2)
            row[f"{name}_host_us"] = round(host_microseconds(provider, first), 1)
        except Exception as e:  # a peer that cannot run a shape is a result; kda_cuda's failure ends the run in main
            row[f"{name}_failed"] = f"{type(e).__name__}: {str(e)[:120]}"
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--no-peers", action="store_true")
    for name, known in {"batches": BATCHES, "heads": HEADS, "tokens": TOKENS}.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", choices=known, default=known)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    providers = {"kda_cuda": ours, **({} if args.no_peers else peers())}
    bandwidth, rows = copy_bandwidth(), []
    result = {
        **machine("cuda"), "copy_bandwidth_tb_s": round(bandwidth / 1e12, 3),
        "dtype": "bfloat16", "head_dim": DIM,
        "peers": {name: PEERS[name].version() for name in providers if name != "kda_cuda"},
        "columns": "us: replay of a CUDA graph; host_us: of an eager call; floor_us: traffic at copy bandwidth",
        "rows": rows,
    }  # fmt: skip
    with torch.inference_mode():
        for state, heads, tokens, batch in product(STATE_DTYPES, args.heads, args.tokens, args.batches):
            rows.append(bench(batch, heads, tokens, state, providers, bandwidth))
            print(rows[-1], flush=True)
            if args.json:  # after every row: a run that is cut off leaves what it has
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(result, indent=1) + "\n")
    if failed := [row for row in rows if "kda_cuda_failed" in row]:
        raise SystemExit(f"kda_cuda failed on {len(failed)} shapes: {failed[0]}")


if __name__ == "__main__":
    main()
