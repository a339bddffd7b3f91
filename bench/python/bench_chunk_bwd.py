"""Training, side by side with its peers: o and every gradient are verified before anything is timed.

python -m bench.python.bench_chunk_bwd [--out FILE] [--what forward|backward|step|core ...] [--regimes fast|long ...]
                                       [--shapes SHAPE ...] [--peers [NAME ...]] [--gradients all|no_gate|v] [--quick]

forward, backward and step (both) have everything fused: raw gate, normalisation of q and k, logits of beta. Their peer
is fla. core is the backward of the recurrence alone, with log-decay and beta in fp32 and q, k normalised. Its peer is
cudnn-frontend. A peer that is missing or fails is named with the reason. What is wrong is not timed; if it is ours, the
run goes on with the next row and fails in the end.

gpu_us: a call inside a CUDA graph; eager_us: a call until the GPU is done; host_us: until the host is free again. Each
has the median of rounds in which all providers take turns, and the width of the middle half over the median as spread.
peak_mib: a warmed-up step, gradients included, above what is there before the leaves; do is there before.
bytes: inputs, do and o or the gradients asked for, each once; of_copy: at what share of the copy bandwidth they move.
Results of more than a million tokens times heads are verified on heads spread over all of them. A row whose inputs
take more than 32 GiB has one set of them and no graph: gpu_us is then between two events around an eager call.
Compile the peers' kernels first (bench/python/peers.py).
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import kda_cuda

from . import timing
from .peers import BACKWARD_PEERS, Call, load_peers
from .shapes import FORMS, REGIMES, Shape, named, shape_argument, traffic_bytes, training_inputs
from .truth import LEAVES, errors, leaves_of, only_heads, recurrence, reference, step

LIMITS = {"o": 2e-2}  # relative RMS error of bf16 results
GRADIENT_LIMIT = 3e-2
REFERENCE_LIMIT = 1e-4  # of the fp32 reference itself
SMALL = (Shape(130, 2, (130,)), Shape(130, 2, (37, 93)))  # for the recurrence, token by token
L2_BYTES = 150 << 20  # the sets of inputs are larger together
LARGE_BYTES = 32 << 30  # of one set
VERIFIED = 1 << 20  # tokens times heads for which the reference fits
GRADIENTS = {"all": LEAVES, "no_gate": ("q", "k", "v", "beta"), "v": ("v",)}
WHAT = ("forward", "backward", "step", "core")
QUICK = {"fused": ("T8192_H16_N1",), "core": ("T2048_H16_N1", "T8192_H16_N1")}


class OurFault(Exception):
    """Something of ours is wrong or failed: nothing of its row is timed, and the run ends in an error."""


def ours(a: dict) -> Call:
    return lambda: kda_cuda.chunk_kda(**a)[0]


def too_large(found: dict[str, float | None], limits: dict[str, float], otherwise: float) -> dict[str, float | None]:
    return {name: e for name, e in found.items() if e is None or e > limits.get(name, otherwise)}


def verify_small(form: str, regime: str, device: str) -> None:
    """Ours and the fp32 reference, which judges the large shapes, against the recurrence in float64."""
    for shape in SMALL:
        (a,), do = training_inputs(form, shape, regime, device, sets=1)
        truths = recurrence(a, do)
        if wrong := too_large(errors(reference(a, do), truths), {}, REFERENCE_LIMIT):
            raise OurFault(f"the reference is wrong in {form}, {shape}, {regime}: {wrong}")
        leaves = leaves_of(a)
        if wrong := too_large(errors(step(ours(a | leaves), leaves, do), truths), LIMITS, GRADIENT_LIMIT):
            raise OurFault(f"kda_cuda is wrong in {form}, {shape}, {regime}, nothing is timed: {wrong}")


def sampled_heads(tokens: int, heads: int) -> list[int]:
    """All heads, or as many as the reference can take: the first, the last, and others at equal distances."""
    count = max(1, min(heads, VERIFIED // tokens))
    return [i * (heads - 1) // max(1, count - 1) for i in range(count)]


class Trainer:
    """One provider on all sets of inputs: the calls of each measurement, on the stream that is current throughout."""

    def __init__(self, bind: Callable[[dict], Call], sets: list[dict], do: Tensor, wanted: tuple[str, ...] = LEAVES):
        self.do = do
        self.leaves = [leaves_of(a, wanted) for a in sets]
        self.forwards = [bind(a | leaves) for a, leaves in zip(sets, self.leaves, strict=True)]

    def verified(self, truths: dict[str, Tensor], heads: list[int]) -> dict[str, float | None]:
        results = step(self.forwards[0], self.leaves[0], self.do)
        return errors(only_heads(results, heads, self.do.shape[2]), truths)

    def calls(self, what: str) -> list[Call]:
        """For the backward, the forwards run here, once; each call then differentiates one of them."""
        if what == "forward":
            return self.forwards
        pairs = zip(self.forwards, self.leaves, strict=True)
        if what == "step":
            return [functools.partial(step, forward, leaves, self.do) for forward, leaves in pairs]
        return [functools.partial(differentiate, forward(), leaves, self.do) for forward, leaves in pairs]


def differentiate(o: Tensor, leaves: dict[str, Tensor], do: Tensor) -> dict[str, Tensor]:
    return step(lambda: o, leaves, do, keep=True)


def moved_bytes(what: str, a: dict, do: Tensor, wanted: tuple[str, ...] = LEAVES) -> int:
    given, gradients = (sum(x.nbytes for x in leaves_of(a, names).values()) for names in (LEAVES, wanted))
    forward, backward = given + do.nbytes, given + gradients + do.nbytes
    return {"forward": forward, "step": forward + backward}.get(what, backward)


def peak_mib(bind: Callable[[dict], Call], a: dict, do: Tensor, wanted: tuple[str, ...], device: str) -> float | None:
    if device != "cuda":
        return None
    gc.collect()
    before = torch.cuda.memory_allocated()
    given = sum(x.numel() * x.element_size() for x in leaves_of(a).values())
    leaves = leaves_of(a, wanted)
    forward = bind(a | leaves)
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step(forward, leaves, do)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before + given) / (1 << 20), 1)


def timed(trainers: dict[str, Trainer], what: str, rounds: int, device: str) -> dict[str, dict]:
    """All providers take turns in every round."""
    calls, graphs, results = {}, {}, {}
    for name, trainer in trainers.items():
        try:
            calls[name] = trainer.calls("backward" if what == "core" else what)
            for call in calls[name]:
                call()
            one = len(calls[name]) == 1  # and too large for the memory that a graph keeps
            graphs[name] = calls[name][0] if one else timing.graph_of(calls[name], device)
            graphs[name]()
        except Exception as e:
            results[name] = failure(name, what, e)
    running = list(graphs)
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in running}
    for _ in range(rounds):
        for name in running:
            gpu = timing.elapsed_us(graphs[name], device) / len(calls[name])
            samples[name].append((gpu, *timing.eager_us(calls[name], device)))
    for name in running:
        columns = (timing.summary(x) for x in zip(*samples[name], strict=True))
        results[name] = dict(zip(("gpu_us", "host_us", "eager_us"), columns, strict=True))
    return results


def failure(name: str, where: str, e: Exception) -> dict:
    """What a row says of a peer that cannot do it; our own is raised."""
    if name == "kda_cuda":
        raise OurFault(f"kda_cuda failed in {where}: {type(e).__name__}: {e}") from e
    return {"failed": f"{type(e).__name__}: {str(e)[:200]}"}


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
            said[name] = {"errors": trainer.verified(truths, heads)}
        except Exception as e:
            said[name] = failure(name, where, e)
            continue
        if wrong := too_large(said[name]["errors"], LIMITS, GRADIENT_LIMIT):
            if name == "kda_cuda":
                raise OurFault(f"kda_cuda is wrong in {where}, nothing is timed: {wrong}")
            said[name]["failed"] = f"wrong, not timed: {wrong}"
            continue
        trainers[name] = trainer
    return trainers, said


def bench(
    row: tuple[str, list[str], Shape, str], providers: dict[str, Callable[[dict], Call]], gradients: str, rounds: int,
    device: str, bandwidth: float,
) -> dict:  # fmt: skip
    """One row of :func:`work`."""
    form, what, shape, regime = row
    wanted = GRADIENTS[gradients]
    need = traffic_bytes(shape, 128, 2)
    count = 1 if need > LARGE_BYTES else max(2, min(8, L2_BYTES // need))
    sets, do = training_inputs(form, shape, regime, device, count)
    moved = {x: moved_bytes(x, sets[0], do, wanted) for x in what}
    with timing.side_stream(device):
        trainers, said = verified_trainers(providers, sets, do, wanted, f"{form}, {shape}, {regime}")
        for name in trainers:
            said[name]["peak_mib"] = peak_mib(providers[name], sets[0], do, wanted, device)
        for x in what:
            for name, columns in timed(trainers, x, rounds, device).items():
                if "gpu_us" in columns:
                    seconds = 1e-6 * columns["gpu_us"]["median"]
                    columns["of_copy"] = round(moved[x] / seconds / bandwidth, 3)
                said[name][x] = columns
    labels = {"form": form, "shape": str(shape), "regime": regime, "gradients": gradients}
    return {**labels, "sets": count, "bytes": moved, "providers": said}


def table_lines(row: dict) -> list[str]:
    """A line for each measurement: microseconds, and in brackets how many times ours each peer takes."""
    if "failed" in row:
        return [f"FAILED   {row['failed']}"]
    lines = []
    for what in row["bytes"]:
        first = row["providers"]["kda_cuda"][what]
        cells = []
        for name, said in row["providers"].items():
            columns = said.get(what, said)
            if "gpu_us" not in columns:
                cells.append(f"{name} {columns.get('failed', 'not timed')[:60]}")
                continue
            times = []
            for column in ("gpu_us", "eager_us", "host_us"):
                us, ratio = columns[column]["median"], columns[column]["median"] / first[column]["median"]
                times.append(f"{column[:-3]} {us:.0f}" + ("" if name == "kda_cuda" else f" ({ratio:.2f} x)"))
            cells.append(f"{name} {', '.join(times)}, {said['peak_mib']} MiB")
        lines.append(f"{what:8} {row['shape']:14} {row['regime']:4} " + " | ".join(cells))
    return lines


def work(args: argparse.Namespace) -> list[tuple[str, list[str], Shape, str]]:
    """Form, measurements, shape and regime of every row: the core first, whose peer compiles in seconds."""
    measured = {"core": ["core"] * ("core" in args.what), "fused": [x for x in args.what if x != "core"]}
    rows = []
    for form, what in measured.items():
        chosen = args.shapes or ([named(name) for name in QUICK[form]] if args.quick else FORMS[form])
        rows += [(form, what, shape, regime) for shape in chosen for regime in args.regimes if what]
    return rows


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for peers in BACKWARD_PEERS.values() for name in peers]
    parser.add_argument("--out", type=Path)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument(
        "--shapes", nargs="+", type=shape_argument, help="such as T8192_H64_N1, for every form asked for"
    )
    parser.add_argument("--peers", nargs="*", choices=names, default=names)
    parser.add_argument("--gradients", choices=GRADIENTS, default="all", help="which are asked for")
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the reference, to try this out")
    args = parser.parse_args(given)
    args.rounds = args.rounds or (5 if args.quick else 15)
    return args


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    os.environ["KDA_CUDA_STRICT"] = "1"  # the reference is never timed in place of a kernel
    providers, said = {}, {}
    for form, peers in BACKWARD_PEERS.items():
        loaded, versions = load_peers([name for name in peers if name in args.peers], peers)
        providers[form] = {"kda_cuda": ours, **loaded}
        said |= versions
    bandwidth = timing.copy_bandwidth(args.device)
    result = {
        **timing.machine(args.device), "device": args.device, "copy_bandwidth_tb_s": round(bandwidth / 1e12, 3),
        "dtype": "bfloat16", "head_dim": 128, "rounds": args.rounds, "peers": said,
        "columns": __doc__[__doc__.index("gpu_us:") : __doc__.index("Compile")].strip(), "rows": [],
    }  # fmt: skip
    print(f"{result['gpu']}, commit {result['commit']}, peers: {said}", flush=True)
    small: set[tuple[str, str]] = set()
    for row in work(args):
        done = row_or_fault(row, small, providers, args, bandwidth)
        timing.note(done, table_lines(done), result, args.out, args.device)
    timing.end_if_failed(result["rows"])


def row_or_fault(
    row: tuple[str, list[str], Shape, str], small: set[tuple[str, str]], providers: dict[str, dict],
    args: argparse.Namespace, bandwidth: float,
) -> dict:  # fmt: skip
    """A row, after the small shapes of its form and regime were verified once."""
    form, _, shape, regime = row
    try:
        if (form, regime) not in small:
            verify_small(form, regime, args.device)
            small.add((form, regime))
        return bench(row, providers[form], args.gradients, args.rounds, args.device, bandwidth)
    except OurFault as e:
        return {"form": form, "shape": str(shape), "regime": regime, "failed": str(e)}


if __name__ == "__main__":
    main()
