"""The explicit chunkwise backward (docs/mathematics.md, section 3).

Nothing is saved but the inputs: chunk quantities are recomputed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk_fwd import Chunks, Scan, key_first, per_head, scan, state_or_zeros
from .inputs import Inputs, Transforms
from .layout import ChunkLayout
from .splits import DecayGradient, scores_bwd


@dataclass
class ReverseScan:
    d_states: Tensor  # gradient of the state after every chunk, [chunks, HV, K, V]
    dr: Tensor  # (I + Diag(beta) A_kk)^-T dU, [chunks, HV, C, V]


def reverse_scan(steps: list[slice], c: Chunks, do: Tensor, d_state: Tensor) -> ReverseScan:
    """dU = A_qk^T dO + K~ dS_C;  dS_0 = Diag(Gamma_C) dS_C + (Gamma.Q)^T dO - (Gamma.K)^T Diag(beta) dR.

    ``do`` includes the scale. Turns ``d_state``, the gradient of the states after the last step, into that of the
    states before the first.
    """
    du = c.a_qk.transpose(-1, -2) @ do
    ds_from_o = c.gamma_q.transpose(-1, -2) @ do
    gamma_c, inverse = c.gamma_c, c.inverse.transpose(-1, -2)
    w_raw = (c.x.beta * c.gamma_k).transpose(-1, -2)
    d_states, dr = torch.empty_like(ds_from_o), torch.empty_like(du)
    for now in reversed(steps):
        ds = d_state[: now.stop - now.start]
        d_states[now] = ds
        per_head(du[now]).baddbmm_(per_head(c.k_to_end[now]), per_head(ds))
        torch.bmm(per_head(inverse[now]), per_head(du[now]), out=per_head(dr[now]))
        ds *= gamma_c[now]
        ds += ds_from_o[now]
        per_head(ds).baddbmm_(per_head(w_raw[now]), per_head(dr[now]), alpha=-1)
    return ReverseScan(d_states, dr)


@dataclass
class ChunkGradients:
    """Of the transformed inputs, ``[chunks, HV, C, ...]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor

    @classmethod
    def empty(cls, x: Inputs) -> ChunkGradients:
        return cls(*(torch.empty_like(y) for y in (x.q, x.k, x.v, x.g, x.beta.squeeze(-1))))

    def set(self, chunks: slice, part: ChunkGradients) -> None:
        for field in dataclasses.fields(self):
            getattr(self, field.name)[chunks] = getattr(part, field.name)


def chunk_gradients(c: Chunks, run: Scan, back: ReverseScan, do: Tensor) -> ChunkGradients:
    """Of many chunks at once. ``do`` includes the scale."""
    x, decays = c.x, c.decays
    dx = x.beta * back.dr  # of X = V - (Gamma.K) S_0
    left = x.v.clone()  # X - A_kk U
    per_head(left).baddbmm_(per_head(c.gamma_k), per_head(run.states), alpha=-1)
    per_head(left).baddbmm_(per_head(c.a_kk), per_head(run.u), alpha=-1)
    dbeta = left.mul_(back.dr).sum(-1)

    states_t, u_t = run.states.transpose(-1, -2), run.u.transpose(-1, -2)
    dq_state = (do @ states_t).mul_(decays.gamma)
    dk_state = (dx @ states_t).mul_(decays.gamma).neg_()
    dk_end = (run.u @ back.d_states.transpose(-1, -2)).mul_(decays.to_end)
    dg = DecayGradient(
        rows=(x.q * dq_state).addcmul_(x.k, dk_state),
        columns=x.k * dk_end,
        state=c.gamma_c.transpose(-1, -2) * torch.linalg.vecdot(run.states, back.d_states).unsqueeze(-2),
    )
    dq, dk = scores_bwd(do @ u_t, (dx @ u_t).neg_(), x.q, x.k, x.g, dg)
    return ChunkGradients(dq.add_(dq_state), dk.add_(dk_state).add_(dk_end), dx, dg.finish(), dbeta)


def chunk_bwd(
    do: Tensor,
    dfinal_state: Tensor | None,
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
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = ChunkLayout(q.shape[0], q.shape[1], chunk_size, cu_seqlens, q.device)
    transforms = Transforms(use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval, lower_bound)
    x = transforms.apply(layout, q, k, v, g, beta, A_log, dt_bias)
    do = layout.to_chunks(do, x.v.dtype).mul_(scale)
    state = state_or_zeros(layout, x, initial_state, state_v_first)
    d_state = state_or_zeros(layout, x, dfinal_state, state_v_first)
    forward = []
    for part in layout.parts(x.k):
        c = Chunks.prepare(x[part.chunks])
        forward.append((part, c, scan(part.steps, c, state)))
    d = ChunkGradients.empty(x)
    while forward:
        part, c, run = forward.pop()
        do_part = do[part.chunks]
        back = reverse_scan(part.steps, c, do_part, d_state)
        d.set(part.chunks, chunk_gradients(c, run, back, do_part))

    heads = q.shape[2]
    dq = transforms.normalise_bwd(d.q, x.q, x.q_inverse_norm, heads)
    dk = transforms.normalise_bwd(d.k, x.k, x.k_inverse_norm, heads)
    dbeta = transforms.write_strength_bwd(layout.to_tokens(d.beta, x.beta.dtype), beta)
    dg, dA_log, ddt_bias = transforms.log_decay_bwd(layout.to_tokens(d.g, x.g.dtype), g, A_log, dt_bias)
    d_initial = x.v.new_empty(0)
    if initial_state is not None:
        d_initial = key_first(layout.natural_states(d_state), state_v_first).to(initial_state.dtype).contiguous()
    to_tokens = layout.to_tokens
    return (
        to_tokens(dq, q.dtype),
        to_tokens(dk, k.dtype),
        to_tokens(d.v, v.dtype),
        dg.to(g.dtype),
        dbeta.to(beta.dtype),
        dA_log,
        ddt_bias,
        d_initial,
    )
