"""The forwards that :func:`kda_cuda.integrations.transformers.patch` gives to KDA layers of other libraries.

A forward reads the layer that it is given: projections are called as modules, so that adapters and hooks of them stay
in force, and a convolution or norm is read directly only when nothing is hooked to it. Caches are the library's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn.modules import convolve, gated_rms_norm, is_plain, is_unhooked
from ..nn.projections import linears
from ..ops import chunk_kda, fused_recurrent_kda

FLAGS = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
FEW_TOKENS = 16  # as many as the recurrence takes at once
PACKED = ("cu_seqlens", "seq_idx")  # what transformers' layers hand on to kernels of others


# ---- transformers ----------------------------------------------------------------------------------------------------


def transformers_forward(self, hidden_states, cache_params=None, attention_mask=None, *, cache=None, **kwargs):
    """For a ``*DeltaAttention`` of transformers 5.17 and later; later ones call ``cache_params`` ``cache``."""
    if any(kwargs.get(name) is not None for name in PACKED):
        given = {"cache_params": cache_params} if cache is None else {"cache": cache}
        return type(self).forward(self, hidden_states, attention_mask=attention_mask, **given, **kwargs)
    cache = cache_params if cache is None else cache
    x = hidden_states
    if attention_mask is not None:  # padding as in transformers: its tokens are zero
        x = (x * attention_mask[:, :, None]).to(x.dtype)
    conv_state, state = _states(cache, self.layer_idx)
    gate, ours = self.forget_gate, is_unhooked(self.forget_gate)
    (f, second_f), (g, second_g) = _halves(gate, "f") if ours else (gate, None), _halves(self, "g")
    *inputs, beta, g, output_gate = linears(x, self.q_proj, self.k_proj, self.v_proj, self.b_proj, f, g)
    q, k, v = _convolve_streams(self.conv1d, inputs, conv_state, self.head_dim)
    if cache is not None:
        _remember(cache, self.layer_idx, inputs, self.conv_kernel_size)
    options = {}
    if ours:
        g = (g if second_f is None else second_f(g)).unflatten(-1, (-1, self.head_dim))
        options = {
            "use_gate_in_kernel": True,
            "A_log": gate.A_log,
            "dt_bias": gate.dt_bias,
            "lower_bound": lower_bound_of(gate),
        }
    few = state is not None and x.shape[1] == 1
    o, new_state = _kda(few, q, k, v, g, beta, state, cache is not None, **options)
    if cache is not None:
        cache.update_recurrent_state(new_state, self.layer_idx)
    output_gate = output_gate if second_g is None else second_g(output_gate)
    y = _gated_norm(self.o_norm, o, output_gate.unflatten(-1, (-1, self.head_dim)), "variance_epsilon")
    return self.o_proj(y.flatten(-2))


def _halves(module: nn.Module, name: str) -> tuple[nn.Module, nn.Module | None]:
    """The projection of a gate; or the one to few channels, and the one from them."""
    modules = module._modules
    if f"{name}_proj" in modules:
        return modules[f"{name}_proj"], None
    return modules[f"{name}_a_proj"], modules[f"{name}_b_proj"]


def lower_bound_of(gate: nn.Module) -> float | None:
    """Of a forget gate of transformers; None selects the softplus form."""
    if hasattr(gate, "safe_gate"):
        return gate.lower_bound if gate.safe_gate else None
    return getattr(gate, "safe_gate_lower_bound", None)


def _states(cache, layer: int) -> tuple[Tensor | None, Tensor | None]:
    """The last inputs ``[batch, 3 * channels, taps]`` and the state ``[batch, heads, K, V]``, if there are any."""
    if cache is None:
        return None, None
    if hasattr(cache, "get_conv_state"):
        return cache.get_conv_state(layer, state_idx=0), cache.get_recurrent_state(layer, state_idx=0)
    if not cache.has_previous_state(layer):
        return None, None
    return cache.layers[layer].conv_states[0], cache.layers[layer].recurrent_states[0]


def _remember(cache, layer: int, inputs: list[Tensor], taps: int) -> None:
    """Hands the cache what it keeps: the last inputs, or all of them if it may be asked to go back."""
    kept = 0 if getattr(cache.layers[layer], "record_past", False) else taps
    tails = [y[:, -kept:] for y in inputs]
    cache.update_conv_state(torch.cat(tails, dim=-1).transpose(1, 2), layer, conv_kernel_size=taps)


def _convolve_streams(conv: nn.Conv1d, inputs: list[Tensor], state: Tensor | None, head_dim: int) -> list[Tensor]:
    """q, k and v by one convolution's weight, which has their channels one after the other."""
    with _accelerated(conv):
        past = None if state is None else _past(state, conv.kernel_size[0])
        streams = _convolved(inputs, conv.weight, conv.bias, past)
    return [y.unflatten(-1, (-1, head_dim)) for y in streams]


