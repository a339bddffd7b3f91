"""A training step of one layer: KDA of this package beside attention, and KDA of fla and transformers run here.

python -m bench.python.bench_layer [--out FILE] [--tokens T ...] [--hosts kda_cuda|fla|transformers ...] [--hidden N]
                                   [--heads N] [--head-dim N] [--dtype DTYPE] [--compile SECONDS] [--rounds N]
                                   [--budget SECONDS] [--device cuda|emulator|cpu]

Host kda_cuda, in both gate regimes: kda_cuda is this package's layer, sdpa a layer of causal attention with as many
heads; on the emulator, reference is the layer without kernels. Hosts fla and transformers: plain is the library as it
is (fla's layer on its Triton kernels; transformers' layer on fla where that is installed, else on PyTorch); registered:
the operation alone runs here; patched: the whole layer runs here.

Output and gradients are verified before anything is timed, against the layer in fp32 (patched, for another host). The
limit is 2e-2 for the output and 3e-2 for gradients, or twice the error of the plain way where that is larger; for the
plain way itself, and where there is none, three times as much. What is wrong is not timed; if it is ours, the run goes
on and fails in the end.

If fla is installed, its Triton kernels are compiled first, in a process for each core, within --compile seconds. A host
whose kernels are not ready by then is left out, since one process would compile for minutes. A second run goes on from
there.

gpu_us: device time of the kernels of a step, summed by the profiler; on the CPU, elapsed time. peak_mib: a warmed-up
step above the weights and the input. kernels: how many a step launches; served: which of fla's functions the step
called here, and how often. bench/python/harness.py says what the other columns mean.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kda_cuda import layers, testing
from kda_cuda.integrations import fla as fla_door
from kda_cuda.integrations import transformers as door

from . import harness, peers, timing
from .harness import OURS, OurFault, failure
from .providers import tune_shortly

HOSTS = (OURS, "fla", "transformers")
WAYS = ("plain", "registered", "patched")
THEIRS = ("plain", "sdpa", "reference")  # no kernel of this package runs there
OUTPUT_LIMIT, GRADIENT_LIMIT = 2e-2, 3e-2


# ---- the layers ------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal attention with as many heads as KDA: what a model would have in its place."""

    def __init__(self, hidden: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, width = heads, heads * head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(hidden, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        streams = (p(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(F.scaled_dot_product_attention(*streams, is_causal=True).transpose(1, 2).flatten(2))


def new_layer(host: str, regime: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    if host == OURS:
        bound = -5.0 if regime == "fast" else None
        layer = layers.KimiDeltaAttention(args.hidden, args.heads, args.head_dim, lower_bound=bound)
    elif host == "fla":
        from fla.layers.kda import KimiDeltaAttention

        layer = KimiDeltaAttention(args.hidden, head_dim=args.head_dim, num_heads=args.heads, layer_idx=0)
    else:
        from transformers import KimiLinearConfig
        from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

        config = KimiLinearConfig(
            hidden_size=args.hidden,
            linear_head_dim=args.head_dim,
            linear_num_heads=args.heads,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
            num_attention_heads=args.heads,
            num_key_value_heads=args.heads,
        )
        layer = KimiLinearDeltaAttention(config, 0)
        gate = layer.forget_gate
        with torch.no_grad():  # a layer alone is not initialised by transformers: as a model's would be
            gate.A_log.uniform_(1, 16).log_()
            dt = gate.dt_bias.uniform_(-6.9, -2.3).exp_()
            dt.add_(torch.log(-torch.expm1(-dt)))
            layer.o_norm.weight.fill_(1)
    return layer.to(args.device)


def in_dtype(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer with weights of ``dtype``, the gate's parameters in fp32."""
    for name, p in layer.named_parameters():
        if name.rpartition(".")[2] not in ("A_log", "dt_bias"):
            p.data = p.data.to(dtype)
    return layer


def output_of(layer: nn.Module, x: Tensor) -> Tensor:
    y = layer(x)
    return y[0] if isinstance(y, tuple) else y


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward; the output and the gradients, of the input too."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = output_of(layer, x)
    y.backward(dy)
    return y.detach(), {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


class Way:
    """One way to run a layer: what must be set up before its calls, and the layer itself."""

    def __init__(self, name: str, host: str, layer: nn.Module, args: argparse.Namespace):
        self.name, self.host = name, host
        self.emulates = args.device.name == "emulator" and name not in THEIRS
        if name == "sdpa":
            attention = Attention(args.hidden, args.heads, args.head_dim).to(args.device)
            self.layer = in_dtype(attention, getattr(torch, args.dtype))
        else:
            self.layer = copy.deepcopy(layer)
        if name == "patched":
            door.patch(self.layer)

    def enter(self) -> None:
        """Another way may have run in between."""
        on = self.name == "registered"
        for module, wanted in ((fla_door, self.host == "fla"), (door, self.host == "transformers")):
            if on and wanted:
                module.register()
            else:
                module.unregister()

    def step(self, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        threads = torch.get_num_threads()
        with testing.emulated(threads=threads) if self.emulates else contextlib.nullcontext():
            return step(self.layer, x, dy)

    def truth(self, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The layer in fp32, patched: on a GPU the fp32 kernels run, on a CPU the reference."""
        exact = copy.deepcopy(self.layer).float()
        if self.name == "plain":
            door.patch(exact)
        return step(exact, x.float(), dy.float())


def ways_of(host: str, args: argparse.Namespace) -> tuple[str, ...]:
    if host != OURS:
        return WAYS
    return (OURS, *(("reference",) if args.device.name == "emulator" else ()), "sdpa")


# ---- verification ----------------------------------------------------------------------------------------------------


def relative(a: Tensor, b: Tensor) -> float:
    return float(f"{((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item():.2e}")


def errors(results: tuple, truths: tuple) -> dict[str, float]:
    gradients = {name: relative(d, truths[1][name]) for name, d in results[1].items() if d is not None}
    return {"output": relative(results[0], truths[0])} | gradients


def wrong(found: dict[str, float], plain: dict[str, float] | None) -> dict[str, float]:
    def limit(name: str) -> float:
        least = OUTPUT_LIMIT if name == "output" else GRADIENT_LIMIT
        return max(least, 2 * plain[name]) if plain else 3 * least

    return {name: e for name, e in found.items() if not e <= limit(name)}  # NaN is wrong too


def verified(way: Way, x: Tensor, dy: Tensor, truths: tuple, plain: dict[str, float] | None, where: str) -> dict:
    """What is said of a way. One of ours that fails or is wrong ends the row."""
    ours = way.name not in THEIRS
    try:
        way.enter()
        before = fla_door.report()["served"]
        found = errors(way.step(x, dy), way.truth(x, dy) if way.name == "sdpa" else truths)
        said = {"errors": found, "served": served_since(before)}
    except Exception as e:
        if ours:
            raise OurFault(f"{way.name} failed in {where}: {type(e).__name__}: {e}") from e
        return failure(way.name, where, e)
    if bad := wrong(found, plain):
        if ours:
            raise OurFault(f"{way.name} is wrong in {where}, nothing is timed: {bad}")
        said["failed"] = f"wrong, not timed: {bad}"
    return said


def served_since(before: dict[str, int]) -> dict[str, int]:
    return {name: n - before.get(name, 0) for name, n in fla_door.report()["served"].items() if n > before.get(name, 0)}


# ---- measurement -----------------------------------------------------------------------------------------------------


def kernel_times(call: Callable[[], object], device: str) -> tuple[float, int]:
    """Microseconds that the device works in one call, and the number of kernels."""
    if device != "cuda":
        return timing.elapsed_us(call, device), 0
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    ran = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(e.time_range.elapsed_us() for e in ran), len(ran)


def time_ways(running: dict[str, Way], said: dict, x: Tensor, dy: Tensor, moved: int, args: argparse.Namespace) -> None:
    samples: dict[str, list] = {name: [] for name in running}
    for turn in range(args.rounds):
        for name, way in running.items():
            way.enter()
            call = functools.partial(way.step, x, dy)
            if turn == 0:
                print(f"       timing {name}", flush=True)
                call()
            gpu, said[name]["kernels"] = kernel_times(call, args.device)
            samples[name].append((gpu, *timing.eager_us([call] * 2, args.device)))
    for name, way in running.items():
        way.enter()
        way.layer.zero_grad(set_to_none=True)
        said[name]["peak_mib"] = harness.peak_mib(functools.partial(way.step, x, dy), args.device)
        columns = (timing.summary(c) for c in zip(*samples[name], strict=True))
        said[name]["step"] = dict(zip(("gpu_us", "host_us", "eager_us"), columns, strict=True))
        seconds = 1e-6 * said[name]["step"]["gpu_us"]["median"]
        if name != "sdpa":
            said[name]["step"]["of_copy"] = round(moved / seconds / args.bandwidth, 3)


def bench(host: str, regime: str, tokens: int, unready: dict[str, str], args: argparse.Namespace) -> dict:
    """One row: every way of one library at one length."""
    dtype, where = getattr(torch, args.dtype), f"{host}, {tokens} tokens, {regime}"
    ways = ways_of(host, args)
    try:
        layer = in_dtype(new_layer(host, regime, args), dtype)
    except ImportError as e:
        return {"bytes": {"step": None}, "providers": {way: {"failed": f"{host} is missing: {e}"} for way in ways}}
    x, dy = (torch.randn(1, tokens, args.hidden, device=args.device, dtype=dtype) for _ in range(2))
    moved = 4 * x.nbytes + 2 * sum(p.nbytes for p in layer.parameters())
    truths = Way("plain" if host != OURS else OURS, host, layer, args).truth(x, dy)
    said: dict[str, dict] = {}
    running: dict[str, Way] = {}
    for name in ways:
        if host in unready and name != "patched":
            said[name] = {"failed": unready[host]}
            continue
        print(f"       verifying {name}", flush=True)
        way = Way(name, host, layer, args)
        said[name] = verified(way, x, dy, truths, said.get("plain", {}).get("errors"), where)
        if "failed" not in said[name]:
            running[name] = way
    time_ways(running, said, x, dy, moved, args)
    return {"bytes": {"step": moved}, "providers": said}


# ---- kernels that are compiled first ---------------------------------------------------------------------------------


def compile_share(args: argparse.Namespace) -> None:
    """What each process of :func:`compile_first` runs: plain steps that launch a share of the configurations."""
    peers.launch_configurations(*args.share)
    (host,) = args.hosts
    layer = in_dtype(new_layer(host, "long", args), getattr(torch, args.dtype))
    for tokens in args.tokens:
        x = torch.randn(1, tokens, args.hidden, device=args.device, dtype=getattr(torch, args.dtype))
        step(layer, x, x)
    timing.synchronize(args.device)


def compile_first(args: argparse.Namespace) -> dict[str, str]:
    """The hosts whose kernels are not ready, and why."""
    if args.device != "cuda" or not find_spec("fla"):
        return {}
    hosts = [host for host in args.hosts if host != OURS]
    sizes = ["--tokens", *args.tokens, "--hidden", args.hidden, "--heads", args.heads, "--head-dim", args.head_dim]
    shares = max(1, args.workers // max(1, len(hosts)))
    commands = {}
    for host in hosts:
        for share in range(shares):
            flags = ["--hosts", host, "--dtype", args.dtype, *sizes, "--share", share, shares]
            commands[f"{host} {share}"] = [sys.executable, "-m", "bench.python.bench_layer", *map(str, flags)]
    failed = peers.in_processes(commands, args.workers, args.compile)
    tune_shortly()
    return {name.split()[0]: f"fla's kernels are not compiled: {why}" for name, why in failed.items()}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser, (), rounds=9)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 1024])
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--hidden", type=int, default=2304)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", type=float, default=240, help="seconds for fla's kernels")
    parser.add_argument("--workers", type=int, default=peers.cores(), help="processes that compile")
    parser.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    if args.share:
        return compile_share(args)
    versions = {name: timing.installed(name) for name in ("fla-core", "transformers", "causal-conv1d")}
    sizes = {name: getattr(args, name) for name in ("dtype", "hidden", "heads", "head_dim")}
    missing = {name: v or "missing" for name, v in versions.items()}
    result = harness.begin(args, "layer", missing, **sizes)
    unready = compile_first(args)
    work = []
    for host in args.hosts:
        for regime in ("long", "fast") if host == OURS else ("long",):
            for tokens in args.tokens:
                labels = {"host": host, "regime": regime, "tokens": tokens}
                work.append((labels, functools.partial(bench, host, regime, tokens, unready, args)))
    harness.run(args, result, work)


if __name__ == "__main__":
    main()
