"""The torch ops: schemas, fakes and autograd, said once for three namespaces.

``kda_cuda``            CPU key: the reference; CUDA key: the kernels of ``_ops.so`` (implementations only, no schemas)
``kda_cuda_reference``  the reference on any device: what CUDA tensors run where no kernel serves them
``kda_cuda_emulated``   CPU key: the kernels compiled for the CPU, in tests only (:mod:`kda_cuda.testing`)

Raw ops (``*_fwd``, ``*_bwd``) carry no autograd; ``chunk`` and ``kda_gate`` do and save nothing but their inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import reference
from .checks import rows_contiguous
from .reference.chunk_bwd import ALL_GRADIENTS, GRADIENTS, mask_of
from .reference.gates import compute_dtype

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? cu_seqlens, float scale, bool use_qk_l2norm, bool use_gate, bool use_beta_sigmoid, "
    "bool allow_neg_eigval, float? lower_bound, bool state_v_first"
)
_CHUNK = (
    f"({_INPUTS}, bool output_final_state, int chunk_size, bool output_chunk_states, SymInt? chunk_state_rows=None, "
    "bool batch_invariant=False) -> (Tensor, Tensor, Tensor)"
)
_PREFILL = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, Tensor(a!) state_pool, "
    "Tensor? slot_of, Tensor? initial_slot_of, Tensor? has_initial_state, Tensor(b!)? checkpoint_pool, "
    "Tensor? checkpoint_slots, Tensor? cu_seqlens, Tensor(c!)? workspace, float scale, bool use_qk_l2norm, "
    "bool use_gate, bool use_beta_sigmoid, bool allow_neg_eigval, float? lower_bound, bool state_v_first, "
    "bool zero_is_null, int checkpoint_interval, bool batch_invariant) -> Tensor"
)
_DECODE = (  # every state is [slots, HV, V, K] or [slots, HV, K, V]; nothing is allocated
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias, Tensor(a!) out, "
    "Tensor(b!)? state, Tensor? slot_of, Tensor(c!)? new_state, Tensor? new_slot_of, "
    "Tensor? num_accepted_tokens, Tensor? cu_seqlens, Tensor(d!)? record_k, Tensor(e!)? record_u, "
    "Tensor(f!)? record_g, float scale, bool use_qk_l2norm, bool use_gate, bool use_beta_sigmoid, "
    "bool allow_neg_eigval, float? lower_bound, bool state_v_first, bool in_place, bool state_per_token, "
    "bool zero_is_null) -> ()"
)
_COMMIT = (
    "(Tensor(a!) state, Tensor? slot_of, Tensor(b!)? new_state, Tensor? new_slot_of, Tensor record_k, "
    "Tensor record_u, Tensor record_g, Tensor num_accepted_tokens, Tensor? cu_seqlens, bool state_v_first, "
    "bool zero_is_null) -> ()"
)
_DECODE_LAYER = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor output_gate, Tensor(a!) conv_state, "
    "Tensor q_conv_weight, Tensor k_conv_weight, Tensor v_conv_weight, Tensor? A_log, Tensor? dt_bias, "
    "Tensor norm_weight, Tensor(b!) state, Tensor? slot_of, Tensor(c!) out, float scale, bool allow_neg_eigval, "
    "float? lower_bound, float norm_eps, bool zero_is_null) -> ()"
)
# Gradients of GRADIENTS. Bit i of `wanted` asks for the i-th; one that is not wanted, or whose argument is absent, is
# empty, in the dtype it would have (that of the argument; absent: fp32, float64 for float64).
_CHUNK_BWD = (
    f"(Tensor do, Tensor? dfinal_state, {_INPUTS}, int chunk_size, int wanted={ALL_GRADIENTS}, "
    "bool batch_invariant=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_GATE = "(Tensor g, Tensor? A_log, Tensor? dt_bias, float? lower_bound, ScalarType dtype) -> Tensor"

SCHEMAS = {
    "kda_gate_fwd": _GATE,
    "kda_gate_bwd": "(Tensor dy, Tensor g, Tensor? A_log, Tensor? dt_bias, float? lower_bound) "
    "-> (Tensor, Tensor, Tensor)",
    "kda_gate": _GATE,
    "chunk_fwd": _CHUNK,
    "chunk_bwd": _CHUNK_BWD,
    "chunk": _CHUNK,
    "prefill": _PREFILL,
    "decode": _DECODE,
    "decode_commit": _COMMIT,
    "decode_layer": _DECODE_LAYER,
}
REFERENCE = {
    "kda_gate_fwd": reference.kda_gate_fwd,
    "kda_gate_bwd": reference.kda_gate_bwd,
    "kda_gate": reference.kda_gate_fwd,
    "chunk_fwd": reference.chunk_fwd,
    "chunk_bwd": reference.chunk_bwd,
    "chunk": reference.chunk_fwd,
    "prefill": reference.prefill,
    "decode": reference.decode,
    "decode_commit": reference.decode_commit,
    "decode_layer": reference.decode_layer,
}
FUNCTIONAL = {"chunk": "chunk_fwd", "kda_gate": "kda_gate_fwd"}  # op with autograd -> its raw forward

NAMESPACE, NAMESPACE_REFERENCE, NAMESPACE_EMULATED = "kda_cuda", "kda_cuda_reference", "kda_cuda_emulated"
_libraries: list[torch.library.Library] = []  # an implementation lives as long as its library


# ---- fakes ---------------------------------------------------------------------------------------------------------


def _fake_gate_fwd(g, A_log, dt_bias, lower_bound, dtype):
    return g.new_empty(g.shape, dtype=dtype)


def _like_or_empty(x: Tensor | None, owner: Tensor) -> Tensor:
    return owner.new_empty(0, dtype=compute_dtype(owner.dtype)) if x is None else x.new_empty(x.shape)


def _fake_gate_bwd(dy, g, A_log, dt_bias, lower_bound):
    return g.new_empty(g.shape), _like_or_empty(A_log, g), _like_or_empty(dt_bias, g)


def _state_shape(q, v, cu_seqlens, v_first):
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dims = (v.shape[-1], q.shape[-1]) if v_first else (q.shape[-1], v.shape[-1])
    return (sequences, v.shape[2], *dims)


def _fake_chunk_fwd(
    q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale, use_qk_l2norm, use_gate, use_beta_sigmoid,
    allow_neg_eigval, lower_bound, state_v_first, output_final_state, chunk_size, output_chunk_states,
    chunk_state_rows=None, batch_invariant=False,
):  # fmt: skip
    dtype = compute_dtype(q.dtype)
    final_state = q.new_empty(0, dtype=dtype)
    if output_final_state:
        final_state = q.new_empty(_state_shape(q, v, cu_seqlens, state_v_first), dtype=dtype)
    h = k.new_empty(0)
    if output_chunk_states:
        _, *state = _state_shape(q, v, cu_seqlens, state_v_first)
        if cu_seqlens is None:
            rows = (q.shape[0], -(-q.shape[1] // chunk_size))
        else:
            rows = (1, chunk_state_rows if chunk_state_rows is not None else torch.library.get_ctx().new_dynamic_size())
        h = k.new_empty((*rows, *state))
    return v.new_empty(v.shape), final_state, h


def _fake_prefill(q, k, v, *rest):
    return v.new_empty(v.shape)


def _fake_in_place(*args):
    """Ops that return nothing and write only into their arguments."""


def _fake_chunk_bwd(
    do, dfinal_state, q, k, v, g, beta, A_log, dt_bias, initial_state, cu_seqlens, scale, use_qk_l2norm, use_gate,
    use_beta_sigmoid, allow_neg_eigval, lower_bound, state_v_first, chunk_size, wanted=ALL_GRADIENTS,
    batch_invariant=False,
):  # fmt: skip
    arguments = (q, k, v, g, beta, A_log, dt_bias, initial_state)
    like = (_like_or_empty(x, q) for x in arguments)
    return tuple(d if wanted >> bit & 1 else d.new_empty(0) for bit, d in enumerate(like))


FAKES: dict[str, Callable] = {
    "kda_gate_fwd": _fake_gate_fwd,
    "kda_gate_bwd": _fake_gate_bwd,
    "kda_gate": _fake_gate_fwd,
    "chunk_fwd": _fake_chunk_fwd,
    "chunk_bwd": _fake_chunk_bwd,
    "chunk": _fake_chunk_fwd,
    "prefill": _fake_prefill,
    "decode": _fake_in_place,
    "decode_commit": _fake_in_place,
    "decode_layer": _fake_in_place,
}

# ---- autograd ------------------------------------------------------------------------------------------------------


def _present(gradient: Tensor, argument) -> Tensor | None:
    return gradient if isinstance(argument, Tensor) else None


class _OnceDifferentiable(torch.autograd.Function):
    """Runs a backward under ``create_graph=True``: an error where its result is differentiated, never a wrong zero."""

    @staticmethod
    def forward(ctx, op, *args):
        ctx.op = op
        return op(*args)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op} has no derivative: second derivatives of kda_cuda's ops are not implemented")


def _backward(namespace: str, name: str, x: Tensor, args: tuple) -> tuple[Tensor, ...]:
    """The backward of the same namespace where it has one for this device, else the reference's."""
    from . import variants  # which imports this module for the names

    served_by, reason = variants.choose_backward(name, namespace, x)
    if served_by == NAMESPACE_REFERENCE != namespace:
        variants.warn_no_kernel(name, reason)
    op = variants.op_in(served_by, name)
    return _OnceDifferentiable.apply(op, *args) if torch.is_grad_enabled() else op(*args)


