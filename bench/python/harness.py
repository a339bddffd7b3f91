"""What the benchmarks share: providers are verified, then take turns; rows are noted one by one, within a budget.

A row has labels, ``bytes`` (what each measurement must move) and ``providers``. Of a provider it says ``errors``,
``peak_mib`` and a dict of times for each measurement, or why there are none: ``failed`` or ``unsupported``.
A row that was not measured says why itself: ``failed`` is a fault of ours, ``left_out`` is the budget.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import kda_cuda
from kda_cuda import testing
from python_tests.support.devices import NAMES, Device

from . import timing
from .truth import LEAVES, errors, leaves_of, only_heads, step

Call = Callable[[], object]
OURS = "kda_cuda"
L2_BYTES = 150 << 20  # the sets of inputs are larger together
LARGE_BYTES = 32 << 30  # of one set
TURNS_S = 3.0  # a provider stops taking turns after so many seconds of one measurement
COLUMNS = """\
kda_cuda: this package; reference: its PyTorch reference; sdpa: scaled_dot_product_attention at the same shape.
gpu_us: a call inside a CUDA graph; eager_us: a call until the GPU is done; host_us: until the host is free again. Each
has the median of rounds in which all providers take turns, and the width of the middle half over the median as spread.
The reference, and inputs of more than 32 GiB, have no graph: gpu_us is between two events around eager calls.
peak_mib: what a warmed-up call takes, results included; of a training step the leaves are in it too.
bytes: inputs and results, each once; of_copy: at what share of the copy bandwidth they move. On a CPU all times are
those of the host, and kda_cuda is its emulated kernels (device emulator) or its reference (device cpu)."""


class OurFault(Exception):
    """Something of ours is wrong or failed: nothing of its row is timed, and the run ends in an error."""


class Unsupported(Exception):
    """What a provider cannot do, said by itself before anything runs."""


# ---- providers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """More than a function ``bind(arguments of the operation) -> call() -> o``, which is a provider too."""

    bind: Callable[[dict], Call]  # of its own arguments
    prepare: Callable[[dict], dict] = lambda a: a  # those of the operation made its own; differentiable, not timed
    leaves: tuple[str, ...] | None = None  # those of its own arguments that get gradients; None: the operation's
    errors: Callable[[dict, Tensor | None, dict[str, Tensor]], dict] | None = None  # own arguments, do, results; if own
    captured: bool = True  # into a CUDA graph
    same_bytes: bool = True  # as the operation must move

    def __call__(self, a: dict) -> Call:
        return self.bind(self.prepare(a))


def as_provider(bind: Callable[[dict], Call]) -> Provider:
    return bind if isinstance(bind, Provider) else Provider(bind)


def emulated(bind: Callable[[dict], Call]) -> Provider:
    """The kernels, compiled for the CPU, serve what ``bind`` calls."""
    provider = as_provider(bind)

    def bind_emulated(a: dict) -> Call:
        call = provider.bind(a)

        def run() -> object:
            with testing.emulated(threads=torch.get_num_threads()):
                return call()

        return run

    return replace(provider, bind=bind_emulated)


def with_ours(ours: Callable, reference: Callable, others: dict[str, Callable], device: str) -> dict[str, Callable]:
    """Every provider by name, ours first. Where ours is the reference itself, the reference is not there twice."""
    name = getattr(device, "name", device)
    first = {OURS: emulated(ours) if name == "emulator" else ours}
    return first | ({} if name == "cpu" else {"reference": replace(as_provider(reference), captured=False)}) | others


class Trainer:
    """One provider on all sets of inputs: the calls of each measurement, on the stream that is current throughout."""

    def __init__(self, bind: Callable[[dict], Call], sets: list[dict], do: Tensor, wanted: tuple[str, ...] = LEAVES):
        self.provider, self.do, self.wanted, self.first = as_provider(bind), do, wanted, sets[0]
        own = [self.provider.prepare(a) for a in sets]
        self.leaves = [leaves_of(a, self.provider.leaves or wanted) for a in own]
        self.own = [a | leaves for a, leaves in zip(own, self.leaves, strict=True)]
        self.forwards = [self.provider.bind(a) for a in self.own]

    def verified(self, truths: dict[str, Tensor], heads: list[int] | None = None) -> dict[str, float | None]:
        if self.provider.errors:
            return self.provider.errors(self.own[0], self.do, step(self.forwards[0], self.leaves[0], self.do))
        leaves = leaves_of(self.first, self.wanted)
        results = step(self.provider(self.first | leaves), leaves, self.do)
        return errors(only_heads(results, heads, self.do.shape[2]) if heads else results, truths)

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


@dataclass
class Calls:
    """A provider without gradients: its calls, one for each set of inputs."""

    provider: Provider
    of: list[Call]

    def calls(self, what: str) -> list[Call]:
        return self.of


# ---- verification ----------------------------------------------------------------------------------------------------


def too_large(found: dict[str, float | None], limits: dict[str, float], otherwise: float) -> dict[str, float | None]:
    return {name: e for name, e in found.items() if e is None or not e <= limits.get(name, otherwise)}


def judged(name: str, found: dict[str, float | None], wrong: dict[str, float | None], where: str) -> dict:
    """What a row says of a verified provider; if ours is wrong, that is raised."""
    if not wrong:
        return {"errors": found}
    if name == OURS:
        raise OurFault(f"{OURS} is wrong in {where}, nothing is timed: {wrong}")
    return {"errors": found, "failed": f"wrong, not timed: {wrong}"}


def failure(name: str, where: str, e: Exception) -> dict:
    """What a row says of a provider that cannot do it; our own is raised."""
    if isinstance(e, OurFault):
        raise e
    if name == OURS:
        raise OurFault(f"{OURS} failed in {where}: {type(e).__name__}: {e}") from e
    if isinstance(e, Unsupported):
        return {"unsupported": str(e)}
    return {"failed": f"{type(e).__name__}: {str(e)[:200]}"}


# ---- measurement -----------------------------------------------------------------------------------------------------


def set_count(bytes_of_one: int, device: str, most: int = 8) -> int:
    """How many sets of inputs a row rotates through, so that none stays in the L2."""
    if device != "cuda":
        return 2
    return 1 if bytes_of_one > LARGE_BYTES else max(2, min(most, L2_BYTES // bytes_of_one))


def ready(trainer: Trainer | Calls, what: str, device: str) -> tuple[list[Call], Call, int]:
    """The calls, all of them as one, and how many turns there is time for."""
    calls = trainer.calls(what)
    if not trainer.provider.captured:
        calls = calls[:1]  # what takes so long has nothing of a call before in the L2
    for call in calls:
        call()
    one = len(calls) == 1  # of inputs too large for the memory that a graph keeps, or of what has no graph
    together = timing.loop_of(calls) if one else timing.graph_of(calls, device)
    together()
    timing.synchronize(device)
    begin = time.perf_counter()
    if device == "cuda":
        together()
        timing.synchronize(device)
    return calls, together, max(1, int(TURNS_S / 2 / max(1e-6, time.perf_counter() - begin)))


def timed(trainers: dict[str, Trainer | Calls], what: str, rounds: int, device: str) -> dict[str, dict]:
    """All providers take turns in every round; slow ones only in the first rounds."""
    running, results = {}, {}
    for name, trainer in trainers.items():
        try:
            running[name] = ready(trainer, what, device)
        except Exception as e:
            results[name] = failure(name, what, e)
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in running}
    for turn in range(rounds):
        for name, (calls, together, turns) in running.items():
            if turn < turns:
                gpu = timing.elapsed_us(together, device) / len(calls)
                samples[name].append((gpu, *timing.eager_us(calls, device)))
    for name in running:
        columns = (timing.summary(x) for x in zip(*samples[name], strict=True))
        results[name] = dict(zip(("gpu_us", "host_us", "eager_us"), columns, strict=True))
    return results


def measure(
    trainers: dict[str, Trainer | Calls], said: dict[str, dict], moved: dict[str, int], args: argparse.Namespace
) -> None:
    """Each measurement of ``moved``, with the bytes that it moves, into what is ``said`` of the providers."""
    for what, bytes_moved in moved.items():
        for name, columns in timed(trainers, what, args.rounds, args.device).items():
            if "gpu_us" in columns and trainers[name].provider.same_bytes:
                seconds = 1e-6 * columns["gpu_us"]["median"]
                columns["of_copy"] = round(bytes_moved / seconds / args.bandwidth, 3)
            said[name][what] = columns


def peak_mib(call: Call, device: str, more_bytes: int = 0) -> float | None:
    """Of a second call, above what is allocated before the first, and ``more_bytes``."""
    if device != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before + more_bytes) / (1 << 20), 1)


# ---- a run -----------------------------------------------------------------------------------------------------------


def device_argument(name: str) -> Device:
    if name not in NAMES:
        raise argparse.ArgumentTypeError(f"device is {name!r}, expected one of {', '.join(NAMES)}")
    return Device(name)


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected at least 1")
    return number


def add_arguments(parser: argparse.ArgumentParser, peers: Sequence[str], rounds: int) -> None:
    """What every benchmark lets one choose."""
    parser.add_argument("--out", "--json", type=Path, help="a file of JSON, written after every row")
    parser.add_argument("--peers", nargs="*", choices=peers, default=list(peers))
    parser.add_argument("--no-peers", dest="peers", action="store_const", const=[])
    parser.add_argument("--rounds", type=positive, default=rounds)
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument(
        "--device",
        type=device_argument,
        default=Device("cuda"),
        metavar="cuda|emulator|cpu",
        help="emulator: the kernels on the CPU; cpu: the reference",
    )


def begin(args: argparse.Namespace, benchmark: str, peers: dict, **facts: object) -> dict:
    """The result without rows: where and of what. Sets ``args.bandwidth``."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    if args.device == "cuda" and not kda_cuda.build_info()["ops"]:
        raise SystemExit("kda_cuda/_ops.so is missing, expected it beside the package: `make build` makes it")
    if args.device.name == "emulator":
        try:
            testing.load_emulator()
        except FileNotFoundError as e:
            raise SystemExit(str(e)) from e
    os.environ["KDA_CUDA_STRICT"] = "1"  # the reference is never timed in place of a kernel
    args.bandwidth = timing.copy_bandwidth(args.device)
    result = {
        "benchmark": benchmark,
        **timing.machine(args.device),
        "device": args.device.name,
        "copy_bandwidth_tb_s": float(f"{args.bandwidth / 1e12:.4g}"),
        **facts,
        "rounds": args.rounds,
        "peers": peers,
        "columns": COLUMNS,
        "rows": [],
    }
    print(f"{benchmark} on {result['gpu'] or args.device.name}, commit {result['commit']}, peers: {peers}", flush=True)
    return result


