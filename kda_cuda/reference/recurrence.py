"""The recurrence, token by token (kda.md §1): the definition, and what a few decoding steps on the CPU run.

S'_t = Diag(exp g_t) S_{t-1},   u_t = beta_t (v_t - S'_t^T k_t),   S_t = S'_t + k_t u_t^T,   o_t = scale S_t^T q_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Transforms


def recurrent_fwd(
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
) -> tuple[Tensor, Tensor]:
    transforms = Transforms(use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval, lower_bound)
    q_, k_, v_, g_, beta_ = transforms.apply(q, k, v, g, beta, A_log, dt_bias)
    key_dim, (heads, value_dim) = q_.shape[-1], v_.shape[2:]
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        state = v_.new_zeros(sequences, heads, key_dim, value_dim)
    else:
        state = (initial_state.transpose(-1, -2) if state_v_first else initial_state).to(v_.dtype, copy=True)
    decay = g_.exp()
    if cu_seqlens is None:
        o, state = _steps(q_, k_, v_, decay, beta_, state, scale)
    else:
        o = torch.zeros_like(v_)
        bounds = cu_seqlens.tolist()
        for n, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            now = slice(begin, end)
            o[:, now], state[n : n + 1] = _steps(
                q_[:, now], k_[:, now], v_[:, now], decay[:, now], beta_[:, now], state[n : n + 1].clone(), scale
            )
    if not output_final_state:
        return o.to(v.dtype), v_.new_empty(0)
    return o.to(v.dtype), (state.transpose(-1, -2) if state_v_first else state).contiguous()


def _steps(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t].unsqueeze(-1) * state
        k_t = k[:, t].unsqueeze(-1)
        u = beta[:, t].unsqueeze(-1) * (v[:, t] - (state * k_t).sum(-2))
        state = state + k_t * u.unsqueeze(-2)
        outputs.append(scale * (state * q[:, t].unsqueeze(-1)).sum(-2))
    return torch.stack(outputs, 1) if outputs else torch.zeros_like(v), state
