"""Convolutions over pools of last inputs [slots, channels, inputs]; slot 0 is null. The oldest input comes first."""

import torch
import torch.nn.functional as F


def _convolved(past, x, weight):
    """past [channels, taps - 1], x [channels, tokens]."""
    joint = torch.cat((past, x), dim=1)
    return F.silu(F.conv1d(joint[None], weight[:, None], groups=len(weight))[0]), joint


def causal_conv1d_fn(
    x,
    weight,
    bias,
    conv_states,
    query_start_loc,
    cache_indices=None,
    has_initial_state=None,
    activation="silu",
    metadata=None,
):
    out, history = torch.zeros_like(x), weight.shape[1] - 1
    bounds = query_start_loc.tolist()
    for n, slot in enumerate(cache_indices.tolist()):
        if slot > 0 and bounds[n] < bounds[n + 1]:
            own = slice(bounds[n], bounds[n + 1])
            past = conv_states[slot, :, :history] * has_initial_state[n]
            out[:, own], joint = _convolved(past, x[:, own], weight)
            conv_states[slot, :, :history] = joint[:, -history:]
    return out


def causal_conv1d_update(
    x,
    conv_state,
    weight,
    bias=None,
    activation=None,
    conv_state_indices=None,
    num_accepted_tokens=None,
    query_start_loc=None,
    max_query_len=-1,
    validate_data=False,
    out=None,
):
    """With accepted drafts the window begins at the last accepted one, and all inputs since then are kept."""
    history = weight.shape[1] - 1
    bounds = range(len(x) + 1) if query_start_loc is None else query_start_loc.tolist()
    for n, slot in enumerate(conv_state_indices.tolist()):
        if slot > 0 and bounds[n] < bounds[n + 1]:
            own = slice(bounds[n], bounds[n + 1])
            begin = 0 if num_accepted_tokens is None else int(num_accepted_tokens[n]) - 1
            y, joint = _convolved(conv_state[slot, :, begin : begin + history], x[own].T, weight)
            out[own] = y.T
            kept = joint[:, -history:] if num_accepted_tokens is None else joint[:, 1:]
            conv_state[slot, :, : kept.shape[1]] = kept
    return out
