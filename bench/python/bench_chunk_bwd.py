"""Training, side by side with its peers: o and every gradient are verified before anything is timed.

python -m bench.python.bench_chunk_bwd [--out FILE] [--what forward|backward|step|core|general ...] [--quick]
                                       [--regimes fast|long ...] [--shapes SHAPE ...] [--gradients all|no_gate|v]
                                       [--peers [NAME ...] | --no-peers] [--rounds N] [--budget SECONDS]
                                       [--head-dim N] [--device cuda|emulator|cpu]

forward, backward and step (both) have everything fused: raw gate, normalisation of q and k, logits of beta. Their peers
are fla and cuLA. core is the backward of the recurrence alone, with log-decay and beta in fp32 and q, k normalised. Its
peer is cudnn-frontend. general is forward and step of the core beside fla's KDA and fla's kernels for a general
diagonal-plus-low-rank transition (fla_dplr), which compute KDA too.

A peer that is missing or fails is named with the reason. What is wrong is not timed; if it is ours, the run goes on
with the next row and fails in the end. bench/python/harness.py says what the columns of a row mean. Results of more
than a million tokens times heads are verified on heads spread over all of them. Compile the peers' kernels first
(bench/python/peers.py).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

from torch import Tensor

from . import harness, timing
from .harness import OURS, Call, OurFault, Trainer, failure, judged, too_large
from .providers import BACKWARD_PEERS, SDPA, load_peers, ours
from .providers import reference as reference_bind
from .shapes import FORMS, REGIMES, Shape, named, sampled_heads, shape_argument, traffic_bytes, training_inputs
from .truth import LEAVES, errors, leaves_of, only_heads, recurrence, reference, step

LIMITS = {"o": 2e-2}  # relative RMS error of bf16 results
GRADIENT_LIMIT = 3e-2
REFERENCE_LIMIT = 1e-4  # of the fp32 reference itself
SMALL = (Shape(130, 2, (130,)), Shape(130, 2, (37, 93)))  # for the recurrence, token by token
GRADIENTS = {"all": LEAVES, "no_gate": ("q", "k", "v", "beta"), "v": ("v",)}
WHAT = ("forward", "backward", "step", "core", "general")
QUICK = {"fused": ("T8192_H16_N1",), "core": ("T2048_H16_N1", "T8192_H16_N1"), "general": ("T8192_H16_N1",)}


def verify_small(form: str, regime: str, bind: Callable[[dict], Call], args: argparse.Namespace) -> None:
    """Ours and the fp32 reference, which judges the large shapes, against the recurrence in float64."""
    for shape in SMALL if args.device == "cuda" else SMALL[-1:]:
        (a,), do = training_inputs(form, shape, regime, args.device, 1, args.head_dim)
        truths, where = recurrence(a, do), f"{form}, {shape}, {regime}"
        if wrong := too_large(errors(reference(a, do), truths), {}, REFERENCE_LIMIT):
            raise OurFault(f"the reference is wrong in {where}: {wrong}")
        leaves = leaves_of(a)
        found = errors(step(bind(a | leaves), leaves, do), truths)
        judged(OURS, found, too_large(found, LIMITS, GRADIENT_LIMIT), where)


def moved_bytes(what: str, a: dict, do: Tensor, wanted: tuple[str, ...] = LEAVES) -> int:
    given, gradients = (sum(x.nbytes for x in leaves_of(a, names).values()) for names in (LEAVES, wanted))
    forward, backward = given + do.nbytes, given + gradients + do.nbytes
    return {"forward": forward, "step": forward + backward}.get(what, backward)


def peak_mib(trainer: Trainer, device: str) -> float | None:
    """Of a step, with its leaves, above what is there before them; do is there before."""
    given = sum(x.nbytes for x in leaves_of(trainer.own[0], trainer.provider.leaves or LEAVES).values())
    return harness.peak_mib(lambda: step(trainer.forwards[0], trainer.leaves[0], trainer.do), device, given)


def verified_trainers(
    providers: dict[str, Callable[[dict], Call]], sets: list[dict], do: Tensor, wanted: tuple[str, ...], where: str
) -> tuple[dict[str, Trainer], dict[str, dict]]:
    """Those whose results are right, and what is said of each."""
    tokens, of = do.shape[1:3]
    heads = sampled_heads(tokens, of)
    truths = reference(only_heads(sets[0], heads, of), only_heads({"do": do}, heads, of)["do"])
    trainers, said = {}, {}
    for name, bind in providers.items():
        try:
            trainer = Trainer(bind, sets, do, wanted)
            found = trainer.verified(truths, heads)
            said[name] = judged(name, found, too_large(found, LIMITS, GRADIENT_LIMIT), where)
        except Exception as e:
            said[name] = failure(name, where, e)
            continue
        if "failed" not in said[name]:
            trainers[name] = trainer
    return trainers, said


def bench(
    form: str, what: list[str], shape: Shape, regime: str, providers: dict[str, Callable], args: argparse.Namespace
) -> dict:
    """One row of :func:`work`, without its labels."""
    wanted = GRADIENTS[args.gradients]
    count = harness.set_count(traffic_bytes(shape, args.head_dim, 2), args.device)
    sets, do = training_inputs(form, shape, regime, args.device, count, args.head_dim)
    moved = {x: moved_bytes(x, sets[0], do, wanted) for x in what}
    with timing.side_stream(args.device):
        trainers, said = verified_trainers(providers, sets, do, wanted, f"{form}, {shape}, {regime}")
        for name, trainer in trainers.items():
            said[name]["peak_mib"] = peak_mib(trainer, args.device)
        harness.measure(trainers, said, moved, args)
    return {"sets": count, "bytes": moved, "providers": said}


def work(args: argparse.Namespace) -> list[tuple[str, list[str], Shape, str]]:
    """Form, measurements, shape and regime of every row: the core first, whose peer compiles in seconds."""
    measured = {
        "core": ["core"] * ("core" in args.what),
        "general": ["forward", "step"] * ("general" in args.what),
        "fused": [x for x in args.what if x not in ("core", "general")],
    }
    rows = []
    for form, what in measured.items():
        chosen = args.shapes or ([named(name) for name in QUICK[form]] if args.quick else FORMS[form])
        rows += [(form, what, shape, regime) for shape in chosen for regime in args.regimes if what]
    return rows


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = dict.fromkeys(name for peers in BACKWARD_PEERS.values() for name in peers)
    harness.add_arguments(parser, (*names, "sdpa"), rounds=0)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument(
        "--shapes", nargs="+", type=shape_argument, help="such as T8192_H64_N1, for every form asked for"
    )
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--gradients", choices=GRADIENTS, default="all", help="which are asked for")
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds")
    args = parser.parse_args(given)
    args.rounds = args.rounds or (5 if args.quick else 15)
    return args


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    providers, said = {}, {}
    for form, peers in BACKWARD_PEERS.items():
        loaded, versions = load_peers(args.peers, peers)
        if form == "fused" and "sdpa" in args.peers:
            loaded["sdpa"] = SDPA
        providers[form] = harness.with_ours(ours, reference_bind, loaded, args.device)
        said |= versions
    result = harness.begin(args, "chunk_bwd", said, dtype="bfloat16", head_dim=args.head_dim)
    small: set[tuple[str, str]] = set()
    rows = []
    for form, what, shape, regime in work(args):
        labels = {"form": form, "shape": str(shape), "regime": regime, "gradients": args.gradients}
        rows.append((labels, functools.partial(checked, small, form, what, shape, regime, providers[form], args)))
    harness.run(args, result, rows)


def checked(small: set[tuple[str, str]], form: str, what: list[str], shape: Shape, regime: str, *rest: object) -> dict:
    """A row, after the small shapes of its arguments and regime were verified once."""
    providers, args = rest
    taken = "fused" if form == "fused" else "core"
    if (taken, regime) not in small:
        verify_small(taken, regime, providers[OURS], args)
        small.add((taken, regime))
    return bench(form, what, shape, regime, providers, args)


if __name__ == "__main__":
    main()