Work = list[tuple[dict, Callable[[], dict]]]  # labels of a row, and what measures the rest of it


def run(args: argparse.Namespace, result: dict, work: Work) -> None:
    """Every row, noted as soon as it is there. What is ours and wrong fails the run in the end."""
    start = time.monotonic()
    for number, (labels, measure_row) in enumerate(work, 1):
        spent = time.monotonic() - start
        name = " ".join(str(x) for x in labels.values())
        print(f"[{spent:4.0f} s] row {number} of {len(work)}: {name}", flush=True)
        if spent > args.budget:
            row = labels | {"left_out": f"the budget of {args.budget:g} s was spent"}
        else:
            try:
                row = labels | measure_row()
            except OurFault as e:
                row = labels | {"failed": str(e)}
        timing.note(row, table_lines(row, name), result, args.out, args.device)
    timing.end_if_failed(result["rows"])


def table_lines(row: dict, name: str) -> list[str]:
    """A line for each measurement: microseconds, and in brackets how many times those of the first provider."""
    if why := row.get("failed") or row.get("left_out"):
        return [f"{'FAILED' if 'failed' in row else 'LEFT OUT':8} {why}"]
    lines = []
    for what in row["bytes"]:
        first, cells = None, []
        for provider, said in row["providers"].items():
            columns = said.get(what, said)
            if "gpu_us" not in columns:
                reason = columns.get("failed") or columns.get("unsupported") or "not timed"
                cells.append(f"{provider} {reason[:80]}")
                continue
            ratio_to, first = first, first or columns
            cells.append(f"{provider} {', '.join(times(columns, ratio_to))}{extras(columns, said)}")
        lines.append(f"{what:8} {name} " + " | ".join(cells))
    return lines


def times(columns: dict, first: dict | None) -> list[str]:
    cells = []
    for column in ("gpu_us", "eager_us", "host_us"):
        us = columns[column]["median"]
        cells.append(f"{column[:-3]} {us:.1f}" + (f" ({us / first[column]['median']:.2f} x)" if first else ""))
    return cells


def extras(columns: dict, said: dict) -> str:
    share = f", {columns['of_copy']:.0%} of copy" if "of_copy" in columns else ""
    return share + (f", {said['peak_mib']} MiB" if said.get("peak_mib") is not None else "")
