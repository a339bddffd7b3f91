"""Calls of the decoding functions for the named cases, and the truth of every token's state."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

import kda_cuda
from kda_cuda import reference
from kda_cuda.schemas import Decode

from . import oracle
from .cases import Inputs


def options(x: Inputs) -> dict:
    """The arguments of ``kda_cuda.decode`` that are neither streams nor states."""
    return {
        "A_log": x.A_log,
        "dt_bias": x.dt_bias,
        "scale": x.scale,
        "use_qk_l2norm_in_kernel": x.use_qk_l2norm,
        "use_gate_in_kernel": x.use_gate,
        "use_beta_sigmoid_in_kernel": x.use_beta_sigmoid,
        "allow_neg_eigval": x.allow_neg_eigval,
        "lower_bound": x.lower_bound,
        "state_v_first": x.state_v_first,
    }


def streams(x: Inputs, tokens: slice = slice(None)) -> dict[str, Tensor]:
    return {name: getattr(x, name)[:, tokens] for name in ("q", "k", "v", "g", "beta")}


def decode(x: Inputs, state: Tensor | None, tokens: slice = slice(None), **more) -> Tensor:
    return kda_cuda.decode(**streams(x, tokens), state=state, cu_seqlens=x.cu_seqlens, **options(x), **more)


def reference_step(x: Inputs) -> tuple[Tensor, Tensor]:
    """o and the final state by ``reference.decode``, called as the op is."""
    o, final_state = torch.empty_like(x.v, memory_format=torch.contiguous_format), torch.empty_like(x.dfinal_state)
    absent = dict.fromkeys(Decode._fields)
    inputs = {name: getattr(x, name) for name in Decode._fields if hasattr(x, name)}
    buffers = {"out": o, "state": x.initial_state, "new_state": final_state}
    flags = dict.fromkeys(("in_place", "state_per_token", "zero_is_null"), False)
    reference.decode(**absent | inputs | buffers | flags)
    return o, final_state


def states_after(x: Inputs, state: Tensor) -> list[list[Tensor]]:
    """Per sequence the states after 0, 1, ... tokens, ``[HV, K, V]`` float64, from ``state [N, HV, ...]`` as given."""
    x, state = x.double(), state.double().cpu()
    values = oracle.transformed(x)
    if x.state_v_first:
        state = state.transpose(-1, -2)
    histories = []
    for n in range(state.shape[0]):
        row, begin, end = n, 0, x.q.shape[1]
        if x.cu_seqlens is not None:
            row, (begin, end) = 0, list(itertools.pairwise(x.cu_seqlens.tolist()))[n]
        history = [state[n]]
        own = (y[row : row + 1, begin:end] for y in values)
        history += [after[0] for _, after in oracle.steps(*own, state[n : n + 1], x.scale)]
        histories.append(history)
    return histories
