"""What the ops do to their inputs before the recurrence (docs/mathematics.md, section 1), and the same backwards."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from .gates import compute_dtype, log_decay, log_decay_bwd
from .layout import ChunkLayout

L2NORM_EPS = 1e-6


@dataclass
class Inputs:
    """The transformed inputs of a call in the compute dtype, in chunk form; q and k with all HV heads."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor  # [chunks, HV, C, 1]
    q_inverse_norm: Tensor | None  # [chunks, H, C, 1], with l2norm
    k_inverse_norm: Tensor | None

    def __getitem__(self, chunks: slice) -> Inputs:
        fields = (getattr(self, f.name) for f in dataclasses.fields(self))
        return Inputs(*(None if x is None else x[chunks] for x in fields))


@dataclass
class Transforms:
    """The input transforms of a call, as the ops name them."""

    use_qk_l2norm: bool
    use_gate: bool
    use_beta_sigmoid: bool
    allow_neg_eigval: bool
    lower_bound: float | None

    def apply(
        self, layout: ChunkLayout, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, A_log: Tensor | None,
        dt_bias: Tensor | None,
    ) -> Inputs:  # fmt: skip
        dtype, heads = compute_dtype(q.dtype), v.shape[2]
        q, k, v, g, beta = (layout.owned(x) for x in (q, k, v, g, beta))
        q, q_inverse_norm = self._normalise(layout.to_chunks(q, dtype), heads)
        k, k_inverse_norm = self._normalise(layout.to_chunks(k, dtype), heads)
        v = layout.to_chunks(v, dtype)
        g = layout.to_chunks(self.log_decay(g, A_log, dt_bias), dtype)
        beta = layout.to_chunks(self.write_strength(beta), dtype).unsqueeze(-1)
        return Inputs(q, k, v, g, beta, q_inverse_norm, k_inverse_norm)

    def _normalise(self, x: Tensor, heads: int) -> tuple[Tensor, Tensor | None]:
        inverse_norm = None
        if self.use_qk_l2norm:
            inverse_norm = torch.rsqrt((x * x).sum(-1, keepdim=True) + L2NORM_EPS)
            x = x * inverse_norm
        group = heads // x.shape[1]
        return (x if group == 1 else x.repeat_interleave(group, dim=1)), inverse_norm

    def normalise_bwd(self, dx: Tensor, x: Tensor, inverse_norm: Tensor | None, heads: int) -> Tensor:
        """Gradient of q or k as given, ``[chunks, H, C, K]``, from that of the normalised ``x`` with HV heads."""
        group = dx.shape[1] // heads
        if group != 1:
            dx = dx.unflatten(1, (heads, group)).sum(2)
            x = x[:, ::group]
        if inverse_norm is not None:
            dx = inverse_norm * (dx - x * (dx * x).sum(-1, keepdim=True))
        return dx

    def log_decay(self, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
        return log_decay(g, A_log, dt_bias, self.lower_bound) if self.use_gate else g

    def log_decay_bwd(
        self, dg: Tensor, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Token form. Gradients of absent parameters are empty, of parameters without a gate zero."""
        if not self.use_gate:
            return dg, *(dg.new_zeros(0) if p is None else torch.zeros_like(p) for p in (A_log, dt_bias))
        return log_decay_bwd(dg, g, A_log, dt_bias, self.lower_bound)

    def write_strength(self, beta: Tensor) -> Tensor:
        if not self.use_beta_sigmoid:
            return beta
        return self._beta_max * torch.sigmoid(beta.to(compute_dtype(beta.dtype)).contiguous())

    def write_strength_bwd(self, dbeta: Tensor, beta: Tensor) -> Tensor:
        """Token form, with ``beta`` as given."""
        if not self.use_beta_sigmoid:
            return dbeta
        beta = beta.to(dbeta.dtype).contiguous()
        return dbeta * (self._beta_max * torch.sigmoid(beta) * torch.sigmoid(-beta))

    @property
    def _beta_max(self) -> float:
        return 2.0 if self.allow_neg_eigval else 1.0
