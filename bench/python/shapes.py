"""The shapes and gate regimes of the benchmarks of whole sequences: those that peers publish figures for."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    tokens: int
    heads: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"T{self.tokens}_H{self.heads}_N{len(self.lengths)}"


def even(tokens: int, heads: int, sequences: int) -> Shape:
    return Shape(tokens, heads, (tokens // sequences,) * sequences)


RAGGED = (1300, 547, 2048, 963, 271, 3063)
TEN = tuple(
    even(*s)
    for s in ((2048, 12, 1), (2048, 16, 1), (4096, 8, 1), (4096, 12, 1), (8192, 12, 4), (8192, 16, 1), (1024, 4, 1),
              (3072, 10, 1), (8192, 24, 1), (16384, 16, 8))
)  # fmt: skip
LARGE = tuple(s for h in (64, 96) for s in (even(8192, h, 1), Shape(8192, h, RAGGED), even(8192, h, 8)))
ALL = TEN + LARGE
FUSED = tuple(even(*s) for s in ((1024, 32, 1), (8192, 16, 1), (8192, 64, 1)))  # training steps, everything fused
CORE = tuple(  # backwards of the core alone
    even(*s)
    for s in ((2048, 16, 1), (4096, 8, 1), (4096, 16, 1), (8192, 12, 4), (8192, 16, 1), (8192, 32, 1), (8192, 64, 1),
              (8192, 64, 8), (16384, 16, 8))
)  # fmt: skip
GENERAL = (even(8192, 16, 1),)  # the core alone beside a general diagonal-plus-low-rank transition
REGIMES = ("fast", "long")
VERIFIED = 1 << 20  # tokens times heads for which the reference fits


def named(name: str) -> Shape:
    """A shape of the lists above by its name, or sequences of equal length: ``T200_H2_N2``."""
    for shape in ALL:
        if str(shape) == name:
            return shape
    numbers = re.fullmatch(r"T([1-9]\d*)_H([1-9]\d*)_N([1-9]\d*)", name)
    tokens, heads, sequences = (int(x) for x in numbers.groups()) if numbers else (0, 0, 1)
    if not tokens or tokens % sequences:
        raise ValueError(f"shapes.named: name is {name!r}, expected such as T8192_H64_N1, N a divisor of T")
    return even(tokens, heads, sequences)


def shape_argument(name: str) -> Shape:
    """:func:`named` for argparse, which shows no message of a ValueError."""
    try:
        return named(name)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of these shapes lets one choose."""
    parser.add_argument("--shapes", choices=("ten", "large", "all"), default="all")
    parser.add_argument("--only", nargs="*", metavar="SHAPE", type=shape_argument, help="such as T8192_H64_N1")


def from_arguments(args: argparse.Namespace) -> tuple[Shape, ...]:
    if args.only:
        return tuple(args.only)
    return {"ten": TEN, "large": LARGE, "all": ALL}[args.shapes]


def inputs(shape: Shape, regime: str, device: str, dtype: torch.dtype, head_dim: int = 128, seed: int = 0) -> dict:
    """Arguments of ``chunk_kda``. ``fast``: bounded gate at -5, no channel remembers for 16 tokens. ``long``: the
    released model's gate at its own initialisation; most channels remember for hundreds of tokens."""
    gen = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=gen, device=device)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=gen, device=device)

    t, h = shape.tokens, shape.heads
    q, k, v, g = (normal(1, t, h, head_dim) for _ in range(4))
    beta = normal(1, t, h)
    if regime == "fast":
        gate = {"A_log": uniform(h), "dt_bias": uniform(h * head_dim), "lower_bound": -5.0}
    else:
        g = 0.1 * g
        dt = torch.exp(uniform(h * head_dim) * 4.605170186 - 6.907755279)  # [1e-3, 1e-1], log-uniform
        gate = {"A_log": (1 + 15 * uniform(h)).log(), "dt_bias": dt + torch.log(-torch.expm1(-dt)), "lower_bound": None}
    bounds = torch.tensor([0, *shape.lengths], dtype=torch.int64).cumsum(0)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    cu_seqlens = bounds.to(device) if len(shape.lengths) > 1 else None
    return {
        "q": q, "k": k, "v": v, "g": g, "beta": beta, **gate, "cu_seqlens": cu_seqlens,
        "use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True,
        "output_final_state": True,
    }  # fmt: skip


def traffic_bytes(shape: Shape, head_dim: int, element: int) -> int:
    """What a forward must move at least: q, k, v, g, beta read, o written (docs/mathematics.md, section 5)."""
    return shape.tokens * shape.heads * (5 * head_dim + 1) * element


def core_of(arguments: dict) -> dict:
    """The call without its fused parts: q and k normalised, beta in (0, 1) and the log-decay in fp32."""
    a = {name: x.float() for name, x in arguments.items() if name in ("q", "k", "g", "beta")}
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (a["q"], a["k"]))
    raw = a["g"] + arguments["dt_bias"].view(a["g"].shape[2:])
    amplitude, lower_bound = arguments["A_log"].exp()[:, None], arguments["lower_bound"]
    if lower_bound is None:
        g = -amplitude * torch.nn.functional.softplus(raw)
    else:
        g = lower_bound * torch.sigmoid(amplitude * raw)
    narrow = arguments["v"].dtype
    return {
        "q": q.to(narrow), "k": k.to(narrow), "v": arguments["v"], "g": g, "beta": a["beta"].sigmoid(),
        "cu_seqlens": arguments["cu_seqlens"],
    }  # fmt: skip


FORMS = {"fused": FUSED, "core": CORE, "general": GENERAL}


def sampled_heads(tokens: int, heads: int) -> list[int]:
    """All heads, or as many as the reference can take: the first, the last, and others at equal distances."""
    count = max(1, min(heads, VERIFIED // tokens))
    return [i * (heads - 1) // max(1, count - 1) for i in range(count)]


def training_inputs(
    form: str, shape: Shape, regime: str, device: str, sets: int, head_dim: int = 128
) -> tuple[list[dict], Tensor]:
    """Sets of arguments of ``chunk_kda`` in one form, all with one ``cu_seqlens``, and an upstream gradient."""
    every = [inputs(shape, regime, device, torch.bfloat16, head_dim, seed=i) for i in range(sets)]
    every = [a | {"output_final_state": False, "cu_seqlens": every[0]["cu_seqlens"]} for a in every]
    if form != "fused":
        every = [core_of(a) for a in every]
    v = every[0]["v"]
    do = torch.randn(v.shape, generator=torch.Generator(device).manual_seed(sets), device=device).to(v.dtype)
    return every, do
