"""Context parallelism on several GPUs: verified against one GPU on every rank, then timed.

NCCL_NVLS_ENABLE=0 torchrun --nproc-per-node 2 -m bench.python.several_gpus [--out FILE] [--tokens N ...]
    [--heads N ...] [--regimes fast|long ...] [--head-dim N] [--repeats N] [--seconds N] [--fla]
python -m bench.python.several_gpus --simulate 2 4 8 [...]

The number of ranks is torchrun's. Without a GPU it runs over gloo, for small sizes. Tokens are those of all ranks, in
one sequence. A row is a gate regime, tokens and heads; forward, and step, which is forward and backward.

us: the slowest rank's median time of eager calls, all ranks at once. exchange_us: that, less the median of calls that
exchange nothing; exchange_share: its share. sent_bytes: what a rank sends in each direction.
one_gpu_us: the plain call with all tokens on one GPU, if they fit; shard_us: with a rank's tokens.
efficiency: one_gpu_us / (ranks us), or shard_us / us if they do not fit.
errors: relative RMS against one GPU with all tokens, the largest of all ranks; on the first heads, if all are too many.
What is wrong or differs in a second run is not timed: of ours it ends the run in an error, of fla's context parallelism
(--fla) it is said. Rows that --seconds leaves no time for are named.

--simulate runs all ranks one after another on one GPU: us is the sum, so us / ranks predicts a rank without exchange.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import kda_cuda
from kda_cuda import parallel
from kda_cuda.context_parallel import exchange

from . import timing
from .harness import OurFault
from .shapes import REGIMES, even, inputs
from .truth import STREAMS, errors, leaves_of, step

LIMITS = {"o": 2e-2}  # relative RMS error of bf16 results
GRADIENT_LIMIT = 3e-2
FITS = 1 << 23  # tokens times heads with gradients on one GPU
PARAMETERS = ("A_log", "dt_bias")
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    regime: str
    tokens: int
    heads: int
    head_dim: int

    def shard(self, rank: int, ranks: int, device: str, heads: int | None = None) -> tuple[dict, Tensor]:
        """A rank's arguments and upstream gradient; every rank can draw those of any other."""
        shape = even(self.tokens // ranks, self.heads if heads is None else heads, 1)
        options = (shape, self.regime, device, torch.bfloat16, self.head_dim)
        a, common = inputs(*options, seed=rank), inputs(*options, seed=0)
        a |= {name: common[name] for name in PARAMETERS} | {"output_final_state": False, "cu_seqlens": None}
        generator = torch.Generator(device).manual_seed(rank + 1000)
        return a, torch.randn(a["v"].shape, generator=generator, device=device).to(torch.bfloat16)

    def whole(self, ranks: int, device: str, heads: int) -> tuple[dict, Tensor]:
        parts = [self.shard(rank, ranks, device, heads) for rank in range(ranks)]
        a = dict(parts[0][0])
        a |= {name: torch.cat([own[name] for own, _ in parts], 1) for name in STREAMS}
        return a, torch.cat([do for _, do in parts], 1)


def ours(context: object, a: dict) -> Call:
    return lambda: kda_cuda.chunk_kda(**a, cp_context=context)[0]


def fla_of(group: object, tokens: Tensor) -> Callable[[dict], Call]:
    from fla.ops.cp import build_cp_context
    from fla.ops.kda import chunk_kda

    context = build_cp_context(tokens, group)
    return lambda a: lambda: chunk_kda(**a, cp_context=context)[0]


def expected(row: Row, rank: int, ranks: int, device: str, heads: int) -> dict[str, Tensor]:
    """This rank's part of what one GPU gives for all tokens, and whole gradients of parameters."""
    a, do = row.whole(ranks, device, heads)
    leaves = leaves_of(a)
    results = step(lambda: kda_cuda.chunk_kda(**a | leaves)[0], leaves, do)
    return {n: x if n[1:] in PARAMETERS else x.chunk(ranks, 1)[rank].clone() for n, x in results.items()}


def verified(bind: Callable[[dict], Call], row: Row, rank: int, ranks: int, device: str) -> dict[str, float | None]:
    """The largest error of any rank, by name. All ranks must have the bits of a second run too."""
    heads = max(1, min(row.heads, FITS // row.tokens))
    truths = expected(row, rank, ranks, device, heads)
    a, do = row.shard(rank, ranks, device, heads)
    leaves = leaves_of(a)
    first, second = (step(bind(a | leaves), leaves, do) for _ in range(2))
    equal = all(torch.equal(x, second[name]) for name, x in first.items())
    for name in PARAMETERS:
        dist.all_reduce(first[f"d{name}"])
    found = errors(first, truths)
    everywhere: list = [None] * ranks
    dist.all_gather_object(everywhere, (equal, found))
    worst = {n: None if any(e[n] is None for _, e in everywhere) else max(e[n] for _, e in everywhere) for n in found}
    return worst | {"equal_bits": all(own for own, _ in everywhere)}


def wrong(found: dict) -> dict:
    limited = {name: e for name, e in found.items() if name != "equal_bits"}
    return {n: e for n, e in limited.items() if e is None or e > LIMITS.get(n, GRADIENT_LIMIT)}


def slowest_us(run: Call, repeats: int, device: str) -> float:
    """The median of one call on the slowest rank, with all ranks at once."""
    samples = []
    for i in range(repeats + 2):
        timing.synchronize(device)
        if dist.is_initialized():
            dist.barrier()
        us = timing.elapsed_us(run, device)
        if i >= 2:
            samples.append(us)
    x = torch.tensor([statistics.median(samples)], device=device, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return round(x.item(), 1)


@contextlib.contextmanager
def nothing_sent(ranks: int) -> Iterator[None]:
    """Each rank takes its own summaries for those of all others: the work without the exchange."""

    def alone(x: Tensor, group: object) -> Tensor:
        return x.repeat(ranks, *[1] * (x.dim() - 1))

    with mock.patch.object(exchange, "gather", alone):
        yield


def calls_of(bind: Callable[[dict], Call], a: dict, do: Tensor) -> dict[str, Call]:
    leaves = leaves_of(a)
    forward = bind(a)
    return {"forward": forward, "step": functools.partial(step, bind(a | leaves), leaves, do)}


def plain(a: dict) -> Call:
    return lambda: kda_cuda.chunk_kda(**a)[0]


def timed(row: Row, bind: Callable[[dict], Call], ranks: int, rank: int, repeats: int, device: str) -> dict[str, dict]:
    a, do = row.shard(rank, ranks, device)
    found = {}
    for what, run in calls_of(bind, a, do).items():
        us = slowest_us(run, repeats, device)
        found[what] = {"us": us}
    return found


def add_exchange(found: dict, row: Row, context: object, rank: int, ranks: int, repeats: int, device: str) -> None:
    a, do = row.shard(rank, ranks, device)
    with nothing_sent(ranks):
        for what, run in calls_of(functools.partial(ours, context), a, do).items():
            us, without = found[what]["us"], slowest_us(run, repeats, device)
            found[what]["exchange_us"] = round(us - without, 1)
            found[what]["exchange_share"] = round((us - without) / us, 3)


def baselines(row: Row, ranks: int, rank: int, repeats: int, device: str) -> dict[str, dict]:
    """The plain call on a rank's tokens, and on all of them where they fit."""
    a, do = row.shard(rank, ranks, device)
    found = {what: {"shard_us": slowest_us(run, repeats, device)} for what, run in calls_of(plain, a, do).items()}
    fits = row.tokens * row.heads <= FITS
    if fits:
        del a, do
        a, do = row.whole(ranks, device, row.heads)
        for what, run in calls_of(plain, a, do).items():
            found[what]["one_gpu_us"] = slowest_us(run, repeats, device)
    return found


def bench(row: Row, group: object, args: argparse.Namespace, device: str) -> dict:
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    bounds = torch.tensor([0, row.tokens])
    context = parallel.build_cp_context(bounds.to(device), group, cu_seqlens_cpu=bounds)
    bind = functools.partial(ours, context)
    said = {"errors": verified(bind, row, rank, ranks, device)}
    if bad := wrong(said["errors"]):
        raise OurFault(f"kda_cuda is wrong in {row}, nothing is timed: {bad}")
    if not said["errors"]["equal_bits"]:
        raise OurFault(f"kda_cuda gives other bits in a second run of {row}, nothing is timed")
    found = timed(row, bind, ranks, rank, args.repeats, device)
    add_exchange(found, row, context, rank, ranks, args.repeats, device)
    for what, own in baselines(row, ranks, rank, args.repeats, device).items():
        one, us = own.get("one_gpu_us"), found[what]["us"]
        found[what] |= own | {"efficiency": round(one / (ranks * us) if one else own["shard_us"] / us, 3)}
    said |= found
    said["sent_bytes"] = row.heads * row.head_dim * 2 * row.head_dim * 4 if ranks > 1 else 0
    return {"kda_cuda": said}


def bench_fla(row: Row, group: object, args: argparse.Namespace, device: str) -> dict:
    """A failure on one rank is one on all of them: it runs the same code everywhere."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    try:
        bind = fla_of(group, torch.tensor([0, row.tokens], device=device))
        said = {"errors": verified(bind, row, rank, ranks, device)}
        if bad := wrong(said["errors"]):
            return {"fla": said | {"failed": f"wrong, not timed: {bad}"}}
        return {"fla": said | timed(row, bind, ranks, rank, args.repeats, device)}
    except Exception as e:
        return {"fla": {"failed": f"{type(e).__name__}: {str(e)[:200]}"}}


def simulate(row: Row, ranks: int, repeats: int, device: str) -> dict:
    """All ranks in this process, one after another, beside one pass over all tokens."""
    a, do = row.whole(ranks, device, row.heads)
    contexts = parallel.local_cp_contexts(torch.tensor([0, row.tokens], device=device), ranks)

    def bind(a: dict) -> Call:
        def run() -> Tensor:
            shards = [a | {name: context.shard(a[name]) for name in STREAMS} for context in contexts]
            calls = [kda_cuda.chunk_kda.bind(**shard, cp_context=c) for shard, c in zip(shards, contexts, strict=True)]
            return torch.cat([o for o, _ in parallel.run_local(calls)], 1)

        return run

    leaves = leaves_of(a)
    truths, results = (step(f(a | leaves), leaves, do) for f in (plain, bind))
    found = errors(results, truths)
    if bad := wrong(found):
        raise OurFault(f"kda_cuda is wrong in {row} on {ranks} simulated ranks, nothing is timed: {bad}")
    said: dict = {"errors": found}
    for what, run in calls_of(bind, a, do).items():
        one = slowest_us(calls_of(plain, a, do)[what], repeats, device)
        us = slowest_us(run, repeats, device)
        said[what] = {"us": us, "one_gpu_us": one, "work": round(us / one, 3)}
    return said


def rows_of(args: argparse.Namespace) -> list[Row]:
    return [Row(r, t, h, args.head_dim) for t in args.tokens for h in args.heads for r in args.regimes]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1 << 15, 1 << 18, 1 << 20], help="of all ranks")
    parser.add_argument("--heads", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=200, help="no row begins after this")
    parser.add_argument("--fla", action="store_true", help="fla's context parallelism beside")
    parser.add_argument("--simulate", type=int, nargs="+", default=[], metavar="RANKS", help="on one GPU")
    return parser.parse_args()


def run_rows(args: argparse.Namespace, result: dict, ones: list[Callable[[Row], dict]]) -> None:
    """Adds the results of the rows, and those that no time was left for: all of the first kind, then of the next.

    Rank 0's clock decides. What is there is written after each row: a peer that takes too long loses its own alone.
    """
    begin, rows = time.monotonic(), {}
    result |= {"rows": [], "left_out": []}
    for one, row in itertools.product(ones, rows_of(args)):
        late = torch.tensor([time.monotonic() - begin > args.seconds], dtype=torch.int32, device=device_of())
        if dist.is_initialized():
            dist.broadcast(late, 0)
        if late.item():
            result["left_out"].append(str(row) + (" of fla" if row in rows else ""))
        else:
            if row not in rows:
                rows[row] = {"regime": row.regime, "tokens": row.tokens, "heads": row.heads}
                result["rows"].append(rows[row])
            rows[row] |= one(row)
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(json.dumps(rows.get(row, {"left_out": str(row)})), flush=True)
            if args.out:
                args.out.write_text(json.dumps(result, indent=1) + "\n")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def device_of() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    args, device = arguments(), device_of()
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    result = {"machine": timing.machine(device), "ranks": 1, "head_dim": args.head_dim}
    if args.simulate:
        run_rows(args, result, [lambda row: {str(n): simulate(row, n, args.repeats, device) for n in args.simulate}])
    else:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        result["ranks"] = dist.get_world_size()
        ways = [bench, bench_fla] if args.fla else [bench]
        run_rows(
            args, result, [functools.partial(way, group=dist.group.WORLD, args=args, device=device) for way in ways]
        )
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
