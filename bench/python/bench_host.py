"""Host time of public calls, beside an empty op of the same schema, and of other checkouts in alternating processes.

python -m bench.python.bench_host [--checkout PATH]... [--rounds N] [--calls N] [--device cuda|cpu] [--json FILE]

On a GPU every call launches its kernels and nobody waits for them: after each batch of calls the device is waited for,
outside of the clock, so the queue is never full. On the CPU the emulated library is called with its launches switched
off. As on a GPU, contents are not read on the CPU; the rows named ``checked`` read them, as KDA_CUDA_CHECK=1 does.

Of every call: the fastest and the median, in microseconds, over all rounds. ``public`` is the public function, ``raw``
the op behind it with arguments that are ready, ``empty`` an op with that schema which does nothing. Each process
measures one checkout, so two builds never share one; theirs is ``kda_cuda`` of ``--checkout``, with its ``_ops.so`` (or
``build/emulator``), and this file measures them all.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
HEADS, DIM, BATCH, TOKENS = 8, 128, 8, 256
BATCH_OF_CALLS = 20  # between two waits
Times = dict[str, dict[str, list[float]]]  # row -> what -> the fastest and the median


class Inputs:
    """Arguments of the public functions, as a model or a serving engine calls them: every buffer given."""

    def __init__(self, device: str, heads: int = HEADS, dim: int = DIM, batch: int = BATCH, tokens: int = TOKENS):
        self.device, self.heads, self.dim, self.batch, self.tokens = device, heads, dim, batch, tokens
        self._make = torch.Generator().manual_seed(0)
        self.gate = {"A_log": self.zeros(heads), "dt_bias": self.zeros(heads, dim)}
        self.flags = {f"use_{x}_in_kernel": True for x in ("qk_l2norm", "gate", "beta_sigmoid")}
        self.slots = {"slot_of": torch.arange(batch, dtype=torch.int32, device=device)}

    def normal(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self._make).to(self.device, torch.bfloat16)

    def zeros(self, *size: int) -> torch.Tensor:
        return torch.zeros(*size, device=self.device)

    def streams(self, batch: int, tokens: int) -> dict[str, torch.Tensor]:
        packed = self.normal(batch, tokens, 3 * self.heads * self.dim)
        q, k, v = packed.unflatten(-1, (3, self.heads, self.dim)).unbind(2)
        g, beta = self.normal(batch, tokens, self.heads, self.dim), self.normal(batch, tokens, self.heads)
        return {"q": q, "k": k, "v": v, "g": g, "beta": beta}

    def pool(self) -> torch.Tensor:
        return self.zeros(2 * self.batch, self.heads, self.dim, self.dim)

    def chunk_kda(self) -> dict:
        return self.streams(1, self.tokens) | self.gate | self.flags | {"output_final_state": True}

    def decode(self) -> dict:
        out = self.normal(self.batch, 1, self.heads, self.dim)
        given = self.streams(self.batch, 1) | self.gate | self.flags | self.slots
        return given | {"state": self.pool(), "out": out, "state_v_first": True}

    def prefill(self) -> dict:
        bounds = torch.linspace(0, self.tokens, self.batch + 1).to(self.device, torch.int32)
        given = self.streams(1, self.tokens) | self.gate | self.flags | self.slots
        return given | {"state_pool": self.pool(), "cu_seqlens": bounds, "state_v_first": True}

    def decode_layer(self) -> dict:
        width = self.heads * self.dim
        like = (self.batch, 1, self.heads, self.dim)
        return (
            self.streams(self.batch, 1)
            | self.gate
            | self.slots
            | {
                "output_gate": self.normal(*like),
                "conv_state": self.zeros(2 * self.batch, 3 * width, 3).bfloat16(),
                "conv_weights": tuple(self.normal(width, 4) for _ in range(3)),
                "norm_weight": self.normal(self.dim),
                "state": self.pool(),
                "out": self.normal(*like),
            }
        )

    def kda_gate(self) -> dict:
        return {"g": self.normal(1, self.tokens, self.heads, self.dim)} | self.gate


RAW = {
    "chunk_kda": "chunk_fwd",
    "decode": "decode",
    "prefill": "prefill",
    "decode_layer": "decode_layer",
    "kda_gate": "kda_gate_fwd",
}


def timed(call: Callable[[], object], calls: int, device: str) -> list[float]:
    """The fastest and the median call, in microseconds."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for _ in range(max(1, calls // BATCH_OF_CALLS) + 1):
        for _ in range(min(calls, BATCH_OF_CALLS)):
            begin = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - begin)
        wait()
    times = times[min(calls, BATCH_OF_CALLS) :]  # the first batch warms up
    return [min(times) / 1000, statistics.median(times) / 1000]


def training_step(function: Callable, inputs: Inputs) -> dict[str, Callable[[], object]]:
    """Forward and backward of every input, and the two halves."""
    given = inputs.chunk_kda()
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if isinstance(x, torch.Tensor)}
    x, wanted = given | leaves, list(leaves.values())
    o, _ = function(**x)
    do = torch.randn_like(o)
    return {
        "step": lambda: torch.autograd.grad(function(**x)[0], wanted, do),
        "forward": lambda: function(**x),
        "backward": lambda: torch.autograd.grad(o, wanted, do, retain_graph=True),
    }


