"""A training step of one KDA layer of fla and of transformers: by itself, through this package's op, and patched.

python -m bench.python.bench_layer [--out FILE] [--tokens T ...] [--hosts fla|transformers ...] [--rounds N]
                                   [--hidden N] [--heads N] [--head-dim N] [--dtype DTYPE] [--device cuda|cpu]

ways: plain is the library as it is (fla's layer on its Triton kernels; transformers' layer on fla where that is
installed, else on PyTorch); registered: the operation alone runs here; patched: the whole layer runs here.
Output and gradients of every way are verified before it is timed, against the patched layer in fp32. Their relative
RMS errors stand in ``errors``. The limit is 2e-2 for the output and 3e-2 for gradients, or twice the error of the plain
way where that is larger; for the plain way itself three times as much. What is wrong is not timed.

gpu_us: device time of the kernels of a step, summed by the profiler; on the CPU, elapsed time. eager_us: a step until
the device is done; host_us: until the host is free again. All ways take turns in every round; each time has the median
and the width of the middle half over it as spread. peak_mib: a warmed-up step above the weights and the input.
kernels: how many a step launches; served: which of fla's functions the step called here, and how often.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from kda_cuda.integrations import fla as fla_door
from kda_cuda.integrations import transformers as door

from . import timing

WAYS = ("plain", "registered", "patched")
HOSTS = ("fla", "transformers")
OUTPUT_LIMIT, GRADIENT_LIMIT = 2e-2, 3e-2


# ---- the layers ------------------------------------------------------------------------------------------------------


def new_layer(host: str, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    if host == "fla":
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

    def __init__(self, name: str, host: str, layer: nn.Module):
        self.name, self.host, self.layer = name, host, copy.deepcopy(layer)
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


# ---- verification ----------------------------------------------------------------------------------------------------


def truth(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The layer patched, in fp32, which on a GPU runs the fp32 kernels, on a CPU the reference."""
    exact = copy.deepcopy(layer).float()
    door.patch(exact)
    return step(exact, x.float(), dy.float())


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


def peak_mib(call: Callable[[], object], layer: nn.Module, device: str) -> float | None:
    if device != "cuda":
        return None
    layer.zero_grad(set_to_none=True)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / (1 << 20), 1)


def served_since(before: dict[str, int]) -> dict[str, int]:
    return {name: n - before.get(name, 0) for name, n in fla_door.report()["served"].items() if n > before.get(name, 0)}


def bench(host: str, tokens: int, args: argparse.Namespace) -> dict:
    """One row: every way of one library at one length."""
    dtype = getattr(torch, args.dtype)
    layer = in_dtype(new_layer(host, args), dtype)
    x, dy = (torch.randn(1, tokens, args.hidden, device=args.device, dtype=dtype) for _ in range(2))
    truths = truth(layer, x, dy)
    said: dict[str, dict] = {}
    running: dict[str, Way] = {}
    for name in WAYS:
        try:
            way = Way(name, host, layer)
            way.enter()
            before = fla_door.report()["served"]
            found = errors(step(way.layer, x, dy), truths)
            said[name] = {"errors": found, "served": served_since(before)}
            if bad := wrong(found, said["plain"].get("errors") if name != "plain" else None):
                said[name]["failed"] = f"wrong, not timed: {bad}"
                continue
            running[name] = way
        except Exception as e:
            said[name] = {"failed": f"{type(e).__name__}: {str(e)[:200]}"}
    samples: dict[str, list] = {name: [] for name in running}
    for _ in range(args.rounds):
        for name, way in running.items():
            way.enter()

            def call(way: Way = way) -> object:
                return step(way.layer, x, dy)

            call()
            gpu, said[name]["kernels"] = kernel_times(call, args.device)
            samples[name].append((gpu, *timing.eager_us([call] * 3, args.device)))
    for name, way in running.items():
        way.enter()
        columns = (timing.summary(c) for c in zip(*samples[name], strict=True))
        said[name] |= dict(zip(("gpu_us", "host_us", "eager_us"), columns, strict=True))
        said[name]["peak_mib"] = peak_mib(lambda way=way: step(way.layer, x, dy), way.layer, args.device)
    return {"host": host, "tokens": tokens, "ways": said}


def table_lines(row: dict) -> list[str]:
    """A line for each way, with how many times faster it is than the plain one."""
    plain, lines = row["ways"]["plain"], []
    for name, said in row["ways"].items():
        start = f"{row['host']:12} T{row['tokens']:<5} {name:10} "
        if "gpu_us" not in said:
            lines.append(f"{start}{said['failed']}")
            continue
        cells = []
        for column in ("gpu_us", "eager_us", "host_us"):
            us = said[column]["median"]
            ratio = f" ({plain[column]['median'] / us:.2f} x)" if column in plain else ""
            cells.append(f"{column[:-3]} {us / 1000:.2f} ms{ratio}")
        lines.append(f"{start}{', '.join(cells)}, {said['peak_mib']} MiB, {said['kernels']} kernels")
    return lines


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 1024])
    parser.add_argument("--hosts", nargs="+", choices=HOSTS, default=list(HOSTS))
    parser.add_argument("--hidden", type=int, default=2304)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the reference, to try this out")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device")
    rows: list[dict] = []
    result = {
        **timing.machine(args.device),
        "device": args.device,
        "dtype": args.dtype,
        "hidden": args.hidden,
        "heads": args.heads,
        "head_dim": args.head_dim,
        "rounds": args.rounds,
        "versions": {name: timing.installed(name) for name in ("fla-core", "transformers", "causal-conv1d")},
        "columns": __doc__[__doc__.index("ways:") :].strip(),
        "rows": rows,
    }
    for host in args.hosts:
        for tokens in args.tokens:
            row = bench(host, tokens, args)
            timing.note(row, table_lines(row), result, args.out, args.device)
    ours = [said for row in rows for name, said in row["ways"].items() if name != "plain"]
    if faults := [said["failed"] for said in ours if "failed" in said]:
        raise SystemExit(f"{len(faults)} of {len(ours)} ways failed, the first: {faults[0]}")


if __name__ == "__main__":
    main()
