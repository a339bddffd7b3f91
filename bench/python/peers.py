"""The peers of the chunkwise forward and backward: how each is called, and what it cannot do, said rather than skipped.

python -m bench.python.peers compile-fla [--backward] [--tuned] [--shapes ten|large|all] [--only SHAPE ...]
python -m bench.python.peers compile-cudnn

compile-fla compiles fla's kernels for every configuration that its autotuner will try, in as many processes as there
are cores: Triton compiles on one core, and fla's autotuning keys contain the heads and whether there is cu_seqlens. The
processes of one key share its configurations. The benchmark in the same TRITON_CACHE_DIR then only times them. --tuned
compiles what an earlier run found best, where that folder has its *.autotune.json, and nothing else.
compile-cudnn lets cudnn-frontend compile the kernels of its core, forward and backward, into its own cache.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor

from . import shapes, truth
from .shapes import Shape

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """`load()` imports it and gives `bind(arguments of chunk_kda) -> call() -> o`; what `bind` does is not timed."""

    distributions: tuple[str, ...]  # names of the package that has it, any of them
    load: Callable[[], Callable[[dict], Call]]
    bounded_gates_only: bool = False

    def unsupported(self, arguments: dict) -> str | None:
        if self.bounded_gates_only and arguments["lower_bound"] is None:
            return "bounded gates only"
        return None

    def version(self) -> str:
        for name in self.distributions:
            try:
                return f"{name} {version(name)}"
            except ImportError:
                continue
        return "built from source"


def load_fla() -> Callable[[dict], Call]:
    """fla's own Triton kernels. Its autotuner is given 20 ms per configuration instead of 100."""
    os.environ["FLA_FLASH_KDA"] = "0"  # else it hands bounded gates on to FlashKDA, where that is installed
    from fla.ops.kda import chunk_kda
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    def short_bench(kernel_call, quantiles):
        return do_bench(kernel_call, warmup=5, rep=20, quantiles=quantiles)

    Autotuner.do_bench = staticmethod(short_bench)
    return lambda a: lambda: chunk_kda(**a, safe_gate=a["lower_bound"] is not None)[0]


def load_flash_kda() -> Callable[[dict], Call]:
    import flash_kda

    def bind(a: dict) -> Call:
        q, heads, dim = a["q"], a["q"].shape[2], a["q"].shape[3]
        sequences = 1 if a["cu_seqlens"] is None else a["cu_seqlens"].shape[0] - 1
        dt_bias = a["dt_bias"].view(heads, dim)

        def call() -> Tensor:
            out = torch.empty_like(a["v"])
            state = torch.empty(sequences, heads, dim, dim, dtype=torch.float32, device=q.device)
            flash_kda.fwd(
                q,
                a["k"],
                a["v"],
                a["g"],
                a["beta"],
                dim**-0.5,
                out,
                a["A_log"],
                dt_bias,
                a["lower_bound"],
                final_state=state,
                cu_seqlens=a["cu_seqlens"],
            )
            return out

        return call

    return bind


def load_cudnn() -> Callable[[dict], Call]:
    """Its Hopper kernel takes bounded gates as they are; others as g in log space, which a caller computes first."""
    from cudnn.linear_attention.ops import kimi_delta_attention

    def bind(a: dict) -> Call:
        tokens, heads, dim = a["q"].shape[1:]
        q, k, v, g, beta = (a[name][0] for name in ("q", "k", "v", "g", "beta"))
        one = torch.tensor([0, tokens], device=q.device)
        cu_seqlens = (one if a["cu_seqlens"] is None else a["cu_seqlens"]).int()
        dt_bias = a["dt_bias"].view(heads, dim)
        fused = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "output_final_state": True}

        def bounded() -> Tensor:
            gate = {"safe_gate": True, "gate_lower_bound": a["lower_bound"], "a_log": a["A_log"], "dt_bias": dt_bias}
            return kimi_delta_attention(q, k, v, g, beta, cu_seqlens, **gate, **fused)[0][None]

        def softplus() -> Tensor:
            log_decay = -a["A_log"].exp()[:, None] * torch.nn.functional.softplus(g.float() + dt_bias)
            return kimi_delta_attention(q, k, v, log_decay, beta, cu_seqlens, **fused)[0][None]

        return softplus if a["lower_bound"] is None else bounded

    return bind


def load_cudnn_core() -> Callable[[dict], Call]:
    """Its Hopper backward takes the core alone: log-decay and beta in fp32, normalised q and k, the default scale.

    It knows packed tokens only; the views that drop the batch are made in the call, so that their gradients cost views.
    """
    from cudnn.linear_attention.ops import kimi_delta_attention

    def bind(a: dict) -> Call:
        tokens, cu_seqlens = a["q"].shape[1], a["cu_seqlens"]
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, tokens], device=a["q"].device)
        cu_seqlens = cu_seqlens.int()

        def call() -> Tensor:
            streams = (a[name].squeeze(0) for name in ("q", "k", "v", "g", "beta"))
            return kimi_delta_attention(*streams, cu_seqlens)[0].unsqueeze(0)

        return call

    return bind


PEERS = {
    "fla": Peer(("flash-linear-attention",), load_fla),
    "flash_kda": Peer(("flash_kda", "tokenspeed-flashkda"), load_flash_kda, bounded_gates_only=True),
    "cudnn": Peer(("nvidia-cudnn-frontend",), load_cudnn),
}
BACKWARD_PEERS = {  # by the form that each can differentiate
    "fused": {"fla": PEERS["fla"]},
    "core": {"cudnn": Peer(("nvidia-cudnn-frontend",), load_cudnn_core)},
}


