"""RMSNorm of each row times an activation of its gate (docs/mathematics.md, section 7)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .gates import compute_dtype


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension, and the divisor's inverse ``[..., 1]``.

    Squares of x over a power of two near the largest element or sqrt(eps) do not leave the range of the dtype.
    """
    largest = x.detach().abs().amax(-1, keepdim=True).clamp(min=eps**0.5)
    limit = 1 - math.frexp(torch.finfo(x.dtype).tiny)[1]
    down = torch.exp2(-torch.frexp(largest).exponent.clamp(-limit, limit).to(x.dtype))
    scaled = x * down
    rstd = torch.rsqrt(scaled.square().mean(-1, keepdim=True) + eps * down * down)
    return scaled * rstd, rstd * down


def _activation(gate: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """The activation and its derivative. 1 - sigmoid(x) would cancel."""
    s, other = torch.sigmoid(gate), torch.sigmoid(-gate)
    return (gate * s, s * (1 + gate * other)) if silu else (s, s * other)


def gated_rmsnorm_fwd(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    dtype = compute_dtype(x.dtype)
    normalised, _ = _normalised(x.to(dtype).contiguous(), eps)
    gate = gate.to(dtype).contiguous()
    opened = torch.nn.functional.silu(gate) if silu else torch.sigmoid(gate)
    return (normalised * weight.to(dtype) * opened).to(x.dtype)


def gated_rmsnorm_bwd(
    dy: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    dy, w = dy.to(dtype).contiguous(), weight.to(dtype)
    unasked = dy == 0  # what nobody asks for has no gradient, whatever it holds: padding may be NaN
    normalised, rstd = _normalised(x.to(dtype).contiguous(), eps)
    known = normalised.masked_fill(unasked, 0)
    opened, slope = _activation(gate.to(dtype).contiguous().masked_fill(unasked, 0), silu)
    dn = dy * w * opened
    mean = (dn * (known / x.shape[-1])).sum(-1, keepdim=True)
    dx = ((dn - normalised * mean) * rstd).masked_fill((dn == 0) & (mean == 0), 0)
    through = dy * known
    dweight = (through * opened).flatten(0, -2).sum(0) if x.dim() > 1 else through * opened
    return dx.to(x.dtype), (through * w * slope).to(gate.dtype), dweight.to(weight.dtype)
