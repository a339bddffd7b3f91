"""The explicit chunkwise backward (docs/mathematics.md, section 3).

Nothing is saved but the inputs: chunk quantities are recomputed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk_fwd import Chunks, Scan, key_first, per_head, scan, state_or_zeros
from .inputs import Inputs, Transforms
from .layout import ChunkLayout
from .splits import DecayGradient, scores_bwd

GRADIENTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state")  # bit i of ``wanted`` asks for the i-th
ALL_GRADIENTS = (1 << len(GRADIENTS)) - 1


def mask_of(wants: Sequence[bool]) -> int:
    """``wanted`` of :func:`chunk_bwd` from an answer for each of ``GRADIENTS``."""
    return sum(1 << bit for bit, want in enumerate(wants) if want)


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
    """The gradients of the transformed inputs, ``[chunks, HV, C, ...]``; None if nobody asks."""

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    g: Tensor | None = None
    beta: Tensor | None = None

    @classmethod
    def empty(cls, x: Inputs, names: set[str]) -> ChunkGradients:
        like = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "beta": x.beta.squeeze(-1)}
        return cls(**{name: torch.empty_like(like[name]) for name in names})

    def set(self, chunks: slice, part: ChunkGradients) -> None:
        for field in dataclasses.fields(self):
            if (whole := getattr(self, field.name)) is not None:
                whole[chunks] = getattr(part, field.name)


def chunk_gradients(c: Chunks, run: Scan, back: ReverseScan, do: Tensor, names: set[str]) -> ChunkGradients:
    """The gradients of many chunks at once, at least those of the inputs ``names``. ``do`` includes the scale."""
    x, decays = c.x, c.decays
    dx = x.beta * back.dr  # of X = V - (Gamma.K) S_0
    d = ChunkGradients(v=dx)
    if "beta" in names:
        left = x.v.clone()  # X - A_kk U
        per_head(left).baddbmm_(per_head(c.gamma_k), per_head(run.states), alpha=-1)
        per_head(left).baddbmm_(per_head(c.a_kk), per_head(run.u), alpha=-1)
        d.beta = left.mul_(back.dr).sum(-1)
    if names.isdisjoint({"q", "k", "g"}):
        return d

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
    d.q, d.k, d.g = dq.add_(dq_state), dk.add_(dk_state).add_(dk_end), dg.finish()
    return d


def before_transforms(
    d: ChunkGradients, x: Inputs, layout: ChunkLayout, transforms: Transforms, arguments: dict[str, Tensor | None]
) -> dict[str, Tensor]:
    """The gradients of ``arguments`` as they were given, by name, from those of the transformed ones that exist."""
    to_tokens, found = layout.to_tokens, {}
    for name, inverse_norm in (("q", x.q_inverse_norm), ("k", x.k_inverse_norm)):
        if (dx := getattr(d, name)) is not None:
            given = arguments[name]
            dx = transforms.normalise_bwd(dx, getattr(x, name), inverse_norm, given.shape[2])
            found[name] = to_tokens(dx, given.dtype)
    if d.v is not None:
        found["v"] = to_tokens(d.v, arguments["v"].dtype)
    if d.beta is not None:
        beta = arguments["beta"]
        found["beta"] = transforms.write_strength_bwd(to_tokens(d.beta, x.beta.dtype), beta).to(beta.dtype)
    if d.g is not None:
        g, A_log, dt_bias = (arguments[name] for name in ("g", "A_log", "dt_bias"))
        dg, found["A_log"], found["dt_bias"] = transforms.log_decay_bwd(to_tokens(d.g, x.g.dtype), g, A_log, dt_bias)
        found["g"] = dg.to(g.dtype)
    return found


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
    wanted: int = ALL_GRADIENTS,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``GRADIENTS``; one is empty if ``wanted`` does not ask for it or its argument is absent.

    ``batch_invariant`` is for kernels: what this gives a sequence does depend on its batch, in the last bits.
    """
    wants = {name for bit, name in enumerate(GRADIENTS) if wanted >> bit & 1}
    of_inputs = {"g" if name in ("A_log", "dt_bias") else name for name in wants - {"initial_state"}}
    layout = ChunkLayout(q.shape[0], q.shape[1], chunk_size, cu_seqlens, q.device)
    transforms = Transforms(use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval, lower_bound)
    g, beta = layout.without_others(g), layout.without_others(beta)  # their transforms are undone token by token
    x = transforms.apply(layout, q, k, v, g, beta, A_log, dt_bias)
    do = layout.to_chunks(layout.owned(do), x.v.dtype).mul_(scale)
    state = state_or_zeros(layout, x, initial_state, state_v_first)
    d_state = state_or_zeros(layout, x, dfinal_state, state_v_first)
    forward = []
    for part in layout.parts(x.k):
        c = Chunks.prepare(x[part.chunks])
        forward.append((part, c, scan(part.steps, c, state) if of_inputs else None))
    d = ChunkGradients.empty(x, of_inputs)
    while forward:
        part, c, run = forward.pop()
        do_part = do[part.chunks]
        back = reverse_scan(part.steps, c, do_part, d_state)
        if run is not None:
            d.set(part.chunks, chunk_gradients(c, run, back, do_part, of_inputs))

    arguments = dict(zip(GRADIENTS, (q, k, v, g, beta, A_log, dt_bias, initial_state), strict=True))
    found = before_transforms(d, x, layout, transforms, arguments)
    if initial_state is not None:
        d_initial = key_first(layout.natural_states(d_state), state_v_first)
        found["initial_state"] = d_initial.to(initial_state.dtype).contiguous()
    dtypes = (x.v.dtype if argument is None else argument.dtype for argument in arguments.values())
    empty = {name: x.v.new_empty(0, dtype=dtype) for name, dtype in zip(GRADIENTS, dtypes, strict=True)}
    return tuple(found[name] if name in wants and name in found else empty[name] for name in GRADIENTS)
