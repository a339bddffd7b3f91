"""The explicit chunkwise backward (kda.md §3). Nothing is saved but the inputs: chunk quantities are recomputed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk_fwd import Chunks, Scan, initial_or_zero, key_first, scan
from .inputs import ChunkLayout, Transforms
from .splits import scores_bwd, sum_before, sum_from


@dataclass
class ReverseScan:
    d_states: Tensor  # gradient of the state after every chunk, [chunks, HV, K, V]
    dr: Tensor  # (I + Diag(beta) A_kk)^-T dU, [chunks, HV, C, V]
    d_initial: Tensor  # [sequences, HV, K, V], sequences in the layout's order


def reverse_scan(layout: ChunkLayout, x: Chunks, do: Tensor, d_final: Tensor, scale: float) -> ReverseScan:
    du_from_o = scale * (x.a_qk.transpose(-1, -2) @ do)
    ds_from_o = scale * ((x.gamma * x.q).transpose(-1, -2) @ do)
    k_to_end = x.to_end * x.k
    gamma_k = (x.gamma * x.k).transpose(-1, -2)
    inverse_t = x.inverse.transpose(-1, -2)
    gamma_c = x.gamma_c
    d_states = torch.empty_like(ds_from_o)
    dr = torch.empty_like(x.v)
    ds = layout.sorted_states(d_final).clone()
    for j in reversed(range(layout.steps)):
        now, n = layout.step(j), layout.active(j)
        d_states[now] = ds[:n]
        dr_now = inverse_t[now] @ (du_from_o[now] + k_to_end[now] @ ds[:n])
        dr[now] = dr_now
        ds[:n] = gamma_c[now] * ds[:n] + ds_from_o[now] - gamma_k[now] @ (x.beta[now] * dr_now)
    return ReverseScan(d_states, dr, ds)


def chunk_gradients(
    x: Chunks, run: Scan, back: ReverseScan, do: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dg, dbeta of the transformed inputs, all chunks at once."""
    dx = x.beta * back.dr
    values_left = x.v - (x.gamma * x.k) @ run.states - x.a_kk @ run.u
    dbeta = (back.dr * values_left).sum(-1, keepdim=True)
    u_t = run.u.transpose(-1, -2)
    da_kk = (-dx @ u_t).tril(-1)
    da_qk = (scale * do @ u_t).tril()
    dq, dk, dg = scores_bwd(da_qk, da_kk, x.q, x.k, x.g)

    states_t = run.states.transpose(-1, -2)
    dq_state = x.gamma * (scale * (do @ states_t))
    dk_state = -x.gamma * (dx @ states_t)
    dk_end = x.to_end * (run.u @ back.d_states.transpose(-1, -2))
    dg = (
        dg
        + sum_from(x.q * dq_state + x.k * dk_state)  # state -> rows
        + sum_before(x.k * dk_end)  # columns -> end of the chunk
        + (x.gamma_c * run.states * back.d_states).sum(-1).unsqueeze(-2)  # state -> state
    )
    return dq + dq_state, dk + dk_state + dk_end, dx, dg, dbeta.squeeze(-1)


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
    x = Chunks.prepare(layout, *transforms.apply(q, k, v, g, beta, A_log, dt_bias))
    run = scan(layout, x, initial_or_zero(initial_state, state_v_first, layout, x))
    do = layout.to_chunks(do.to(x.v.dtype))
    back = reverse_scan(layout, x, do, initial_or_zero(dfinal_state, state_v_first, layout, x), scale)
    dq, dk, dv, dg, dbeta = (layout.to_tokens(d) for d in chunk_gradients(x, run, back, do, scale))

    dg, dA_log, ddt_bias = transforms.gate_bwd(dg, g, A_log, dt_bias)
    d_initial = x.v.new_empty(0)
    if initial_state is not None:
        d_initial = key_first(layout.natural_states(back.d_initial), state_v_first).to(initial_state.dtype).contiguous()
    return (
        transforms.normalise_bwd(dq, q),
        transforms.normalise_bwd(dk, k),
        dv.to(v.dtype),
        dg,
        transforms.beta_bwd(dbeta, beta),
        dA_log,
        ddt_bias,
        d_initial,
    )
