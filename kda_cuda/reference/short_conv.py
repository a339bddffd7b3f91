"""The causal depthwise convolution of each channel with a few taps (docs/mathematics.md, section 7)."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .gates import compute_dtype


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> list[tuple[int, slice, slice]]:
    """Of each sequence, or of all rows at once without cu_seqlens: first state row, batch rows, tokens."""
    if cu_seqlens is None:
        return [(0, slice(0, x.shape[0]), slice(0, x.shape[1]))]
    bounds = cu_seqlens.detach().tolist()
    return [(n, slice(0, 1), slice(*ends)) for n, ends in enumerate(itertools.pairwise(bounds))]


class _Window:
    """A sequence ``[rows, D, taps - 1 + tokens]`` in the compute dtype, with what came before it."""

    def __init__(self, x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, silu: bool):
        dtype, taps = compute_dtype(x.dtype), weight.shape[1]
        self.weight = weight.to(dtype)
        x = x.to(dtype).transpose(1, 2)
        past = x.new_zeros(*x.shape[:2], taps - 1) if past is None else past.to(dtype)
        self.inputs = torch.cat((past, x), 2)
        self.taps, self.tokens, self.silu = taps, x.shape[2], silu
        self.bias = None if bias is None else bias.to(dtype)

    def sums(self) -> Tensor:
        """Before the activation, ``[rows, D, tokens]``."""
        if 0 in (*self.inputs.shape[:2], self.tokens):  # conv1d refuses an empty input
            return self.inputs[:, :, : self.tokens]
        weight = self.weight.unsqueeze(1)
        return F.conv1d(self.inputs, weight, self.bias, groups=weight.shape[0])

    def gradient_of_sums(self, dy: Tensor) -> Tensor:
        dy = dy.to(self.inputs.dtype).transpose(1, 2)
        if not self.silu:
            return dy
        z = self.sums().masked_fill(dy == 0, 0)  # what nobody asks for has no gradient, whatever it holds
        return dy * torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))

    def gradients(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the inputs, the past among them, of the weight and of the bias."""
        dz = self.gradient_of_sums(dy)
        dinputs = torch.zeros_like(self.inputs)
        dweight = torch.empty_like(self.weight)
        for j in range(self.taps):
            part = slice(j, j + self.tokens)
            dinputs[:, :, part] += self.weight[:, j, None] * dz
            dweight[:, j] = (self.inputs[:, :, part] * dz).sum((0, 2))
        return dinputs, dweight, dz.sum((0, 2))


def _past(initial_state: Tensor | None, first: int, rows: slice) -> Tensor | None:
    return None if initial_state is None else initial_state[first : first + rows.stop - rows.start]


def _streams(*xs: Tensor | None) -> tuple[Tensor, list[int]]:
    """Those that are there side by side, and how wide each is."""
    there = [x for x in xs if x is not None]
    return (there[0] if len(there) == 1 else torch.cat(there, -1)), [0 if x is None else x.shape[-1] for x in xs]


def _apart(x: Tensor, widths: list[int]) -> tuple[Tensor, ...]:
    """The streams again, in memory of their own; empty where there was none."""
    if x.shape[-1] == widths[0]:
        return x, *(x.new_empty(0) for _ in widths[1:])
    parts = x.split(widths, -1)
    return tuple(part.contiguous() if width else x.new_empty(0) for part, width in zip(parts, widths, strict=True))


def short_conv_fwd(
    x: Tensor,
    x2: Tensor | None,
    x3: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
    output_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, widths = _streams(x, x2, x3)
    y, finals = x.new_zeros(x.shape), []
    for first, rows, tokens in _sequences(x, cu_seqlens):
        past = _past(initial_state, first, rows)
        window = _Window(x[rows, tokens], past, weight, bias, silu)
        sums = window.sums()
        y[rows, tokens] = (F.silu(sums) if silu else sums).transpose(1, 2).to(y.dtype)
        if output_final_state:
            owner = x if past is None else past
            finals.append(window.inputs[:, :, window.tokens :].to(owner.dtype))
    return *_apart(y, widths), torch.cat(finals).contiguous() if output_final_state else x.new_empty(0)


def short_conv_bwd(
    dy: Tensor,
    dy2: Tensor | None,
    dy3: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    x2: Tensor | None,
    x3: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    (x, widths), (dy, _) = _streams(x, x2, x3), _streams(dy, dy2, dy3)
    dx = x.new_zeros(x.shape)
    dweight, dbias = weight.new_zeros(weight.shape, dtype=dtype), weight.new_zeros(weight.shape[:1], dtype=dtype)
    dstate = x.new_empty(0) if initial_state is None else initial_state.new_zeros(initial_state.shape)
    for first, rows, tokens in _sequences(x, cu_seqlens):
        past = _past(initial_state, first, rows)
        window = _Window(x[rows, tokens], past, weight, bias, silu)
        dinputs, dw, db = window.gradients(dy[rows, tokens])
        dweight, dbias = dweight + dw, dbias + db
        if dfinal_state is not None:
            dinputs[:, :, window.tokens :] += _past(dfinal_state, first, rows).to(dtype)
        dx[rows, tokens] = dinputs[:, :, window.taps - 1 :].transpose(1, 2).to(dx.dtype)
        if past is not None:
            _past(dstate, first, rows).copy_(dinputs[:, :, : window.taps - 1])
    dbias = x.new_empty(0) if bias is None else dbias.to(bias.dtype)
    return *_apart(dx, widths), dweight.to(weight.dtype), dbias, dstate
