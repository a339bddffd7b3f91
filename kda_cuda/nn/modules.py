"""The small modules of the layers, and what may be read of a module without calling it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..surroundings import gated_rmsnorm, short_conv

__all__ = ["GatedRMSNorm", "LatentRMSNorm", "ShortConvolution"]

PLAIN_WEIGHTS = (nn.Parameter, Tensor)


def convolve(
    x: Tensor | list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The causal depthwise convolution and SiLU of :class:`ShortConvolution`.

    Args:
        x: ``[batch, tokens, channels]``; or up to three such streams, whose channels are side by side in what follows.
        weight: ``[channels, 1, taps]``; bias: ``[channels]``.
        past: ``[sequences, channels, taps - 1]``, the inputs before each; None: zeros, the start of a sequence.
        cu_seqlens: ``[sequences + 1]``, of the documents in one row; None: every row is a sequence.
    """
    past = None if past is None else past.to(x.dtype if isinstance(x, Tensor) else x[0].dtype)
    return short_conv(x, weight, bias, initial_state=past, cu_seqlens=cu_seqlens)[0]


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm and gate of :class:`GatedRMSNorm`: x and gate ``[..., dim]``, weight ``[dim]``; the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return gated_rmsnorm(x, gate.to(x.dtype), weight if weight.dtype == x.dtype else weight.to(wide), eps)


class KeepsFp32:
    """A module whose parameters and buffers named in ``FP32`` stay in fp32 when a model is cast to 16 bits."""

    FP32: tuple[str, ...] = ()

    def _apply(self, fn, recurse=True):
        own = [t for name in self.FP32 if (t := {**self._parameters, **self._buffers}.get(name)) is not None]
        kept = [t for x in own for t in (x, x.grad) if t is not None]

        def keep_fp32(t: Tensor) -> Tensor:
            moved = fn(t)
            is_kept = moved.dtype != t.dtype and any(t is x for x in kept)
            return t.to(moved.device) if is_kept else moved

        return super()._apply(keep_fp32, recurse)


class ShortConvolution(nn.Conv1d):
    r"""Causal depthwise convolution, then SiLU: :math:`y_{t,c} = SiLU(b_c + \sum_j w_{c,j} x_{t-taps+1+j,c})`.

    Args:
        channels: of the input ``[batch, tokens, channels]``.
        taps: how many tokens an output sees, its own included.
        bias: whether there is a b; released models have none.

    Source: Kimi Linear report, section 4.
    """

    def __init__(self, channels: int, taps: int = 4, bias: bool = False):
        super().__init__(channels, channels, taps, groups=channels, bias=bias)

    def forward(self, x: Tensor, past: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """``[batch, tokens, channels]`` for such an ``x``.

        Args:
            past: ``[sequences, channels, taps - 1]``, the inputs before each; None: zeros, the start of a sequence.
            cu_seqlens: int32 or int64 ``[sequences + 1]``: x is one row, and sequence n its tokens ``cu_seqlens[n]`` to
                ``cu_seqlens[n + 1]``. Default: every row is a sequence.
        """
        return convolve(x, self.weight, self.bias, past, cu_seqlens)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """Weights without the middle dimension, ``[channels, taps]``, load too."""
        fit_on_load(state_dict, prefix, self, "weight")
        super()._load_from_state_dict(state_dict, prefix, *args)


class GatedRMSNorm(nn.Module):
    r""":math:`y = x / \sqrt{mean(x^2) + eps} \cdot weight \cdot \sigma(gate)` over the last dimension, in fp32.

    Source: Kimi Linear report, section 4 (the sigmoid output gate).
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.fill_(1)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, self.eps)


class LatentRMSNorm(nn.RMSNorm):
    """RMSNorm in the dtype of its weight, returned in the dtype of its input: the two differ under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def is_unhooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs the forward of its class, and nothing else."""
    if "forward" in vars(module) or nn.modules.module._has_any_global_hook():
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks)


def is_plain(module: nn.Module, kind: type[nn.Module], *, may_have_bias: bool = False) -> bool:
    """Whether a call of ``module`` does what ``kind`` does with one plain ``weight``, and nothing else.

    Only then may the weight be used without the call. Wrappers, adapters, parametrizations, quantised or sharded
    weights and hooks all make it False. So does a bias, unless ``may_have_bias`` allows a plain one.
    """
    parameters = module._parameters
    if type(module) is not kind or not is_unhooked(module):
        return False
    bias = parameters.get("bias")
    if bias is not None and not (may_have_bias and type(bias) in PLAIN_WEIGHTS):
        return False
    return type(parameters.get("weight")) in PLAIN_WEIGHTS


def device_and_dtype(module: nn.Module, leave_out: tuple[str, ...] = ()) -> tuple[torch.device, torch.dtype]:
    """Those of the first parameter that holds numbers to compute with: neither quantised nor named in ``leave_out``.

    Without one the device is that of any parameter, and the dtype is torch's default.
    """
    named = list(module.named_parameters())
    for name, p in named:
        if p.is_floating_point() and p.dtype.itemsize >= 2 and name.rpartition(".")[2] not in leave_out:
            return p.device, p.dtype
    return named[0][1].device if named else torch.device("cpu"), torch.get_default_dtype()


def fit_on_load(state_dict: dict, prefix: str, module: nn.Module, name: str, *shapes: tuple[int, ...]) -> None:
    """Gives an entry of ``state_dict`` the shape of the parameter, if it differs by dimensions of one alone.

    ``shapes``: other shapes that hold the numbers in the parameter's order.
    """
    value, parameter = state_dict.get(prefix + name), module._parameters.get(name)
    if not isinstance(value, Tensor) or parameter is None or value.shape == parameter.shape:
        return
    known = [[n for n in shape if n != 1] for shape in (parameter.shape, *shapes)]
    if [n for n in value.shape if n != 1] in known:
        state_dict[prefix + name] = value.reshape(parameter.shape)
