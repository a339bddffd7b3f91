"""One decoding step of a whole KDA layer between its projections: convolutions, recurrence, gated RMSNorm."""

from __future__ import annotations

import torch
from torch import Tensor

from .decode import Slots, decode
from .gates import compute_dtype


def decode_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    output_gate: Tensor,
    conv_state: Tensor,
    q_conv_weight: Tensor,
    k_conv_weight: Tensor,
    v_conv_weight: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor,
    state: Tensor,
    slot_of: Tensor | None,
    out: Tensor,
    scale: float,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    norm_eps: float,
    zero_is_null: bool,
) -> None:
    dtype = compute_dtype(q.dtype)
    slots = Slots(state, slot_of, True, zero_is_null, q.shape[0]).at(0)
    slots = slots.masked_fill(slots >= conv_state.shape[0], -1)
    live = slots >= 0
    q, k, v, g, beta, output_gate = (x[live].to(dtype) for x in (q, k, v, g, beta, output_gate))

    inputs = torch.cat([x.flatten(1) for x in (q, k, v)], 1).unsqueeze(-1)
    window = torch.cat([conv_state[slots[live]].to(dtype), inputs], -1)
    weight = torch.cat([q_conv_weight, k_conv_weight, v_conv_weight]).to(dtype)
    convolved = torch.nn.functional.silu((window * weight).sum(-1))
    q, k, v = (y.unflatten(1, x.shape[1:]) for y, x in zip(convolved.chunk(3, 1), (q, k, v), strict=True))
    conv_state[slots[live]] = window[..., 1:].to(conv_state.dtype)

    o = torch.empty_like(v)
    none = (None,) * 8  # no pool to write to, no drafts, no records
    decode(
        q, k, v, g, beta, A_log, dt_bias, o, state, slots[live], *none, scale, True, True, True,
        allow_neg_eigval, lower_bound, True, True, False, False,
    )  # fmt: skip
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + norm_eps) * norm_weight.to(dtype)
    out.zero_()
    out[live] = (o * torch.sigmoid(output_gate)).to(out.dtype)
