"""The recurrence of KDA in float64, token by token: the truth that everything is measured against.

    S'_t = Diag(exp g_t) S_{t-1},   u_t = beta_t (v_t - S'_t^T k_t),   S_t = S'_t + k_t u_t^T,   o_t = scale S_t^T q_t

Written from the equations alone; shares no code with the package. Gradients are those of autograd through it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .cases import Inputs

L2NORM_EPS = 1e-6


@dataclass
class Truth:
    o: Tensor  # [B, T, HV, V]
    final_state: Tensor  # [N, HV, K, V], or [N, HV, V, K]
    chunk_states: Tensor  # the state before every chunk, [chunks of all sequences, HV, K, V] or [..., V, K]


def steps(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """The recurrence of one batch of sequences ``[B, T, H, ...]``: output and state of every token. Any dtype."""
    for t in range(q.shape[1]):
        state = g[:, t].exp().unsqueeze(-1) * state
        u = beta[:, t].unsqueeze(-1) * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], u)
        yield scale * torch.einsum("bhkv,bhk->bhv", state, q[:, t]), state


def transformed(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, g, beta as the recurrence sees them, all with HV heads."""
    q, k, g, beta = x.q, x.k, x.g, x.beta
    if x.use_qk_l2norm:
        q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + L2NORM_EPS) for y in (q, k))
    group = x.v.shape[2] // q.shape[2]
    q, k = (y.repeat_interleave(group, dim=2) for y in (q, k))
    if x.use_gate:
        amplitude = torch.ones_like(g[0, 0, :, :1]) if x.A_log is None else x.A_log.exp().reshape(-1, 1)
        raw = g if x.dt_bias is None else g + x.dt_bias.reshape(g.shape[2:])
        if x.lower_bound is None:
            g = -amplitude * torch.logaddexp(raw, torch.zeros_like(raw))
        else:
            g = x.lower_bound * torch.sigmoid(amplitude * raw)
    if x.use_beta_sigmoid:
        beta = torch.sigmoid(beta) * (2 if x.allow_neg_eigval else 1)
    return q, k, x.v, g, beta


def recurrence(x: Inputs) -> Truth:
    """``x`` as the ops take it, float64 (``Inputs.double()``)."""
    streams = transformed(x)
    batch, tokens, heads, key_dim = streams[0].shape
    bounds = [0, tokens] if x.cu_seqlens is None else x.cu_seqlens.tolist()
    rows = batch if x.cu_seqlens is None else 1
    state = x.initial_state
    if state is None:
        state = x.v.new_zeros(rows * (len(bounds) - 1), heads, key_dim, x.v.shape[-1])
    elif x.state_v_first:
        state = state.transpose(-1, -2)
    outputs, finals, before_chunks = [], [], []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        own = state if x.cu_seqlens is None else state[n : n + 1]
        history = [own]
        for o, after in steps(*(y[:, begin:end] for y in streams), own, x.scale):
            outputs.append(o)
            history.append(after)
        finals.append(history[-1])
        if end > begin:
            before_chunks.append(torch.stack([history[t] for t in range(0, end - begin, x.chunk_size)], 1))
    final, chunks = torch.cat(finals), torch.cat(before_chunks, 1).flatten(0, 1)
    if x.state_v_first:
        final, chunks = final.transpose(-1, -2), chunks.transpose(-1, -2)
    return Truth(torch.stack(outputs, 1) if outputs else torch.zeros_like(x.v), final, chunks)


def gradients(x: Inputs) -> tuple[Truth, dict[str, Tensor]]:
    """The truth, and the gradients of ``sum(o do) + sum(final_state dfinal_state)`` by name; ``x`` is float64.
    Without a ``dfinal_state`` the second sum is left out."""
    leaves = {name: y.detach().clone().requires_grad_() for name, y in x.differentiable().items()}
    truth = recurrence(x.replace(**leaves))
    loss = (truth.o * x.do).sum()
    if x.dfinal_state is not None:
        loss = loss + (truth.final_state * x.dfinal_state).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    grads = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}
    return Truth(truth.o.detach(), truth.final_state.detach(), truth.chunk_states.detach()), grads


def named(truth: Truth, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Everything under the names that tests and tables use: o, final_state, h, dq, dk, ..."""
    outputs = {"o": truth.o, "final_state": truth.final_state, "h": truth.chunk_states}
    return outputs | {f"d{name}": g for name, g in grads.items()}
