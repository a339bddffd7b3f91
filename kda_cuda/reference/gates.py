"""The gate of KDA (docs/mathematics.md, section 1).

It leads from what the layer projects to the log-decay ``g <= 0`` of each key channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _shifted(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None) -> tuple[Tensor, Tensor | float]:
    """``x = g + dt_bias`` and ``exp(A_log)``, both broadcasting over ``[..., HV, K]``."""
    x = g.to(compute_dtype(g.dtype)).contiguous()  # vectorised or not, exp and log1p round differently
    if dt_bias is not None:
        x = x + dt_bias.to(x.dtype)
    amplitude = 1.0 if A_log is None else A_log.to(x.dtype).exp().unsqueeze(-1)
    return x, amplitude


def log_decay(g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """``-exp(A_log) softplus(x)``, or ``lower_bound sigmoid(exp(A_log) x)``, with ``x = g + dt_bias``."""
    x, amplitude = _shifted(g, A_log, dt_bias)
    if lower_bound is None:
        return -amplitude * softplus(x)
    return lower_bound * torch.sigmoid(amplitude * x)


def softplus(x: Tensor) -> Tensor:
    """Relatively accurate for every x (``F.softplus`` switches to the identity at 20)."""
    return F.relu(x) + torch.log1p(torch.exp(-x.abs()))


def log_decay_bwd(
    dg: Tensor, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`log_decay`: of ``g`` (compute dtype), ``A_log`` and ``dt_bias`` (empty where absent)."""
    x, amplitude = _shifted(g, A_log, dt_bias)
    if lower_bound is None:
        dx = -amplitude * torch.sigmoid(x) * dg
        d_log_amplitude = -amplitude * softplus(x) * dg
    else:
        y = amplitude * x
        dx = lower_bound * torch.sigmoid(y) * torch.sigmoid(-y) * amplitude * dg  # 1 - sigmoid(y) would cancel
        d_log_amplitude = dx * x
    dA_log, ddt_bias = x.new_empty(0), x.new_empty(0)
    if A_log is not None:
        dA_log = _over_tokens(d_log_amplitude).sum(-1).reshape(A_log.shape).to(A_log.dtype)
    if dt_bias is not None:
        ddt_bias = _over_tokens(dx).reshape(dt_bias.shape).to(dt_bias.dtype)
    return dx, dA_log, ddt_bias


def _over_tokens(x: Tensor) -> Tensor:
    """The sum over all leading dimensions, of which there may be none: ``[..., HV, K] -> [HV, K]``."""
    return x.flatten(0, -3).sum(0) if x.dim() > 2 else x


def kda_gate_fwd(
    g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None, dtype: torch.dtype
) -> Tensor:
    return log_decay(g, A_log, dt_bias, lower_bound).to(dtype)


def kda_gate_bwd(
    dy: Tensor, g: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    dy = dy.to(compute_dtype(g.dtype))
    g = g.masked_fill(dy == 0, 0)  # what nobody asks for has no gradient, whatever it holds: padding may be NaN
    dx, dA_log, ddt_bias = log_decay_bwd(dy, g, A_log, dt_bias, lower_bound)
    return dx.to(g.dtype), dA_log, ddt_bias