def _save_gate(ctx, inputs, output):
    g, A_log, dt_bias, ctx.lower_bound, _ = inputs
    ctx.save_for_backward(g, A_log, dt_bias)


def _gate_backward(namespace: str, ctx, dy):
    g, A_log, dt_bias = ctx.saved_tensors
    gradients = _backward(namespace, "kda_gate_bwd", g, (dy, g, A_log, dt_bias, ctx.lower_bound))
    return *(_present(d, x) for d, x in zip(gradients, (g, A_log, dt_bias), strict=True)), None, None


def _save_chunk(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:9])
    *ctx.options, _, ctx.chunk_size, _, _, ctx.batch_invariant = inputs[9:]
    ctx.set_materialize_grads(False)


def _chunk_backward(namespace: str, ctx, do, dfinal_state, dh):
    tensors = ctx.saved_tensors
    needed = ctx.needs_input_grad[: len(GRADIENTS)]
    wanted = mask_of(needed)
    if not wanted:
        return (None,) * len(ctx.needs_input_grad)
    v = tensors[2]
    do = v.new_zeros(v.shape) if do is None else rows_contiguous(do)
    if dfinal_state is not None:
        dfinal_state = dfinal_state.contiguous() if dfinal_state.numel() else None
    args = (do, dfinal_state, *tensors, *ctx.options, ctx.chunk_size, wanted, ctx.batch_invariant)
    gradients = _backward(namespace, "chunk_bwd", tensors[0], args)
    return *(d if needs else None for d, needs in zip(gradients, needed, strict=True)), *([None] * 13)


