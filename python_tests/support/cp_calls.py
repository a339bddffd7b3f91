"""Inputs of whole sequences, their shards, and how far a rank's results are from those of one process."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import kda_cuda
from kda_cuda import parallel

from .cases import Draw, gate_long, gate_violent, gate_zero

STREAMS = ("q", "k", "v", "g", "beta")
LEAVES = (*STREAMS, "A_log", "dt_bias", "initial_state")
ROW = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1}  # of one token; float64: relative to itself
CAP = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}  # relative RMS of a rank; gradients: 3 times


def slow(d: Draw, *size: int):
    """Log-decays with a median of -0.07: a state of a hundred tokens ago still counts."""
    return -0.14 * d.uniform(*size), None, None, None


GATES = {"slow": slow, "zero": gate_zero, "violent": gate_violent, "released": gate_long}


@dataclass(frozen=True)
class Division:
    """Sequences, and how their tokens are divided."""

    cu_seqlens: tuple[int, ...]
    tokens: tuple[int, ...] | None = None
    layout: str = "contiguous"

    def __str__(self) -> str:
        return f"{list(self.cu_seqlens)} as {self.layout if self.tokens is None else list(self.tokens)}"


DIVISIONS = {
    2: [
        Division((0, 40, 90)),  # one boundary crossed
        Division((0, 130)),
        Division((0, 45, 45, 90)),  # none crossed, an empty sequence
        Division((0, 70, 141), (0, 141)),
        Division((0, 67), layout="zigzag"),
    ],
    3: [
        Division((0, 151)),  # all crossed; T not divisible
        Division((0, 20, 60, 61, 150), (50, 0, 100)),
        Division((0, 30, 101), layout="zigzag"),
        Division((0, 3), (1, 1, 1)),
    ],
    4: [
        Division((0, 150)),
        Division((0, 0, 10, 140, 150, 150), (5, 90, 0, 55)),
        Division((0, 60, 150), (0, 60, 0, 90)),  # empty shards, at boundaries of sequences
        Division((0, 31, 32, 101), layout="zigzag"),
        Division((0, 3), layout="zigzag"),
    ],
}


def whole_inputs(division: Division, gate: str, dtype: torch.dtype, v_first: bool = False, sizes=(1, 2, 8, 6)) -> dict:
    """Arguments of ``chunk_kda`` for all tokens, with gradients, and upstream gradients ``do`` and ``dfinal``."""
    heads, value_heads, key_dim, value_dim = sizes
    d, total = Draw(f"{division} {gate}"), division.cu_seqlens[-1]
    g, A_log, dt_bias, lower_bound = GATES[gate](d, 1, total, value_heads, key_dim)
    states = (len(division.cu_seqlens) - 1, value_heads, *((value_dim, key_dim) if v_first else (key_dim, value_dim)))
    tensors = {
        "q": d.normal(1, total, heads, key_dim),
        "k": d.normal(1, total, heads, key_dim),
        "v": d.normal(1, total, value_heads, value_dim),
        "g": g,
        "beta": d.uniform(1, total, value_heads),
        "do": d.normal(1, total, value_heads, value_dim),
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    tensors |= {"initial_state": d.normal(*states).to(wide), "dfinal": d.normal(*states).to(wide)}
    tensors |= {n: None if x is None else x.to(wide) for n, x in (("A_log", A_log), ("dt_bias", dt_bias))}
    options = {"use_gate_in_kernel": A_log is not None, "lower_bound": lower_bound, "state_v_first": v_first}
    return tensors | options | {"use_qk_l2norm_in_kernel": True, "output_final_state": True}


def split_off(x: dict) -> tuple[dict, Tensor, Tensor]:
    """The arguments with leaves of their own, do and dfinal."""
    x = {name: y.detach().clone().requires_grad_() if name in LEAVES and y is not None else y for name, y in x.items()}
    return x, x.pop("do"), x.pop("dfinal")


def truth_of(division: Division, x: dict) -> dict[str, Tensor]:
    """o, the final states and every gradient: float64, in one process."""
    x = {name: y.double() if isinstance(y, Tensor) else y for name, y in x.items()}
    x, do, dfinal = split_off(x)
    o, final = kda_cuda.chunk_kda(**x, cu_seqlens=torch.tensor(division.cu_seqlens))
    leaves = {name: x[name] for name in LEAVES if x[name] is not None}
    found = torch.autograd.grad([o, final], list(leaves.values()), [do, dfinal])
    return {"o": o.detach(), "final": final.detach()} | {f"d{n}": d for n, d in zip(leaves, found, strict=True)}


def of_rank(context: parallel.CPContext, x: dict) -> dict:
    """The arguments of one rank, leaves of their own. States of no sequence are ones: they must change nothing."""
    own = {name: context.shard(x[name]) for name in (*STREAMS, "do")}
    own |= {name: rows_of(context, x[name]) for name in ("initial_state", "dfinal")}
    return x | own


def rows_of(context: parallel.CPContext, states: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(states[0]) if n < 0 else states[n] for n in context.sequences])


def begins_and_ends(context: parallel.CPContext) -> list[tuple[bool, bool]]:
    """Of each local sequence: whether it begins here, and whether it ends here."""
    if context.layout == "contiguous":
        fronts, parts = context.num_seqs, [(context.is_first_rank, context.is_last_rank, context.num_seqs)]
    else:
        fronts = context.front_num_seqs
        counts = (fronts, context.num_seqs - fronts)
        parts = list(zip(context.is_first_by_part, context.is_last_by_part, counts, strict=True))
    return [(n > 0 or first, n < count - 1 or last) for first, last, count in parts for n in range(count)]


def results_of(context: parallel.CPContext, x: dict, call: Any = kda_cuda.chunk_kda) -> dict[str, Tensor]:
    """o, final states and gradients of one rank, of :func:`of_rank`."""
    x, do, dfinal = split_off(x)
    ends = torch.tensor([own for _, own in begins_and_ends(context)])
    o, final = call(**x, cp_context=context)
    leaves = {name: x[name] for name in LEAVES if x[name] is not None}
    upstream = [do, dfinal * ends[:, None, None, None]]
    found = torch.autograd.grad([o, final], list(leaves.values()), upstream)
    return {"o": o.detach(), "final": final.detach()} | {f"d{n}": d for n, d in zip(leaves, found, strict=True)}


def check_rank(
    context: parallel.CPContext, got: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """What belongs to tokens, and the states of the sequences that begin or end here. Not sums over tokens."""
    begins, ends = (torch.tensor(flags) for flags in zip(*begins_and_ends(context), strict=True))
    own = torch.tensor(context.sequences) >= 0
    for name, x in got.items():
        if name in ("dA_log", "ddt_bias"):
            continue
        if name in ("final", "dinitial_state"):
            chosen = own & (ends if name == "final" else begins)
            if name == "dinitial_state":
                assert not x[~begins].any(), "an initial state that is not used has a gradient"
            check_near(name, x[chosen], rows_of(context, truth[name])[chosen], dtype)
        else:
            check_near(name, x, context.shard(truth[name]), dtype)


def check_near(name: str, x: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Relative RMS over the rank, and each row: of a token and a head, or of a state."""
    assert x.shape == truth.shape and bool(x.isfinite().all()), (name, x.shape, truth.shape)
    if not x.numel():
        return
    factor = 3 if name.startswith("d") else 1
    error, size = (y.double().norm(dim=-1) for y in (x.double() - truth, truth))
    rms = (error.norm() / size.norm().clamp(min=1e-300)).item() if error.any() else 0.0
    assert rms <= factor * CAP[dtype], f"{name}: relative RMS error {rms:.2e}"
    typical = size.square().mean().sqrt()
    floor = 1e-3 * typical if dtype == torch.float64 else typical
    rows = (error / torch.maximum(size, floor).clamp(min=1e-300)).max().item()
    assert rows <= factor * ROW[dtype], f"{name}: relative error of a row {rows:.2e}"


# The fields of fla.ops.cp.FLACPContext in fla-core 0.6.0
FLA_FIELDS = (
    "group",
    "cu_seqlens",
    "cu_seqlens_cpu",
    "is_last_rank",
    "pre_num_ranks",
    "is_first_rank",
    "post_num_ranks",
    "conv1d_kernel_size",
    "pre_num_conv_tokens",
    "pre_num_ranks_dev",
    "post_num_ranks_dev",
    "layout",
    "part_len",
    "front_num_seqs",
    "pre_num_ranks_by_part",
    "post_num_ranks_by_part",
    "is_first_by_part",
    "is_last_by_part",
    "pre_num_conv_tokens_by_part",
)


def as_fla(context: parallel.CPContext) -> SimpleNamespace:
    """A context of flash-linear-attention with these contents: it has these fields and no others."""
    return SimpleNamespace(**{name: getattr(context, name, None) for name in FLA_FIELDS})
