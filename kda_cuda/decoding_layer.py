"""``kda_cuda.decode_layer``: one decoding step of everything between the projections of a KDA layer, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import calls, variants
from .checks import Checker, check_gate_parameters, check_qkvgb, empty_like, rows_contiguous
from .schemas import DecodeLayer
from .state_pools import StatePools, check_like, check_slots

CONV_TAPS = 4

__all__ = ["decode_layer"]


@calls.public
def decode_layer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    output_gate: Tensor,
    *,
    conv_state: Tensor,
    conv_weights: tuple[Tensor, Tensor, Tensor],
    norm_weight: Tensor,
    state: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    slot_of: Tensor | None = None,
    scale: float | None = None,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    norm_eps: float = 1e-5,
    zero_is_null: bool = False,
    out: Tensor | None = None,
):
    r"""One token per sequence through a whole KDA layer, from its projections to its output projection. No gradients.

    q, k and v pass a causal convolution of four taps and SiLU; q and k are l2-normalised; the recurrence of
    :func:`decode` runs with the gate of :func:`kda_gate` and ``sigmoid(beta)``; and the result is
    :math:`o / \sqrt{mean(o^2) + eps} \cdot weight \cdot \sigma(gate)` (Kimi Linear report, section 4). Both states are
    updated in place. Where ``out`` is given nothing is allocated.

    Args:
        q, k, v: ``[B, 1, H, D]``, before their convolutions, D <= 256; fp32, fp16 or bf16 (float64 on the CPU).
        g: ``[B, 1, H, D]``, pre-activation of the gate; beta: ``[B, 1, H]``, its logit; dtype of q or fp32.
        output_gate: ``[B, 1, H, D]``, pre-activation; dtype of q.
        conv_state: ``[slots, 3 * H * D, 3]``, the last inputs of q | k | v; any strides; dtype of q or fp32.
        conv_weights: of q, k and v, ``[H * D, 4]`` or ``[H * D, 1, 4]``; dtype of q or fp32.
        norm_weight: ``[D]``; dtype of q or fp32.
        state: ``[slots, H, V, K]`` (V first, V = K = D), fp32, bf16 or fp16, contiguous inside a slot.
        A_log, dt_bias, scale, allow_neg_eigval, lower_bound: as in :func:`chunk_kda`.
        slot_of: int32 or int64 ``[B]``: the slot of each sequence in both states; negative: null slot, whose output is
            zero. Default: row b has slot b.
        norm_eps: of the RMSNorm.
        zero_is_null: slot 0 is a null slot too.
        out: ``[B, 1, H, D]``, dtype of q; returned. Default: a new tensor.

    Returns:
        The normalised and gated output ``[B, 1, H, D]`` in the dtype of q.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Nothing has run then.

    Example:
        >>> import torch, kda_cuda
        >>> q, k, v, g, gate = (torch.randn(2, 1, 4, 64) for _ in range(5))
        >>> weights = tuple(torch.randn(4 * 64, 4) for _ in range(3))
        >>> y = kda_cuda.decode_layer(
        ...     q, k, v, g, torch.randn(2, 1, 4), gate, conv_state=torch.zeros(2, 3 * 4 * 64, 3), conv_weights=weights,
        ...     norm_weight=torch.ones(64), state=torch.zeros(2, 4, 64, 64), A_log=torch.zeros(4))
        >>> y.shape
        torch.Size([2, 1, 4, 64])
    """
    c = Checker("decode_layer")
    for name, flag in {"allow_neg_eigval": allow_neg_eigval, "zero_is_null": zero_is_null}.items():
        c.boolean(name, flag)
    check_qkvgb(c, q, k, v, g, beta)
    batch, _, heads, dim = q.shape
    c.shape("q", q, B=batch, T=1, H=heads, D=dim)
    c.shape("v", v, B=batch, T=1, H=heads, D=dim)
    check_like(c, "output_gate", output_gate, q, q.dtype, {"B": batch, "T": 1, "H": heads, "D": dim})
    A_log, dt_bias, lower_bound = check_gate_parameters(c, g, heads, dim, A_log, dt_bias, lower_bound)
    pools = StatePools(c, q, batch, {"HV": heads, "V": dim, "K": dim})
    if state is None:
        c.tensor("state", state)
    pools.check("state", state, "slot_of", slot_of, ranks=(1,))
    weights = check_convolution(c, q, conv_state, conv_weights, batch if slot_of is None else None)
    wide = (q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32)
    c.tensor("norm_weight", norm_weight)
    c.device("norm_weight", norm_weight, q.device, "q")
    c.dtype("norm_weight", norm_weight, wide)
    c.shape("norm_weight", norm_weight, D=dim)
    if calls.needs_grad(c, q, k, v, g, beta, output_gate, A_log, dt_bias, norm_weight, state, *weights):
        raise c.value_error("an argument requires a gradient, expected none: decode_layer has no gradients")
    if out is None:
        out = c.make(v, empty_like)
    else:
        check_like(c, "out", out, q, q.dtype, {"B": batch, "T": 1, "H": heads, "D": dim})
    c.look(q, check_slots, batch, state, slot_of, None, state, ("slot_of", "slot_of"), slot_of, False, zero_is_null)
    scale = dim**-0.5 if scale is None else c.number("scale", scale)
    q, k, v, g = (rows_contiguous(x) for x in (q, k, v, g))
    q_weight, k_weight, v_weight = weights
    arguments = DecodeLayer(
        q=q, k=k, v=v, g=g, beta=beta, output_gate=output_gate, conv_state=conv_state, q_conv_weight=q_weight,
        k_conv_weight=k_weight, v_conv_weight=v_weight, A_log=A_log, dt_bias=dt_bias,
        norm_weight=norm_weight.contiguous(), state=state, slot_of=slot_of, out=out, scale=scale,
        allow_neg_eigval=allow_neg_eigval, lower_bound=lower_bound, norm_eps=c.number("norm_eps", norm_eps),
        zero_is_null=zero_is_null,
    )  # fmt: skip
    return calls.Call("decode_layer", arguments, q, calls.out, c)


def check_convolution(c: Checker, q: Tensor, conv_state, conv_weights, slots: int | None) -> list[Tensor]:
    """The weights as ``[H * D, 4]``. ``slots``: that the state must have."""
    wide = (q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32)
    width = q.shape[2] * q.shape[3]
    c.tensor("conv_state", conv_state)
    c.device("conv_state", conv_state, q.device, "q")
    c.rank("conv_state", conv_state, "slots, 3*H*D, taps-1")
    c.dtype("conv_state", conv_state, wide)
    sizes = {"slots": conv_state.shape[0] if slots is None else slots, "3*H*D": 3 * width, "taps-1": CONV_TAPS - 1}
    c.shape("conv_state", conv_state, **sizes)
    if not isinstance(conv_weights, (tuple, list)) or len(conv_weights) != 3:
        raise c.type_error(f"conv_weights is a {type(conv_weights).__name__}, expected three Tensors, of q, k and v")
    weights = []
    for name, weight in zip("qkv", conv_weights, strict=True):
        name = f"conv_weights of {name}"
        c.tensor(name, weight)
        c.device(name, weight, q.device, "q")
        c.dtype(name, weight, (conv_weights[0].dtype,) if weights else wide)
        if weight.numel() != width * CONV_TAPS or weight.shape[-1] != CONV_TAPS:
            c.shape(name, weight, **{"H*D": width, "taps": CONV_TAPS})
        shape = (width, CONV_TAPS)
        weights.append((weight if weight.shape == shape else weight.reshape(shape)).contiguous())
    return weights


def serves(x: Tensor, head_dim: int, conv_size: int) -> bool:
    """Whether a kernel does a step of a layer whose projections are like ``x``."""
    if conv_size != CONV_TAPS or head_dim > 256 or torch.is_grad_enabled():
        return False
    return variants.serves("decode_layer", x)