_AUTOGRAD = {"chunk": (_chunk_backward, _save_chunk), "kda_gate": (_gate_backward, _save_gate)}


# ---- registration --------------------------------------------------------------------------------------------------


def _functional_of(namespace: str, raw: str) -> Callable:
    """A functional op runs the raw forward of its namespace, whichever language that is written in."""

    def forward(*args):
        return getattr(getattr(torch.ops, namespace), raw)(*args)

    return forward


def _as_kernel(function: Callable) -> Callable:
    """A reference function as the dispatcher runs it: exact under autocast, and no graph of its own."""

    @functools.wraps(function)
    def kernel(*args):
        device = args[0].device.type
        with torch.no_grad():
            if not torch.is_autocast_enabled(device):
                return function(*args)
            with torch.autocast(device, enabled=False):
                return function(*args)

    return kernel


def define_namespace(namespace: str, reference_key: str | None) -> None:
    """Defines every op in ``namespace``; ``reference_key``: the dispatch key that gets the reference."""
    library = torch.library.Library(namespace, "DEF")
    _libraries.append(library)
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"{namespace}::{name}"
        torch.library.register_fake(qualified, FAKES[name], lib=library)
        if name in FUNCTIONAL:
            library.impl(name, _functional_of(namespace, FUNCTIONAL[name]), "CompositeExplicitAutograd")
            backward, setup_context = _AUTOGRAD[name]
            torch.library.register_autograd(
                qualified, functools.partial(backward, namespace), setup_context=setup_context, lib=library
            )
        elif reference_key:
            library.impl(name, _as_kernel(REFERENCE[name]), reference_key)


define_namespace(NAMESPACE, "CPU")
define_namespace(NAMESPACE_REFERENCE, "CompositeExplicitAutograd")