@contextlib.contextmanager
def _accelerated(module: nn.Module) -> Iterator[None]:
    """Weights that accelerate has moved away are there inside."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
    yield
    if hook is not None:
        hook.post_forward(module, ())


# ---- flash-linear-attention ------------------------------------------------------------------------------------------


def fla_forward(
    self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, output_attentions=False, **kwargs
):
    """For a ``KimiDeltaAttention`` of fla 0.5 and 0.6."""
    from fla.layers.utils import get_layer_cache, update_layer_cache

    batch, tokens = hidden_states.shape[:2]
    last = get_layer_cache(self, past_key_values)
    conv_states = (None,) * 3 if last is None or last["conv_state"] is None else last["conv_state"]
    state = None if last is None else last["recurrent_state"]
    x, cu_seqlens, places = hidden_states, kwargs.get("cu_seqlens"), None
    if cu_seqlens is None and attention_mask is not None:
        x, cu_seqlens, places = _unpadded(x, attention_mask[:, -tokens:])
    *streams, beta = linears(x, self.q_proj, self.k_proj, self.v_proj, self.b_proj)
    if self.use_short_conv:
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        streams, conv_states = _fla_convolved(convolutions, streams, conv_states, use_cache, cu_seqlens)
    else:
        streams, conv_states = [F.silu(y) for y in streams], None
    q, k, v = (
        y.unflatten(-1, (-1, d)) for y, d in zip(streams, (self.head_k_dim,) * 2 + (self.head_v_dim,), strict=True)
    )
    g = self.f_proj(x).unflatten(-1, (-1, self.head_k_dim))
    few = state is not None and tokens <= FEW_TOKENS
    o, state = _kda(
        few,
        q,
        k,
        v,
        g,
        beta,
        state,
        bool(use_cache),
        use_gate_in_kernel=True,
        A_log=self.A_log,
        dt_bias=self.dt_bias,
        lower_bound=self.lower_bound,
        allow_neg_eigval=self.allow_neg_eigval,
        state_v_first=True,
        cu_seqlens=cu_seqlens,
    )
    update_layer_cache(self, past_key_values, recurrent_state=state, conv_state=conv_states, offset=tokens)
    y = _gated_norm(self.o_norm, o, self.g_proj(x).unflatten(-1, (-1, self.head_v_dim)), "eps")
    y = self.o_proj(y.flatten(-2))
    if places is not None:
        y = y.new_zeros(batch * tokens, y.shape[-1]).index_copy(0, places, y[0]).unflatten(0, (batch, tokens))
    return y, None, past_key_values


def _unpadded(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens of a batch in one row, where each sequence begins, and the place of each token in the batch."""
    places = mask.flatten().nonzero().flatten()
    bounds = F.pad(mask.ne(0).sum(dim=-1).cumsum(0), (1, 0))
    return x.flatten(0, 1).index_select(0, places).unsqueeze(0), bounds, places