@contextlib.contextmanager
def contents_unread(function: Callable) -> Iterator[None]:
    """Contents of CPU tensors are looked at like those on a GPU: not at all."""
    modules = [m for name, m in sys.modules.items() if name.startswith("kda_cuda") and hasattr(m, "check_contents")]
    before = [(module, module.check_contents) for module in modules]
    for module in modules:
        module.check_contents = lambda x: False
    forget = function.recipes.forget if hasattr(function, "recipes") else lambda: None
    forget()
    try:
        yield
    finally:
        forget()
        for module, check in before:
            module.check_contents = check


@contextlib.contextmanager
def without_launches(device: str) -> Iterator[None]:
    """On the CPU: calls of this thread go to the emulated library, which launches nothing."""
    if device == "cuda":
        yield
        return
    from kda_cuda import testing

    with testing.emulated():
        testing.load_emulator().kda_emulator_skip_launches(1)
        try:
            yield
        finally:
            testing.load_emulator().kda_emulator_skip_launches(0)


def measure(device: str, calls: int, inputs: Inputs, folder: Path) -> Times:
    """Everything, of the kda_cuda that this process imports."""
    import kda_cuda

    rows: Times = {}
    with without_launches(device), torch.inference_mode():
        for name, raw in RAW.items():
            function = getattr(kda_cuda, name)
            call = functools.partial(function, **getattr(inputs, name)())
            with contents_unread(function) if device == "cpu" else contextlib.nullcontext():
                rows[name] = {"public": timed(call, calls, device)}
                if hasattr(function, "bind"):
                    rows[name] |= beside(raw, function.bind(**call.keywords).arguments, calls, device, folder)
            with checking(device):
                rows[f"{name}, checked"] = {"public": timed(call, calls, device)}
    with without_launches(device):
        halves = training_step(kda_cuda.chunk_kda, inputs)
        rows["chunk_kda, training"] = {half: timed(call, calls, device) for half, call in halves.items()}
    return rows


@contextlib.contextmanager
def checking(device: str) -> Iterator[None]:
    """Contents are read: on the CPU they are anyway."""
    before = os.environ.get("KDA_CUDA_CHECK")
    if device == "cuda":
        os.environ["KDA_CUDA_CHECK"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("KDA_CUDA_CHECK", None)
        else:
            os.environ["KDA_CUDA_CHECK"] = before


def beside(raw: str, arguments: tuple, calls: int, device: str, folder: Path) -> dict[str, list[float]]:
    """The op behind a public function, and an empty one, with the arguments that the op gets."""
    from kda_cuda import library

    from . import empty_ops

    namespace = library.NAMESPACE if device == "cuda" else library.NAMESPACE_EMULATED
    op, empty = getattr(getattr(torch.ops, namespace), raw).default, empty_ops.load(folder, *RAW.values())(raw)
    return {
        "raw": timed(lambda: op(*arguments), calls, device),
        "empty": timed(lambda: empty(*arguments), calls, device),
    }


def merged(rounds: list[Times]) -> Times:
    """The fastest of all rounds, and the median of their medians."""
    return {
        row: {
            what: [
                round(min(times[row][what][0] for times in rounds), 2),
                round(statistics.median(times[row][what][1] for times in rounds), 2),
            ]
            for what in rounds[0][row]
        }
        for row in rounds[0]
    }


def in_a_process(checkout: Path, args: argparse.Namespace) -> Times:
    """One round of one checkout. Its kda_cuda stands first on the path, this file's benchmarks behind it."""
    code = (
        f"import sys; sys.path.insert(0, {str(checkout)!r}); import kda_cuda; "
        f"assert kda_cuda.__file__.startswith({str(checkout)!r}), kda_cuda.__file__; "
        f"sys.path[0] = {str(ROOT)!r}; from bench.python import bench_host; bench_host.worker(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, args.device, str(args.calls), str(args.folder), json.dumps(args.sizes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=args.folder)
    return json.loads(done.stdout.strip().split("\n")[-1])


def worker(given: list[str]) -> None:
    device, calls, folder, sizes = given
    print(json.dumps(measure(device, int(calls), Inputs(device, **json.loads(sizes)), Path(folder))))


def table(results: dict[str, Times]) -> str:
    lines = []
    for checkout, rows in results.items():
        lines.append(f"{checkout}   (fastest / median, us)")
        for row, times in rows.items():
            cells = "   ".join(f"{what} {low:8.2f} / {middle:8.2f}" for what, (low, middle) in times.items())
            lines.append(f"  {row:24} {cells}")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, action="append", default=[], help="another one, to be measured too")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=400, help="of everything, in each round")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "empty_ops", help="for the empty ops")
    parser.add_argument("--sizes", type=json.loads, default={}, help='such as {"heads": 8, "dim": 128}')
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(given)
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    checkouts = {"this": ROOT} | {str(path): path.resolve() for path in args.checkout}
    rounds: dict[str, list[Times]] = {name: [] for name in checkouts}
    for _ in range(args.rounds):
        for name, path in checkouts.items():
            rounds[name].append(in_a_process(path, args))
    results = {name: merged(times) for name, times in rounds.items()}
    print(table(results))
    if args.json:
        from .timing import machine, said_by

        heads = {name: said_by("git", "-C", str(path), "rev-parse", "HEAD") for name, path in checkouts.items()}
        written = machine(args.device) | {
            "processor": platform.processor() or platform.machine(),
            "commits": heads,
            "rounds": args.rounds,
            "calls": args.calls,
            "launches": "on the GPU" if args.device == "cuda" else "switched off, emulated library",
            "columns": "[fastest, median] in microseconds",
            "times": results,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
