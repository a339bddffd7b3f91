"""KDA and two layers that lack one of its parts: they differ in what the operation is given, and in nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import Checker
from ..nn.kda import KimiDeltaAttention

__all__ = ["VARIANTS", "NoDeltaRule", "ScalarGate"]

L2NORM_EPS = 1e-6  # of the norm inside the operation


class Variant(KimiDeltaAttention):
    """A layer that is compared with KDA. It has the parameters of KDA, so equal seeds give equal first weights."""

    def _can_fuse(self, gate: Tensor) -> bool:
        """The kernel of a whole step computes KDA alone."""
        return False


class ScalarGate(Variant):
    r"""One decay for all channels of a head, :math:`g_t = -e^A softplus(mean_d (f(x_t) + dt\_bias)_d)`.

    The mean of linear functions is a linear function, so this is the gate of Gated DeltaNet.
    """

    def _recurrence(self, op: Callable, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, **more: object):
        gate = gate + self.dt_bias.view(self.num_v_heads, self.head_dim)
        gate = gate.mean(-1, keepdim=True).expand_as(gate)
        return super()._recurrence(op, q, k, v, gate.contiguous(), beta, dt_bias=None, **more)


EPSILON = {torch.float64: 2.0**-40, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-20}


class NoDeltaRule(Variant):
    r"""Gated linear attention: :math:`S_t = Diag(e^{g_t}) S_{t-1} + \beta_t k_t v_t^T`, nothing is erased.

    It is KDA of keys :math:`\epsilon k` and values :math:`v / \epsilon`. These write the state of k and v, and what the
    delta rule subtracts from a value is :math:`\epsilon^2` times what it was. With a power of two that small, the
    scaling has no rounding and the difference is below the rounding of the value.
    """

    def _recurrence(self, op: Callable, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, beta: Tensor, **more: object):
        if k.dtype not in EPSILON:
            raise Checker("NoDeltaRule").type_error(f"k has dtype {k.dtype}, expected fp32, bf16 or float64")
        epsilon = EPSILON[k.dtype]
        q, k = normalised(q), normalised(k)
        return super()._recurrence(op, q, k * epsilon, v / epsilon, gate, beta, use_qk_l2norm_in_kernel=False, **more)


def normalised(x: Tensor) -> Tensor:
    """``x`` over its norm along the last dimension, as the operation does it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2NORM_EPS)).to(x.dtype)


VARIANTS = {"kda": KimiDeltaAttention, "scalar_gate": ScalarGate, "no_delta_rule": NoDeltaRule}
