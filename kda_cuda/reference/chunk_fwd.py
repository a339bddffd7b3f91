"""The chunkwise forward (kda.md §2).

(I + Diag(beta) A_kk) U = Diag(beta) (V - (Gamma.K) S_0)
O   = scale [ (Gamma.Q) S_0 + A_qk U ]
S_C = Diag(Gamma_C) S_0 + K~^T U,    K~ = exp(G_C - G) . K
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import Inputs, Transforms
from .layout import ChunkLayout
from .splits import ChunkDecays, scores


@dataclass
class Chunks:
    """Everything of a chunk that does not depend on the state, ``[chunks, HV, C, ...]``."""

    x: Inputs
    decays: ChunkDecays
    a_qk: Tensor
    a_kk: Tensor
    inverse: Tensor  # (I + Diag(beta) A_kk)^-1, by substitution
    gamma_q: Tensor
    gamma_k: Tensor
    k_to_end: Tensor  # K~

    @classmethod
    def prepare(cls, x: Inputs) -> Chunks:
        a_qk, a_kk, decays = scores(x.q, x.k, x.g)
        inverse = unit_lower_inverse(x.beta * a_kk)
        gamma_q, gamma_k, k_to_end = decays.gamma * x.q, decays.gamma * x.k, decays.to_end * x.k
        return cls(x, decays, a_qk, a_kk, inverse, gamma_q, gamma_k, k_to_end)

    @property
    def gamma_c(self) -> Tensor:
        """The decay over the chunk, ``[chunks, HV, K, 1]``."""
        return self.decays.gamma[:, :, -1].unsqueeze(-1)


def unit_lower_inverse(a: Tensor) -> Tensor:
    """``(I + a)^-1`` of strictly lower ``a``, by substitution.

    In float64: with beta near 2 and keys nearly collinear, the rounding of an fp32 substitution would be what limits
    the states after several chunks (measured: 2e-4 instead of 3e-5).
    """
    identity = torch.eye(a.shape[-1], dtype=torch.float64, device=a.device).expand_as(a)
    return torch.linalg.solve_triangular(a.double(), identity, upper=False, unitriangular=True).to(a.dtype)


@dataclass
class Scan:
    """The sequential part: the state before every chunk, and what every chunk writes to it."""

    states: Tensor  # [chunks, HV, K, V]
    u: Tensor  # [chunks, HV, C, V]


def key_first(state: Tensor, v_first: bool) -> Tensor:
    return state.transpose(-1, -2) if v_first else state


def state_or_zeros(layout: ChunkLayout, x: Inputs, state: Tensor | None, v_first: bool) -> Tensor:
    """A copy of one state per sequence, or zeros: ``[sequences, HV, K, V]``, in the layout's order."""
    if state is None:
        return x.v.new_zeros(layout.sequences, x.v.shape[1], x.k.shape[-1], x.v.shape[-1])
    return layout.sorted_states(key_first(state.to(x.v.dtype), v_first))


def per_head(x: Tensor) -> Tensor:
    """``[chunks, heads, ...]`` as one batch: a view."""
    return x.flatten(0, 1)


def scan(steps: list[slice], c: Chunks, state: Tensor) -> Scan:
    """U = T V - W S_0 with T = (I + Diag(beta) A_kk)^-1 Diag(beta), W = T (Gamma.K). Advances ``state``."""
    t = c.inverse * c.x.beta.transpose(-1, -2)
    u, w = t @ c.x.v, t @ c.gamma_k
    gamma_c, k_to_end = c.gamma_c, c.k_to_end.transpose(-1, -2)
    states = u.new_empty(*u.shape[:2], *state.shape[-2:])
    for now in steps:
        s = state[: now.stop - now.start]
        states[now] = s
        per_head(u[now]).baddbmm_(per_head(w[now]), per_head(s), alpha=-1)
        s *= gamma_c[now]
        per_head(s).baddbmm_(per_head(k_to_end[now]), per_head(u[now]))
    return Scan(states, u)


def outputs(c: Chunks, run: Scan, scale: float) -> Tensor:
    o = c.gamma_q @ run.states
    per_head(o).baddbmm_(per_head(c.a_qk), per_head(run.u))
    return o.mul_(scale)


def chunk_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    use_gate: bool,
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    state_v_first: bool,
    output_final_state: bool,
    chunk_size: int,
    output_chunk_states: bool,
    chunk_state_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = ChunkLayout(q.shape[0], q.shape[1], chunk_size, cu_seqlens, q.device)
    transforms = Transforms(use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval, lower_bound)
    x = transforms.apply(layout, q, k, v, g, beta, A_log, dt_bias)
    state = state_or_zeros(layout, x, initial_state, state_v_first)
    o = torch.empty_like(x.v)
    states = x.v.new_empty(layout.chunks if output_chunk_states else 0, *state.shape[1:])
    for part in layout.parts(x.k):
        c = Chunks.prepare(x[part.chunks])
        run = scan(part.steps, c, state)
        o[part.chunks] = outputs(c, run, scale)
        if output_chunk_states:
            states[part.chunks] = run.states

    final_state, h = x.v.new_empty(0), k.new_empty(0)
    if output_final_state:
        final_state = key_first(layout.natural_states(state), state_v_first).contiguous()
    if output_chunk_states:
        h = key_first(layout.natural_chunks(states), state_v_first).to(k.dtype).contiguous()
    return layout.to_tokens(o, v.dtype), final_state, h
