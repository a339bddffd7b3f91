"""The chunkwise forward (docs/mathematics.md, section 2).

(I + Diag(beta) A_kk) U = Diag(beta) (V - (Gamma.K) S_0)
O   = scale [ (Gamma.Q) S_0 + A_qk U ]
S_C = Diag(Gamma_C) S_0 + K~^T U,    K~ = exp(G_C - G) . K
"""

from __future__ import annotations

import itertools
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


def outputs(c: Chunks, run: Scan, scale: float, o: Tensor) -> None:
    """O = scale [ (Gamma.Q) S_0 + A_qk U ], into ``o``."""
    torch.bmm(per_head(c.gamma_q), per_head(run.states), out=per_head(o))
    per_head(o).baddbmm_(per_head(c.a_qk), per_head(run.u), beta=scale, alpha=scale)


def run_chunks(
    streams: tuple[Tensor, ...],
    transforms: Transforms,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk_size: int,
    keep_states: bool,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """``streams``: q, k, v, g, beta, A_log, dt_bias; states are ``[N, HV, K, V]``.

    Returns o, the final states, and the states before every chunk ``[B, chunks of a sequence, ...]``
    (``[1, chunks of all, ...]`` with cu_seqlens; none unless kept), both in the compute dtype.
    """
    if batch_invariant:
        return _one_by_one(streams, transforms, initial_state, cu_seqlens, scale, chunk_size, keep_states)
    q, _, v, *_ = streams
    layout = ChunkLayout(q.shape[0], q.shape[1], chunk_size, cu_seqlens, q.device)
    x = transforms.apply(layout, *streams)
    state = state_or_zeros(layout, x, initial_state, False)
    o = torch.empty_like(x.v)
    states = x.v.new_empty(layout.chunks if keep_states else 0, *state.shape[1:])
    for part in layout.parts(x.k):
        c = Chunks.prepare(x[part.chunks])
        run = scan(part.steps, c, state)
        outputs(c, run, scale, o[part.chunks])
        if keep_states:
            states[part.chunks] = run.states
    kept = layout.natural_chunks(states) if keep_states else states
    return layout.to_tokens(o, v.dtype), layout.natural_states(state), kept


def _one_by_one(streams, transforms, initial_state, cu_seqlens, scale, chunk_size, keep_states) -> tuple:
    """Each sequence by itself: products of other batches may sum in another order."""
    *tokens, A_log, dt_bias = streams
    others = tokens[2].shape[1]  # that no sequence has: those after the last one
    if cu_seqlens is None:
        alone = [[x[n : n + 1] for x in tokens] for n in range(tokens[0].shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        others -= bounds[-1]
        alone = [[x[:, begin:end] for x in tokens] for begin, end in itertools.pairwise(bounds)]
    if not alone:
        return run_chunks(streams, transforms, initial_state, cu_seqlens, scale, chunk_size, keep_states)
    results = [
        run_chunks((*one, A_log, dt_bias), transforms, state, None, scale, chunk_size, keep_states)
        for n, one in enumerate(alone)
        for state in [None if initial_state is None else initial_state[n : n + 1]]
    ]
    o, final_state, states = zip(*results, strict=True)
    along = 0 if cu_seqlens is None else 1
    if cu_seqlens is not None:
        o = (*o, o[0].new_zeros(1, others, *o[0].shape[2:]))
    return torch.cat(o, along), torch.cat(final_state), torch.cat(states, along if keep_states else 0)


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
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    transforms = Transforms(use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval, lower_bound)
    initial = None if initial_state is None else key_first(initial_state, state_v_first)
    o, state, states = run_chunks(
        (q, k, v, g, beta, A_log, dt_bias), transforms, initial, cu_seqlens, scale, chunk_size, output_chunk_states,
        batch_invariant,
    )  # fmt: skip
    final_state, h = state.new_empty(0), k.new_empty(0)
    if output_final_state:
        final_state = key_first(state, state_v_first).contiguous()
    if output_chunk_states:
        h = key_first(states, state_v_first).to(k.dtype).contiguous()
    return o, final_state, h
