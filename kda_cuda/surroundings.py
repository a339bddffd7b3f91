"""What surrounds the operation in a layer: the convolution before it, the gated norm behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import calls
from .checks import FLOAT_DTYPES, Checker, check_cu_seqlens, rows_contiguous
from .schemas import Conv, Norm

__all__ = ["gated_rmsnorm", "short_conv"]

ACTIVATIONS = (None, "silu")
GATE_ACTIVATIONS = ("sigmoid", "silu")
MIN_TAPS, MAX_TAPS = 2, 8
MAX_STREAMS = 3


@calls.public
def short_conv(
    x: Tensor | Sequence[Tensor],
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

    Sums are in fp32 (float64 for float64). Up to three streams, such as those of q, k and v, are convolved in one call.

    Args:
        x: ``[B, T, D]``, fp32, fp16 or bf16 (float64 on the CPU); rows may be strided. Or a list or tuple of 1 to 3
            such streams, alike but for their channels: D then counts those of all, side by side.
        weight: ``[D, taps]`` or ``[D, 1, taps]``, 2 to 8 taps, the last for the token itself; dtype of x or fp32.
        bias: ``[D]`` in the dtype of the weight, or None.
        activation: ``"silu"``, or None for the sum itself.
        initial_state: ``[N, D, taps - 1]``, the last inputs before each sequence, the latest in the end; any strides;
            dtype of x or fp32. N is B, or the sequences of ``cu_seqlens``. Default: zeros.
        output_final_state: return the last inputs of each sequence too, which continue it.
        cu_seqlens: int32 or int64 ``[N + 1]``, for B = 1: sequence n is tokens ``cu_seqlens[n]`` to
            ``cu_seqlens[n + 1]``. Tokens after the last one get zeros, whatever they hold.

    Returns:
        ``y`` like x (for several streams a tuple of tensors), and the final state ``[N, D, taps - 1]`` or None. The
        final state is new memory, in the dtype of the initial one, or of x.

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
    streams, alone = _checked_streams(c, x)
    x, channels = streams[0], sum(y.shape[2] for y in streams)
    wide = _wide(x)
    c.choice("activation", activation, ACTIVATIONS)
    c.boolean("output_final_state", output_final_state)
    weight = _checked_taps(c, x, channels, weight, wide)
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
    rows = [*map(rows_contiguous, streams), None, None]
    arguments = Conv(
        x=rows[0],
        x2=rows[1],
        x3=rows[2],
        weight=weight,
        bias=bias,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        silu=activation == "silu",
        output_final_state=output_final_state,
    )

    op = "short_conv" if calls.needs_grad(c, *streams, weight, bias, initial_state) else "short_conv_fwd"
    return calls.Call(op, arguments, x, _with_final_state if alone else _of_streams, c)


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
    _check_stream(c, "x", x, None)
    wide = _wide(x)
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


def _with_final_state(arguments: Conv, results: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    return results[0], results[3] if arguments.output_final_state else None


def _of_streams(arguments: Conv, results: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
    count = 1 if arguments.x2 is None else 2 if arguments.x3 is None else 3
    return results[:count], results[3] if arguments.output_final_state else None


def _checked_streams(c: Checker, x: object) -> tuple[Sequence[Tensor], bool]:
    """The streams of short_conv, and whether ``x`` is one by itself."""
    if not isinstance(x, (list, tuple)):
        _check_stream(c, "x", x, "B, T, D")
        return (x,), True
    if not 1 <= len(x) <= MAX_STREAMS:
        raise c.value_error(f"x has {len(x)} streams, expected 1 to {MAX_STREAMS}")
    for i, y in enumerate(x):
        _check_stream(c, f"x[{i}]", y, "B, T, D")
        if (y.dtype, y.device, y.shape[:2]) != (x[0].dtype, x[0].device, x[0].shape[:2]):
            found, expected = (f"{list(z.shape)} in {z.dtype} on {z.device}" for z in (y, x[0]))
            raise c.value_error(f"x[{i}] is {found}, expected dtype, device, B and T of x[0], which is {expected}")
    return x, False


def _check_stream(c: Checker, name: str, x: object, dims: str | None) -> None:
    """Checks ``x``, whose last dimension is D."""
    c.tensor(name, x)
    if dims:
        c.rank(name, x, dims)
    c.dtype(name, x, FLOAT_DTYPES if x.device.type == "cpu" else FLOAT_DTYPES[:3])
    if x.dim() < 1 or x.shape[-1] < 1:
        raise c.value_error(f"{name} has shape {list(x.shape)}, expected [{dims or '..., D'}] with D >= 1")


def _wide(x: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that parameters and states may have beside ``x``."""
    return tuple({x.dtype: None, torch.float64 if x.dtype == torch.float64 else torch.float32: None})


def _check_beside(
    c: Checker, name: str, y: object, x: Tensor, dtypes: tuple[torch.dtype, ...], dims: str | None
) -> None:
    c.tensor(name, y)
    c.device(name, y, x.device, "x")
    if dims:
        c.rank(name, y, dims)
    c.dtype(name, y, dtypes)


def _checked_taps(c: Checker, x: Tensor, channels: int, weight: object, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """The weight as ``[D, taps]``, contiguous."""
    c.tensor("weight", weight)
    c.device("weight", weight, x.device, "x")
    if weight.dim() == 3 and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    if weight.dim() != 2:
        raise c.value_error(f"weight has shape {list(weight.shape)}, expected [D, taps] or [D, 1, taps]")
    c.dtype("weight", weight, dtypes)
    taps = weight.shape[1]
    c.shape("weight", weight, D=channels, taps=taps)
    if not MIN_TAPS <= taps <= MAX_TAPS:
        raise c.value_error(f"weight has {taps} taps, expected {MIN_TAPS} to {MAX_TAPS}")
    return weight.contiguous()