def load_peers(names: list[str], peers: dict[str, Peer] = PEERS) -> tuple[dict[str, Callable], dict[str, str]]:
    """Those of ``peers`` that can be imported, and for every name its version or why it is missing."""
    loaded, said = {}, {}
    for name in names:
        try:
            loaded[name] = peers[name].load()
            said[name] = peers[name].version()
        except (ImportError, OSError, RuntimeError, AssertionError) as e:
            said[name] = f"missing: {type(e).__name__}: {str(e)[:160]}"
    return loaded, said


def tuning_keys(chosen: tuple[Shape, ...]) -> list[tuple[Shape, str]]:
    """One shape for each key of fla's autotuners: heads, cu_seqlens or not, and the regime (another kernel)."""
    first: dict[tuple[int, bool], Shape] = {}
    for shape in chosen:
        first.setdefault((shape.heads, len(shape.lengths) > 1), shape)
    return [(shape, regime) for shape in first.values() for regime in shapes.REGIMES]


def launch_share(share: int, shares: int) -> Callable:
    """A benchmark for Triton's autotuner: launches every ``shares``-th configuration once, and times none. What was
    launched is preferred to what was not, and that to what cannot be."""
    turn = itertools.count()

    def launch(kernel_call, quantiles):
        if next(turn) % shares != share:
            return [2.0] * len(quantiles)
        kernel_call()
        return [1.0] * len(quantiles)

    return launch


def launch_first() -> None:
    """From here on Triton's autotuner takes the first configuration of each kernel, and times and compiles no other."""
    from triton.runtime.autotuner import Autotuner

    def untimed(kernel_call, quantiles):
        return [1.0] * len(quantiles)

    Autotuner.do_bench = staticmethod(untimed)


def run_once(bind: Callable[[dict], Call], form: str, shape: Shape, regime: str, backward: bool) -> None:
    (arguments,), do = shapes.training_inputs(form, shape, regime, "cuda", sets=1)
    if backward:
        leaves = truth.leaves_of(arguments)
        truth.step(bind(arguments | leaves), leaves, do)
    else:
        with torch.inference_mode():
            bind(arguments | {"output_final_state": True})()
    torch.cuda.synchronize()


def compile_one(shape: Shape, regime: str, share: int, shares: int, backward: bool, tuned: bool) -> None:
    """A share of the configurations, none of them timed, so that nothing is remembered but the compiled code. If tuned,
    the configuration that an earlier run found best, and an error where none did."""
    os.environ["FLA_CACHE_RESULTS"] = "1" if tuned else "0"
    bind = load_fla()
    from triton.runtime.autotuner import Autotuner

    Autotuner.do_bench = staticmethod(refuse_to_tune if tuned else launch_share(share, shares))
    run_once(bind, "fused", shape, regime, backward)


def refuse_to_tune(kernel_call, quantiles):
    raise RuntimeError("a kernel has no result of an earlier run in TRITON_CACHE_DIR, expected one with --tuned")


def compile_tasks(chosen: tuple[Shape, ...], workers: int) -> list[tuple[Shape, str, int, int]]:
    """Shape, regime, share and shares of each process: a process at least for each key, and all workers busy."""
    keys = tuning_keys(chosen)
    shares = max(1, workers // len(keys))
    return [(*key, share, shares) for key in keys for share in range(shares)]


def compile_fla(chosen: tuple[Shape, ...], workers: int, flags: list[str]) -> int:
    """Returns the number of processes that failed."""

    def work(task: tuple[Shape, str, int, int]) -> int:
        begin = time.perf_counter()
        command = [sys.executable, "-m", "bench.python.peers", "compile-one", *(str(x) for x in task), *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        error = "" if done.returncode == 0 else f", failed: {done.stderr.strip()[-300:]}"
        print(f"{' '.join(command[4:])}: {time.perf_counter() - begin:.0f} s{error}", flush=True)
        return done.returncode != 0

    with ThreadPoolExecutor(workers) as pool:
        return sum(pool.map(work, compile_tasks(chosen, 1 if "--tuned" in flags else workers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    everything = commands.add_parser("compile-fla")
    shapes.add_arguments(everything)
    everything.add_argument("--workers", type=int, default=os.cpu_count())
    commands.add_parser("compile-cudnn")
    one = commands.add_parser("compile-one", help="what each process of compile-fla runs")
    one.add_argument("shape", type=shapes.shape_argument)
    one.add_argument("regime", choices=shapes.REGIMES)
    one.add_argument("share", type=int)
    one.add_argument("shares", type=int)
    for command in (everything, one):
        command.add_argument("--backward", action="store_true", help="forward and backward, as in training")
        command.add_argument("--tuned", action="store_true", help="only what an earlier run found best")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("peers' kernels are compiled for a CUDA device, and there is none")
    if args.command == "compile-one":
        return compile_one(args.shape, args.regime, args.share, args.shares, args.backward, args.tuned)
    if args.command == "compile-cudnn":
        return run_once(load_cudnn_core(), "core", shapes.CORE[0], "fast", backward=True)
    chosen = shapes.FUSED if args.backward and not args.only else shapes.from_arguments(args)
    flags = [f"--{name}" for name in ("backward", "tuned") if getattr(args, name)]
    sys.exit(compile_fla(chosen, args.workers, flags) != 0)


if __name__ == "__main__":
    main()
