"""The shapes and gate regimes of every forward benchmark: those that peers publish figures for."""

from __future__ import annotations

import argparse
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
REGIMES = ("fast", "long")


def named(name: str) -> Shape:
    return next(s for s in ALL if str(s) == name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of these shapes lets one choose."""
    parser.add_argument("--shapes", choices=("ten", "large", "all"), default="all")
    parser.add_argument(
        "--only", nargs="*", metavar="SHAPE", choices=[str(s) for s in ALL], help="such as T8192_H64_N1"
    )


def from_arguments(args: argparse.Namespace) -> tuple[Shape, ...]:
    if args.only:
        return tuple(named(name) for name in args.only)
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
