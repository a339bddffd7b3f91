"""The recurrence, token by token (kda.md §1): the definition, and what a few decoding steps on the CPU run.

S'_t = Diag(exp g_t) S_{t-1},   u_t = beta_t (v_t - S'_t^T k_t),   S_t = S'_t + k_t u_t^T,   o_t = scale S_t^T q_t
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunk_fwd import key_first
from .inputs import Transforms
from .layout import ChunkLayout


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
    layout = _one_chunk_per_sequence(q, cu_seqlens)
    transforms = Transforms(use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval, lower_bound)
    x = transforms.apply(layout, q, k, v, g, beta, A_log, dt_bias)
    if initial_state is None:
        state = x.v.new_zeros(layout.sequences, v.shape[2], q.shape[-1], v.shape[-1])
    else:
        state = layout.sorted_states(key_first(initial_state.to(x.v.dtype), state_v_first))

    o = torch.empty_like(x.v)
    s = state[: layout.chunks]  # empty sequences come last and keep their state
    decay = x.g.exp().unsqueeze(-1)
    q_t, k_t, v_t, beta_t = ((scale * x.q).unsqueeze(-2), x.k.unsqueeze(-2), x.v.unsqueeze(-2), x.beta.unsqueeze(-1))
    for t in range(layout.chunk if layout.chunks else 0):
        s *= decay[:, :, t]
        u = beta_t[:, :, t] * (v_t[:, :, t] - k_t[:, :, t] @ s)
        s += k_t[:, :, t].transpose(-1, -2) * u
        o[:, :, t] = (q_t[:, :, t] @ s).squeeze(-2)
    o = layout.to_tokens(o, v.dtype)
    if not output_final_state:
        return o, x.v.new_empty(0)
    return o, key_first(layout.natural_states(state), state_v_first).contiguous()


def _one_chunk_per_sequence(q: Tensor, cu_seqlens: Tensor | None) -> ChunkLayout:
    """All sequences step together: those that end early see padding, which leaves their state alone."""
    batch, tokens = q.shape[:2]
    longest = tokens if cu_seqlens is None else int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return ChunkLayout(batch, tokens, max(longest, 1), cu_seqlens, q.device)
