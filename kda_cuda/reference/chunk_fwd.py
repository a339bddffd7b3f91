"""The chunkwise forward (kda.md §2).

(I + Diag(beta) A_kk) U = Diag(beta) (V - (Gamma.K) S_0)
O   = scale [ (Gamma.Q) S_0 + A_qk U ]
S_C = Diag(Gamma_C) S_0 + K~^T U
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import ChunkLayout, Transforms
from .splits import scores, sum_after


@dataclass
class Chunks:
    """Everything of a chunk that does not depend on the state: ``[chunks, HV, C, ...]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor  # [chunks, HV, C, 1]
    gamma: Tensor  # exp(g_1 + ... + g_r)
    to_end: Tensor  # exp(g_{i+1} + ... + g_C)
    a_qk: Tensor
    a_kk: Tensor
    inverse: Tensor  # (I + Diag(beta) A_kk)^-1

    @classmethod
    def prepare(cls, layout: ChunkLayout, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Chunks:
        q, k, v, g = (layout.to_chunks(x) for x in (q, k, v, g))
        beta = layout.to_chunks(beta).unsqueeze(-1)
        a_qk, a_kk = scores(q, k, g)
        identity = torch.eye(layout.chunk, dtype=q.dtype, device=q.device)
        inverse = torch.linalg.solve_triangular(
            identity + beta * a_kk, identity.expand_as(a_kk), upper=False, unitriangular=True
        )
        return cls(q, k, v, g, beta, g.cumsum(-2).exp(), sum_after(g).exp(), a_qk, a_kk, inverse)

    @property
    def gamma_c(self) -> Tensor:
        """The decay over the chunk, ``[chunks, HV, K, 1]``."""
        return self.gamma[:, :, -1].unsqueeze(-1)


@dataclass
class Scan:
    """The sequential part: the state before every chunk, what every chunk writes, and the state after the last."""

    states: Tensor  # [chunks, HV, K, V]
    u: Tensor  # [chunks, HV, C, V]
    final: Tensor  # [sequences, HV, K, V], sequences in the layout's order


def scan(layout: ChunkLayout, x: Chunks, initial_state: Tensor) -> Scan:
    write = x.beta * x.v
    u_without_state = x.inverse @ write
    w = x.inverse @ (x.beta * x.gamma * x.k)
    k_to_end = (x.to_end * x.k).transpose(-1, -2)
    gamma_c = x.gamma_c
    states = x.v.new_empty(*x.v.shape[:2], x.k.shape[-1], x.v.shape[-1])
    u = torch.empty_like(x.v)
    s = layout.sorted_states(initial_state).clone()
    for j in range(layout.steps):
        now, n = layout.step(j), layout.active(j)
        states[now] = s[:n]
        u_now = u_without_state[now] - w[now] @ s[:n]
        u[now] = u_now
        s[:n] = gamma_c[now] * s[:n] + k_to_end[now] @ u_now
    return Scan(states, u, s)


def key_first(state: Tensor | None, v_first: bool) -> Tensor | None:
    return state.transpose(-1, -2) if state is not None and v_first else state


def initial_or_zero(state: Tensor | None, v_first: bool, layout: ChunkLayout, x: Chunks) -> Tensor:
    if state is None:
        return x.v.new_zeros(layout.sequences, x.v.shape[1], x.k.shape[-1], x.v.shape[-1])
    return key_first(state, v_first).to(x.v.dtype)


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
    x = Chunks.prepare(layout, *transforms.apply(q, k, v, g, beta, A_log, dt_bias))
    run = scan(layout, x, initial_or_zero(initial_state, state_v_first, layout, x))
    o = scale * ((x.gamma * x.q) @ run.states + x.a_qk @ run.u)

    none = x.v.new_empty(0)
    final_state = h = none
    if output_final_state:
        final_state = key_first(layout.natural_states(run.final), state_v_first).contiguous()
    if output_chunk_states:
        h = key_first(run.states, state_v_first).to(k.dtype)
        h = h.reshape(1 if layout.varlen else layout.batch, -1, *h.shape[1:]).contiguous()
    return layout.to_tokens(o).to(v.dtype), final_state, h if output_chunk_states else none.to(k.dtype)