def _fla_convolved(
    convolutions: tuple[nn.Module, ...],
    xs: list[Tensor],
    states: tuple[Tensor | None, ...],
    keep: bool,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor], tuple[Tensor | None, ...]]:
    """The convolved streams, and their last inputs ``[sequences, channels, taps]``, as fla's cache has them."""
    ours = all(is_plain(c, type(c)) and getattr(c, "activation", None) in ("silu", "swish") for c in convolutions)
    if not ours:
        options = {"output_final_state": keep, "cu_seqlens": cu_seqlens}
        each = zip(convolutions, xs, states, strict=True)
        ys, states = zip(*(conv(x=x, cache=state, **options) for conv, x, state in each), strict=True)
        return list(ys), states
    taps = convolutions[0].weight.shape[-1]
    past = None if states[0] is None else torch.cat([_past(state, taps) for state in states], dim=1)
    ys = _convolved(xs, torch.cat([conv.weight for conv in convolutions]), None, past, cu_seqlens)
    if not keep:
        return ys, (None,) * 3
    if cu_seqlens is None:
        return ys, tuple(_last_inputs(x, state, taps) for x, state in zip(xs, states, strict=True))
    return ys, tuple(_last_of_each(x[0], state, taps, cu_seqlens) for x, state in zip(xs, states, strict=True))


def _last_inputs(x: Tensor, state: Tensor | None, taps: int) -> Tensor:
    """``[batch, channels, taps]``, with zeros before the start of a sequence."""
    tail = x[:, -taps:].transpose(1, 2)
    missing = taps - tail.shape[2]
    if state is None:
        return F.pad(tail, (missing, 0))
    return torch.cat((state[:, :, taps - missing :].to(x.dtype), tail), dim=2)


def _last_of_each(x: Tensor, state: Tensor | None, taps: int, cu_seqlens: Tensor) -> Tensor:
    """:func:`_last_inputs` of the sequences in one row ``[tokens, channels]``."""
    number = torch.arange(taps, device=x.device) - taps + cu_seqlens.diff()[:, None]  # below 0: in the state
    x = x if len(x) else x.new_zeros(1, x.shape[1])  # what is not used must be there to be read
    own = x[(cu_seqlens[:-1, None] + number).clamp(0, len(x) - 1)].transpose(1, 2)
    if state is None:
        return own.masked_fill((number < 0)[:, None], 0)
    older = (number + taps).clamp_max(taps - 1)[:, None].expand(-1, x.shape[1], -1)
    return torch.where((number >= 0)[:, None], own, state.to(x.dtype).gather(2, older))


# ---- both ------------------------------------------------------------------------------------------------------------


def _past(state: Tensor, taps: int) -> Tensor:
    """Of the last inputs those that a convolution reaches. A copy for autograd: caches are written in place."""
    past = state[:, :, state.shape[2] - taps + 1 :]
    return past.clone() if torch.is_grad_enabled() else past


def _convolved(
    xs: list[Tensor], weight: Tensor, bias: Tensor | None, past: Tensor | None, cu_seqlens: Tensor | None = None
) -> list[Tensor]:
    """In the dtype of the weight, which some models keep wider than the streams."""
    ys = convolve([x.to(weight.dtype) for x in xs], weight, bias, past, cu_seqlens)
    return [y.to(x.dtype) for x, y in zip(xs, ys, strict=True)]


def _kda(few: bool, q, k, v, g, beta, state: Tensor | None, keep_state: bool, **options) -> tuple[Tensor, Tensor]:
    """The operation: the recurrence for a few tokens on top of a state, else chunks; the final state is new memory."""
    if state is not None and torch.is_grad_enabled():
        state = state.clone()
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = None if state is None else state.to(dtype)
    function = fused_recurrent_kda if few else chunk_kda
    return function(q, k, v, g, beta, initial_state=state, output_final_state=keep_state, **FLAGS, **options)


def _gated_norm(norm: nn.Module, o: Tensor, gate: Tensor, eps: str) -> Tensor:
    """RMSNorm and sigmoid gate; ``eps`` is the name of the module's attribute."""
    if is_plain(norm, type(norm)) and getattr(norm, "activation", None) == "sigmoid":
        return gated_rms_norm(o, gate, norm.weight, getattr(norm, eps))
    return norm(o, gate)
