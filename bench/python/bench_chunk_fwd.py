"""Chunkwise forward, side by side with its peers, in both gate regimes; outputs are verified before anything is timed.

python -m bench.python.bench_chunk_fwd [--out FILE] [--shapes ten|large|all] [--only SHAPE ...]
                                       [--regimes fast|long ...] [--peers [NAME ...] | --no-peers] [--rounds N]
                                       [--budget SECONDS] [--head-dim N] [--device cuda|emulator|cpu]

A peer that is not installed, or cannot do what a row asks, is named with the reason. fla compiles for minutes unless
`python -m bench.python.peers compile-fla` ran before. Results of more than a million tokens times heads are verified on
heads spread over all of them. bench/python/harness.py says what the columns of a row mean.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch

import kda_cuda

from . import harness
from .harness import Call, as_provider, failure, judged, too_large
from .providers import PEERS, SDPA, load_peers, ours, reference
from .shapes import REGIMES, Shape, add_arguments, from_arguments, inputs, sampled_heads, traffic_bytes
from .truth import errors, in_fp32, only_heads, reference_call

LARGEST_ERROR = 2e-2  # relative, of bf16 outputs


def truth(a: dict, heads: list[int]) -> dict[str, torch.Tensor]:
    """The output of some heads, by the fp32 reference on the same device."""
    return {"o": reference_call(in_fp32(only_heads(a, heads, a["q"].shape[2])))()}


def prepared(
    name: str, bind: Callable[[dict], Call], sets: list[dict], truths: dict, heads: list[int], where: str
) -> tuple[harness.Calls, dict]:
    """A provider's calls, and what is said of it."""
    provider = as_provider(bind)
    calls = [provider(a) for a in sets]
    results = {"o": calls[0]()}
    if provider.errors:
        found = provider.errors(provider.prepare(sets[0]), None, results)
    else:
        found = errors(only_heads(results, heads, sets[0]["q"].shape[2]), truths)
    return harness.Calls(provider, calls), judged(name, found, too_large(found, {}, LARGEST_ERROR), where)


@torch.inference_mode()
def bench(shape: Shape, regime: str, named: dict[str, Callable[[dict], Call]], args: argparse.Namespace) -> dict:
    need, where = traffic_bytes(shape, args.head_dim, 2), f"{shape}, {regime}"
    count = harness.set_count(need, args.device)
    sets = [inputs(shape, regime, args.device, torch.bfloat16, args.head_dim, seed=i) for i in range(count)]
    heads = sampled_heads(shape.tokens, shape.heads)
    truths, said, calls = truth(sets[0], heads), {}, {}
    for name, bind in named.items():
        try:
            calls[name], said[name] = prepared(name, bind, sets, truths, heads, where)
        except Exception as e:  # a peer that cannot run this shape is a result, not a failure of the benchmark
            said[name] = failure(name, where, e)
            continue
        if "failed" in said[name]:
            del calls[name]
        else:
            said[name]["peak_mib"] = harness.peak_mib(calls[name].of[0], args.device)
    harness.measure(calls, said, {"forward": need}, args)
    split = kda_cuda.explain(**sets[0]).forward.plan.get("split")
    return {"bytes": {"forward": need}, "providers": said} | ({"split": split} if split else {})


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    harness.add_arguments(parser, (*PEERS, "sdpa"), rounds=15)
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args(given)
    loaded, said = load_peers(args.peers)
    if "sdpa" in args.peers:
        loaded["sdpa"] = SDPA
    named = harness.with_ours(ours, reference, loaded, args.device)
    result = harness.begin(args, "chunk_fwd", said, dtype="bfloat16", head_dim=args.head_dim)
    work = [
        ({"shape": str(shape), "regime": regime}, functools.partial(bench, shape, regime, named, args))
        for shape in from_arguments(args)
        for regime in args.regimes
    ]
    harness.run(args, result, work)


if __name__ == "__main__":
    main()
