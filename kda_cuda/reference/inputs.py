"""What the ops do to their inputs before the recurrence: cut into chunks, normalise, activate; and all of it backwards.

Chunk form: ``[chunks, HV, C, ...]``, the chunks of all sequences one after another. Padding tokens have
``q = k = v = beta = 0`` and ``g = 0``: they neither write to the state nor decay it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .gates import compute_dtype, log_decay, log_decay_bwd

L2NORM_EPS = 1e-6


class ChunkLayout:
    """Which chunk of which sequence lies where. ``step(j)`` selects chunk ``j`` of every sequence that has one.

    Sequences are held longest first, so that those with a chunk ``j`` are a prefix; ``order[i]`` is the caller's index.
    """

    def __init__(self, batch: int, tokens: int, chunk: int, cu_seqlens: Tensor | None, device: torch.device):
        self.batch, self.tokens, self.chunk = batch, tokens, chunk
        self.per_row = -(-tokens // chunk)
        self.varlen = cu_seqlens is not None
        if not self.varlen:
            self.sequences = batch
            self.chunks = batch * self.per_row
            self.steps = self.per_row if batch else 0
            self.order = None
            return
        bounds = cu_seqlens.detach().to("cpu", torch.int64)
        lengths = bounds[1:] - bounds[:-1]
        counts = (lengths + chunk - 1) // chunk
        first = torch.cumsum(counts, 0) - counts
        self.sequences = lengths.numel()
        self.chunks = int(counts.sum())
        self.order = torch.argsort(counts, descending=True, stable=True)
        counts, first = counts[self.order], first[self.order]
        self.steps = int(counts[0]) if self.sequences else 0
        self._active = [int((counts > j).sum()) for j in range(self.steps)]
        self._first = first.to(device)
        # position of every token in the flattened [chunks * C] rows
        sequence = torch.repeat_interleave(torch.arange(self.sequences), lengths)
        natural_first = torch.cumsum((lengths + chunk - 1) // chunk, 0) - (lengths + chunk - 1) // chunk
        self._position = (torch.arange(tokens) - bounds[sequence] + natural_first[sequence] * chunk).to(device)
        self.order = self.order.to(device)

    def active(self, j: int) -> int:
        return self._active[j] if self.varlen else self.sequences

    def step(self, j: int) -> slice | Tensor:
        return self._first[: self.active(j)] + j if self.varlen else slice(j, None, self.per_row)

    def to_chunks(self, x: Tensor) -> Tensor:
        """``[B, T, H, ...] -> [chunks, H, C, ...]``, zeros in the padding; always a copy or a fresh view of one."""
        tail = x.shape[2:]
        if self.varlen:
            rows = x.new_zeros((self.chunks * self.chunk, *tail))
            rows[self._position] = x[0]
        else:
            rows = x.new_zeros((self.batch, self.per_row * self.chunk, *tail))
            rows[:, : self.tokens] = x
        return rows.view(self.chunks, self.chunk, *tail).transpose(1, 2)

    def to_tokens(self, x: Tensor) -> Tensor:
        """``[chunks, H, C, ...] -> [B, T, H, ...]``, contiguous."""
        rows = x.transpose(1, 2)
        tail = rows.shape[2:]
        if self.varlen:
            return rows.reshape(self.chunks * self.chunk, *tail)[self._position].unsqueeze(0)
        rows = rows.reshape(self.batch, self.per_row * self.chunk, *tail)
        return rows[:, : self.tokens].clone(memory_format=torch.contiguous_format)

    def sorted_states(self, x: Tensor) -> Tensor:
        return x if self.order is None else x[self.order]

    def natural_states(self, x: Tensor) -> Tensor:
        if self.order is None:
            return x
        out = torch.empty_like(x)
        out[self.order] = x
        return out


@dataclass
class Transforms:
    """The input transforms of a call, as the ops name them."""

    use_qk_l2norm: bool
    use_gate: bool
    use_beta_sigmoid: bool
    allow_neg_eigval: bool
    lower_bound: float | None

    def apply(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None, dt_bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Token form in, token form out, in the compute dtype; q and k with all HV heads."""
        dtype = compute_dtype(q.dtype)
        group = v.shape[2] // q.shape[2]
        q, k = (self._expand(self.normalise(x.to(dtype))[0], group) for x in (q, k))
        g = log_decay(g, A_log, dt_bias, self.lower_bound).to(dtype) if self.use_gate else g.to(dtype)
        beta = beta.to(dtype)
        if self.use_beta_sigmoid:
            beta = torch.sigmoid(beta) * self.beta_max
        return q, k, v.to(dtype), g, beta

    @property
    def beta_max(self) -> float:
        return 2.0 if self.allow_neg_eigval else 1.0

    @staticmethod
    def _expand(x: Tensor, group: int) -> Tensor:
        return x if group == 1 else x.repeat_interleave(group, dim=2)

    def normalise(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.use_qk_l2norm:
            return x, None
        r = torch.rsqrt((x * x).sum(-1, keepdim=True) + L2NORM_EPS)
        return x * r, r

    def normalise_bwd(self, dx: Tensor, raw: Tensor) -> Tensor:
        """Gradient of a normalised, expanded q or k with respect to the raw one; sums over the value heads."""
        heads = raw.shape[2]
        if dx.shape[2] != heads:
            dx = dx.unflatten(2, (heads, -1)).sum(3)
        if self.use_qk_l2norm:
            x, r = self.normalise(raw.to(dx.dtype))
            dx = r * (dx - x * (dx * x).sum(-1, keepdim=True))
        return dx.to(raw.dtype)

    def beta_bwd(self, dbeta: Tensor, raw: Tensor) -> Tensor:
        if self.use_beta_sigmoid:
            s = torch.sigmoid(raw.to(dbeta.dtype))
            dbeta = dbeta * self.beta_max * s * (1 - s)
        return dbeta.to(raw.dtype)

    def gate_bwd(
        self, dg: Tensor, raw: Tensor, A_log: Tensor | None, dt_bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.use_gate:
            return dg.to(raw.dtype), *(dg.new_zeros(0 if p is None else p.shape) for p in (A_log, dt_bias))
        dx, dA_log, ddt_bias = log_decay_bwd(dg, raw, A_log, dt_bias, self.lower_bound)
        return dx.to(raw.dtype), dA_log, ddt_bias
