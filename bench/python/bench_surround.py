"""What surrounds the operation, side by side with its peers and with a copy: verified first, then timed.

python -m bench.python.bench_surround [--out FILE] [--ops short_conv gated_rmsnorm] [--what forward backward]
                                      [--shapes SHAPE ...] [--peers [NAME ...] | --no-peers] [--rounds N]
                                      [--budget SECONDS] [--device cuda|emulator|cpu]

Shapes are TOKENSxCHANNELS for short_conv (4 taps, SiLU), with xN for N packed sequences of equal length, and
TOKENSxHEADSxDIM for gated_rmsnorm (sigmoid). All in bf16. Peers are fla's Triton kernels, and causal_conv1d where it is
installed. One that is missing or fails is named with the reason; what is wrong is not timed. If it is ours, the run
goes on with the next row and fails in the end. The reference is PyTorch in fp32.

bench/python/harness.py says what the columns of a row mean. A copy of as many bytes in one tensor takes its turns as
the provider `copy`, in a graph as the others do.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import kda_cuda

from . import harness, timing
from .harness import Provider, Trainer, failure, judged, too_large
from .providers import FLA, Peer, load_peers
from .truth import leaves_of, step

Call = Callable[[], Tensor]
Bind = Callable[[dict], Call]
WHAT = ("forward", "backward")
TAPS, EPS = 4, 1e-5
LIMIT = 1e-2  # relative RMS error of bf16 results
DEFAULT = {  # the first of each is the one that the design was made for
    "short_conv": ("8192x4096", "8192x12288", "1024x4096", "8192x4096x8", "65536x4096"),
    "gated_rmsnorm": ("8192x32x128", "1024x32x128", "8192x64x128", "65536x32x128", "8192x32x64"),
}


@dataclass(frozen=True)
class Op:
    """An operation as the benchmark needs it."""

    leaves: tuple[str, ...]
    forward_streams: int  # tensors of the size of x that a forward moves
    backward_streams: int
    inputs: Callable[[tuple[int, ...], str, int], dict]  # of a shape, device and seed
    definition: Callable[[dict], Tensor]  # in the dtype of its arguments, by torch alone
    ours: Bind
    peers: dict[str, Peer]

    def reference(self, a: dict) -> Call:
        def call() -> Tensor:
            wide = a | {name: a[name].float() for name in self.leaves}
            return self.definition(wide).to(a["x"].dtype)

        return call


def randn(make: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=make, device=make.device)


def conv_inputs(shape: tuple[int, ...], device: str, seed: int) -> dict:
    make = torch.Generator(device).manual_seed(seed)
    tokens, channels, *sequences = shape
    x, weight = randn(make, 1, tokens, channels), 0.5 * randn(make, channels, TAPS)
    cu_seqlens = None
    if sequences:
        cu_seqlens = torch.arange(sequences[0] + 1, device=device, dtype=torch.int32) * (tokens // sequences[0])
        cu_seqlens[-1] = tokens
    return {"x": x.bfloat16(), "weight": weight.bfloat16(), "cu_seqlens": cu_seqlens}


def conv_definition(a: dict) -> Tensor:
    """Each tap once; where documents meet, their first tokens see zeros."""
    x, weight, cu_seqlens = a["x"], a["weight"], a["cu_seqlens"]
    tokens = torch.arange(x.shape[1], device=x.device)
    begin = torch.zeros_like(tokens)
    if cu_seqlens is not None:
        begin = cu_seqlens[torch.searchsorted(cu_seqlens, tokens, right=True) - 1].long()
    y = x * weight[:, TAPS - 1]
    for back in range(1, TAPS):
        seen = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]] * (tokens - back >= begin)[:, None]
        y = y + seen * weight[:, TAPS - 1 - back]
    return F.silu(y)


def load_fla_conv() -> Bind:
    from fla.modules.convolution import causal_conv1d

    def bind(a: dict) -> Call:
        return lambda: causal_conv1d(a["x"], a["weight"], activation="silu", cu_seqlens=a["cu_seqlens"])[0]

    return bind


def load_causal_conv1d() -> Bind:
    """Channels come second there; documents by the index of each token."""
    from causal_conv1d import causal_conv1d_fn

    def bind(a: dict) -> Call:
        documents = None
        if a["cu_seqlens"] is not None:
            tokens = torch.arange(a["x"].shape[1], device=a["x"].device, dtype=torch.int32)
            documents = (torch.searchsorted(a["cu_seqlens"], tokens, right=True) - 1).int()[None]

        def call() -> Tensor:
            x = a["x"].transpose(1, 2)
            return causal_conv1d_fn(x, a["weight"], activation="silu", seq_idx=documents).transpose(1, 2)

        return call

    return bind


def norm_inputs(shape: tuple[int, ...], device: str, seed: int) -> dict:
    make = torch.Generator(device).manual_seed(seed)
    x, gate, weight = randn(make, 1, *shape), randn(make, 1, *shape), 1 + 0.1 * randn(make, shape[-1])
    return {"x": x.bfloat16(), "gate": gate.bfloat16(), "weight": weight.bfloat16()}


def norm_definition(a: dict) -> Tensor:
    normalised = a["x"] * torch.rsqrt(a["x"].square().mean(-1, keepdim=True) + EPS)
    return normalised * a["weight"] * torch.sigmoid(a["gate"])


def load_fla_norm() -> Bind:
    from fla.modules.fused_norm_gate import rms_norm_gated

    def bind(a: dict) -> Call:
        return lambda: rms_norm_gated(a["x"], a["gate"], a["weight"], None, activation="sigmoid", eps=EPS)

    return bind


OPS = {
    "short_conv": Op(
        leaves=("x", "weight"),
        forward_streams=2,
        backward_streams=3,
        inputs=conv_inputs,
        definition=conv_definition,
        ours=lambda a: lambda: kda_cuda.short_conv(a["x"], a["weight"], cu_seqlens=a["cu_seqlens"])[0],
        peers={
            "fla": Peer(FLA, load_fla_conv),
            "causal_conv1d": Peer(("causal-conv1d",), load_causal_conv1d),
        },
    ),
    "gated_rmsnorm": Op(
        leaves=("x", "gate", "weight"),
        forward_streams=3,
        backward_streams=5,
        inputs=norm_inputs,
        definition=norm_definition,
        ours=lambda a: lambda: kda_cuda.gated_rmsnorm(a["x"], a["gate"], a["weight"], EPS),
        peers={"fla": Peer(FLA, load_fla_norm)},
    ),
}
PEERS = tuple(dict.fromkeys(name for op in OPS.values() for name in op.peers))


class Copies:
    """What a copy of as many bytes takes: half of them read, half of them written."""

    def __init__(self, op: Op, sets: list[dict]):
        self.op, self.sets, self.provider = op, sets, Provider(op.ours)

    def calls(self, what: str) -> list[Callable[[], object]]:
        streams = self.op.forward_streams if what == "forward" else self.op.backward_streams
        size = self.sets[0]["x"].nbytes * streams // 2
        pairs = [torch.empty(2, size, dtype=torch.uint8, device=a["x"].device) for a in self.sets]
        return [lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]


def truths_of(op: Op, a: dict, do: Tensor) -> dict[str, Tensor]:
    wide = a | {name: a[name].double() for name in op.leaves}
    leaves = leaves_of(wide, op.leaves)
    return step(lambda: op.definition(wide | leaves), leaves, do.double())


def bench(name: str, shape: str, binds: dict[str, Bind], args: argparse.Namespace) -> dict:
    """One row: every provider that is right, forward and backward."""
    op, sizes, where = OPS[name], tuple(int(n) for n in shape.split("x")), f"{name}, {shape}"
    first = op.inputs(sizes, args.device, 0)
    stream = first["x"].nbytes
    count = harness.set_count(stream, args.device)
    sets = [first, *(op.inputs(sizes, args.device, seed) for seed in range(1, count))]
    do = randn(torch.Generator(args.device).manual_seed(99), *first["x"].shape).bfloat16()
    truths = truths_of(op, first, do)
    moved = {"forward": op.forward_streams * stream, "backward": op.backward_streams * stream}
    said: dict[str, dict] = {}
    with timing.side_stream(args.device):
        trainers: dict = {}
        for provider, bind in harness.with_ours(op.ours, op.reference, binds, args.device).items():
            try:
                trainer = Trainer(bind, sets, do, op.leaves)
                found = trainer.verified(truths)
                said[provider] = judged(provider, found, too_large(found, {}, LIMIT), where)
            except Exception as e:
                said[provider] = failure(provider, where, e)
                continue
            if "failed" not in said[provider]:
                trainers[provider] = trainer
        said["copy"], trainers["copy"] = {}, Copies(op, sets)
        moved = {what: moved[what] for what in args.what}
        harness.measure(trainers, said, moved, args)
    return {"bytes": moved, "providers": said}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    harness.add_arguments(parser, PEERS, rounds=20)
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--shapes", nargs="+", help="for every op asked for")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    loaded = {name: load_peers(args.peers, OPS[name].peers) for name in args.ops}
    said = {f"{peer} ({name})": why for name, (_, peers) in loaded.items() for peer, why in peers.items()}
    result = harness.begin(args, "surround", said, dtype="bfloat16", taps=TAPS)
    work = [
        ({"op": name, "shape": shape}, functools.partial(bench, name, shape, loaded[name][0], args))
        for name in args.ops
        for shape in args.shapes or DEFAULT[name]
    ]
    harness.run(args, result, work)


if __name__ == "__main__":
    main()
