"""The reference on the CPU: chunkwise against token by token, forward and with gradients, in one run.

python -m bench.python.bench_reference [--json FILE] [--tokens 2048] [--threads 2]

``recurrence`` is the definition as one writes it down (python_tests/support/oracle.py, in fp32). ``recurrence_tuned``
is the fastest form found that autograd still differentiates: tokens unbound once, every step a few fused products.
Times are the medians of rounds in which all take turns; memory is the growth of the peak resident set in a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import kda_cuda
from python_tests.support import oracle

HEADS, HEAD_DIM = 4, 128
STREAMS = ("q", "k", "v", "g", "beta")


def inputs(tokens: int) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(1, tokens, HEADS, *size, generator=gen)

    q, k = (torch.nn.functional.normalize(normal(HEAD_DIM), dim=-1) for _ in range(2))
    streams = (q, k, normal(HEAD_DIM), -0.2 * normal(HEAD_DIM).abs(), torch.sigmoid(normal()))
    return dict(zip((*STREAMS, "do"), (*streams, normal(HEAD_DIM)), strict=True))


def chunkwise(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return kda_cuda.chunk_kda(q, k, v, g, beta)[0]


def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    state = v.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    return torch.stack([o for o, _ in oracle.steps(q, k, v, g, beta, state, q.shape[-1] ** -0.5)], 1)


def recurrence_tuned(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    batch, _, heads, key_dim = q.shape

    def tokens(x: Tensor) -> tuple[Tensor, ...]:
        return x.transpose(1, 2).flatten(0, 1).unsqueeze(-2).unbind(1)

    state = v.new_zeros(batch * heads, key_dim, v.shape[3])
    outputs = []
    steps = (tokens(x) for x in (q, k, v, g.exp(), beta.unsqueeze(-1)))
    for q_t, k_t, v_t, decay, beta_t in zip(*steps, strict=True):
        state = decay.transpose(1, 2) * state
        u = beta_t * torch.baddbmm(v_t, k_t, state, alpha=-1)
        state = torch.baddbmm(state, k_t.transpose(1, 2), u)
        outputs.append(q_t @ state)
    return key_dim**-0.5 * torch.cat(outputs, 1).unflatten(0, (batch, heads)).transpose(1, 2)


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "chunkwise": chunkwise,
    "recurrence": recurrence,
    "recurrence_tuned": recurrence_tuned,
}


def forward(candidate: Callable[..., Tensor], x: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [candidate(*(x[name] for name in STREAMS))]


def forward_backward(candidate: Callable[..., Tensor], x: dict[str, Tensor]) -> list[Tensor]:
    leaves = [x[name].detach().requires_grad_() for name in STREAMS]
    o = candidate(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, x["do"])]


PASSES = {"forward": forward, "forward_backward": forward_backward}


def verify(x: dict[str, Tensor]) -> None:
    """All give the same outputs and gradients; nothing is timed before."""
    expected = forward_backward(recurrence, x)
    for name, candidate in CANDIDATES.items():
        for result, wanted in zip(forward_backward(candidate, x), expected, strict=True):
            error = ((result - wanted).norm() / wanted.norm()).item()
            assert error < 1e-5, f"{name}: relative difference {error:.1e} from the recurrence"


def seconds(run: Callable, x: dict[str, Tensor], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    for _ in range(rounds + 1):
        for name, candidate in CANDIDATES.items():
            begin = time.perf_counter()
            run(candidate, x)
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def peak_mib(candidate: str, which: str, tokens: int, threads: int) -> float:
    """Growth of the peak resident set while one call runs, in a fresh process."""
    arguments = ["--peak-of", candidate, which, "--tokens", str(tokens), "--threads", str(threads)]
    command = [sys.executable, "-m", "bench.python.bench_reference", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(candidate: str, which: str, tokens: int) -> None:
    PASSES[which](CANDIDATES[candidate], inputs(64))  # what is loaded on first use is not the candidate's
    x = inputs(tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: a child inherits that of its parent
    before = peak_rss_kib()
    PASSES[which](CANDIDATES[candidate], x)
    print((peak_rss_kib() - before) / 1024)


def peak_rss_kib() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def table(tokens: int, threads: int, rounds: int) -> list[dict]:
    x = inputs(tokens)
    verify(x)
    rows = []
    for which, run in PASSES.items():
        times = seconds(run, x, rounds)
        for name, time_s in times.items():
            ratio = time_s / times["chunkwise"]
            peak = peak_mib(name, which, tokens, threads)
            rows.append({"pass": which, "what": name, "ms": round(1e3 * time_s, 1), "times_chunkwise": round(ratio, 1),
                         "peak_mib": round(peak)})  # fmt: skip
            print(f"{which:17} {name:17} {1e3 * time_s:9.1f} ms   x{ratio:5.1f}   peak +{peak:6.0f} MiB", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parents[1] / "results" / "reference_cpu.json")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak(*args.peak_of, args.tokens)
        return
    rows = table(args.tokens, args.threads, args.rounds)
    result = {
        "shape": {"B": 1, "T": args.tokens, "H": HEADS, "K": HEAD_DIM, "V": HEAD_DIM}, "dtype": "float32",
        "threads": args.threads, "cpus": os.cpu_count(), "torch": torch.__version__, "rows": rows,
    }  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
