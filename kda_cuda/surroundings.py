"""What surrounds the operation in a layer: the convolution before it, the gated norm behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import calls
from .checks import FLOAT_DTYPES, Checker, check_cu_seqlens, rows_contiguous
from .schemas import Conv, Norm

__all__ = ["gated_rmsnorm", "short_conv"]

ACTIVATIONS = (None, "silu")
GATE_ACTIVATIONS = ("sigmoid", "silu")
MIN_TAPS, MAX_TAPS = 2, 8


@calls.public
def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
):
    r"""A causal convolution of each channel with its own few taps, with gradients: whole sequences and single steps.

    .. math:: y_{t,c} = f(bias_c + \sum_j weight_{c,j} \, x_{t-taps+1+j,c})

    Sums are in fp32 (float64 for float64). Several streams are convolved at once where their channels lie side by side.

    Args:
        x: ``[B, T, D]``, fp32, fp16 or bf16 (float64 on the CPU); rows may be strided.
        weight: ``[D, taps]`` or ``[D, 1, taps]``, 2 to 8 taps, the last for the token itself; dtype of x or fp32.
        bias: ``[D]`` in the dtype of the weight, or None.
        activation: ``"silu"``, or None for the sum itself.
        initial_state: ``[N, D, taps - 1]``, the last inputs before each sequence, the latest in the end; any strides;
            dtype of x or fp32. N is B, or the sequences of ``cu_seqlens``. Default: zeros.
        output_final_state: return the last inputs of each sequence too, which continue it.
        cu_seqlens: int32 or int64 ``[N + 1]``, for B = 1: sequence n is tokens ``cu_seqlens[n]`` to
            ``cu_seqlens[n + 1]``. Tokens after the last one get zeros, whatever they hold.

    Returns:
        ``y`` ``[B, T, D]`` in the dtype of x, and the final state ``[N, D, taps - 1]`` or None. The final state is new
        memory, in the dtype of the initial one, or of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Nothing has run then.
        NotImplementedError: a derivative by forward mode or by torch.func is asked for.

    Example:
        >>> import torch, kda_cuda
        >>> x = torch.arange(4.0).reshape(1, 4, 1)
        >>> y, state = kda_cuda.short_conv(x, torch.tensor([[10.0, 1.0]]), activation=None, output_final_state=True)
        >>> y.flatten(), state.flatten()
        (tensor([ 0.,  1., 12., 23.]), tensor([3.]))
    """
    c = Checker("short_conv")
    wide = _checked_stream(c, x, "B, T, D")
    c.choice("activation", activation, ACTIVATIONS)
    c.boolean("output_final_state", output_final_state)
    channels = x.shape[2]
    weight = _checked_taps(c, x, weight, wide)
    if bias is not None:
        _check_beside(c, "bias", bias, x, (weight.dtype,), "D")
        c.shape("bias", bias, D=channels)
        bias = bias.contiguous()
    if cu_seqlens is not None:
        check_cu_seqlens(c, x, cu_seqlens, None, "x")
        cu_seqlens = cu_seqlens.contiguous()
    if initial_state is not None:
        _check_beside(c, "initial_state", initial_state, x, wide, "N, D, taps-1")
        sizes = {"N": calls.sequences_of(x, cu_seqlens), "D": channels, "taps-1": weight.shape[1] - 1}
        c.shape("initial_state", initial_state, **sizes)
    arguments = Conv(
        x=rows_contiguous(x),
        weight=weight,
        bias=bias,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        silu=activation == "silu",
        output_final_state=output_final_state,
    )

    op = "short_conv" if calls.needs_grad(c, x, weight, bias, initial_state) else "short_conv_fwd"
    return calls.Call(op, arguments, x, _with_final_state, c)


@calls.public
def gated_rmsnorm(x: Tensor, gate: Tensor, weight: Tensor, eps: float = 1e-5, *, activation: str = "sigmoid"):
    r"""RMSNorm of each row times an activation of its gate, with gradients.

    .. math:: y = x / \sqrt{mean(x^2) + eps} \cdot weight \cdot f(gate)

    over the last dimension, in fp32 (float64 for float64). Nothing is kept for the backward but the inputs. Squares may
    leave the range of fp32: the result is right for every finite x.

    Args:
        x: ``[..., D]``, any layout; fp32, fp16, bf16 (float64 on the CPU).
        gate: shape and dtype of x, before its activation; any layout.
        weight: ``[D]``; dtype of x or fp32.
        eps: positive.
        activation: of the gate, ``"sigmoid"`` or ``"silu"``.

    Returns:
        ``y`` with the shape and dtype of x.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Nothing has run then.
        NotImplementedError: a derivative by forward mode or by torch.func is asked for.

    Example:
        >>> import torch, kda_cuda
        >>> kda_cuda.gated_rmsnorm(torch.tensor([3.0, -3.0]), torch.zeros(2), torch.ones(2))
        tensor([ 0.5000, -0.5000])
    """
    c = Checker("gated_rmsnorm")
    wide = _checked_stream(c, x, None)
    _check_beside(c, "gate", gate, x, (x.dtype,), None)
    if gate.shape != x.shape:
        raise c.value_error(f"gate has shape {list(gate.shape)}, expected {list(x.shape)} like x")
    _check_beside(c, "weight", weight, x, wide, "D")
    c.shape("weight", weight, D=x.shape[-1])
    eps = c.number("eps", eps)
    if not 0 < eps < math.inf:
        raise c.value_error(f"eps is {eps}, expected a finite positive number")
    c.choice("activation", activation, GATE_ACTIVATIONS)
    arguments = Norm(x=x, gate=gate, weight=weight, eps=eps, silu=activation == "silu")
    op = "gated_rmsnorm" if calls.needs_grad(c, x, gate, weight) else "gated_rmsnorm_fwd"
    return calls.Call(op, arguments, x, calls.as_it_is, c)


def _with_final_state(arguments: Conv, results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    y, final_state = results
    return y, final_state if arguments.output_final_state else None


def _checked_stream(c: Checker, x: object, dims: str | None) -> tuple[torch.dtype, ...]:
    """Checks ``x``, whose last dimension is D; returns the dtypes that parameters and states may have beside it."""
    c.tensor("x", x)
    if dims:
        c.rank("x", x, dims)
    c.dtype("x", x, FLOAT_DTYPES if x.device.type == "cpu" else FLOAT_DTYPES[:3])
    if x.dim() < 1 or x.shape[-1] < 1:
        raise c.value_error(f"x has shape {list(x.shape)}, expected [{dims or '..., D'}] with D >= 1")
    return tuple({x.dtype: None, torch.float64 if x.dtype == torch.float64 else torch.float32: None})


def _check_beside(
    c: Checker, name: str, y: object, x: Tensor, dtypes: tuple[torch.dtype, ...], dims: str | None
) -> None:
    c.tensor(name, y)
    c.device(name, y, x.device, "x")
    if dims:
        c.rank(name, y, dims)
    c.dtype(name, y, dtypes)


def _checked_taps(c: Checker, x: Tensor, weight: object, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The weight as ``[D, taps]``, contiguous."""
    c.tensor("weight", weight)
    c.device("weight", weight, x.device, "x")
    if weight.dim() == 3 and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    if weight.dim() != 2:
        raise c.value_error(f"weight has shape {list(weight.shape)}, expected [D, taps] or [D, 1, taps]")
    c.dtype("weight", weight, dtypes)
    taps = weight.shape[1]
    c.shape("weight", weight, D=x.shape[2], taps=taps)
    if not MIN_TAPS <= taps <= MAX_TAPS:
        raise c.value_error(f"weight has {taps} taps, expected {MIN_TAPS} to {MAX_TAPS}")
    return weight.contiguous()
