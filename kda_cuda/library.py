"""The torch ops: fakes, autograd and registration, said once for three namespaces.

``kda_cuda``            CPU key: the reference; CUDA key: the kernels of ``_ops.so`` (implementations only, no schemas)
``kda_cuda_reference``  the reference on any device: what CUDA tensors run where no kernel serves them
``kda_cuda_emulated``   CPU key: the kernels compiled for the CPU, in tests only (:mod:`kda_cuda.testing`)

Raw ops (``*_fwd``, ``*_bwd``) carry no autograd; those of ``FUNCTIONAL`` do and save nothing but their inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import reference, variants
from .reference.chunk_bwd import GRADIENTS, mask_of
from .reference.gates import compute_dtype
from .schemas import (
    FUNCTIONAL,
    NAMESPACE,
    NAMESPACE_EMULATED,
    NAMESPACE_REFERENCE,
    SCHEMAS,
    Chunk,
    ChunkBwd,
    Conv,
    ConvBwd,
    Gate,
    GateBwd,
    Norm,
    NormBwd,
    Prefill,
    picker,
)

__all__ = [
    "FUNCTIONAL",
    "NAMESPACE",
    "NAMESPACE_EMULATED",
    "NAMESPACE_REFERENCE",
    "SCHEMAS",
    "backward_op",
    "define_namespace",
    "runner",
]

REFERENCE = {
    "kda_gate_fwd": reference.kda_gate_fwd,
    "kda_gate_bwd": reference.kda_gate_bwd,
    "short_conv_fwd": reference.short_conv_fwd,
    "short_conv_bwd": reference.short_conv_bwd,
    "gated_rmsnorm_fwd": reference.gated_rmsnorm_fwd,
    "gated_rmsnorm_bwd": reference.gated_rmsnorm_bwd,
    "chunk_fwd": reference.chunk_fwd,
    "chunk_bwd": reference.chunk_bwd,
    "prefill": reference.prefill,
    "decode": reference.decode,
    "decode_commit": reference.decode_commit,
    "decode_layer": reference.decode_layer,
}
_libraries: list[torch.library.Library] = []  # an implementation lives as long as its library


# ---- fakes ---------------------------------------------------------------------------------------------------------


def _fake_gate_fwd(*arguments):
    x = Gate(*arguments)
    return x.g.new_empty(x.g.shape, dtype=x.dtype)


def _like_or_empty(x: Tensor | None, owner: Tensor) -> Tensor:
    return owner.new_empty(0, dtype=compute_dtype(owner.dtype)) if x is None else x.new_empty(x.shape)


def _fake_gate_bwd(*arguments):
    x = GateBwd(*arguments)
    return tuple(_like_or_empty(y, x.g) for y in (x.g, x.A_log, x.dt_bias))


def _empty_like(x: Tensor | None, owner: Tensor) -> Tensor:
    return owner.new_empty(0) if x is None else x.new_empty(x.shape)


def _fake_conv_fwd(*arguments):
    x = Conv(*arguments)
    ys = tuple(_empty_like(stream, x.x) for stream in x[:3])
    if not x.output_final_state:
        return *ys, x.x.new_empty(0)
    sequences = x.x.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
    owner = x.x if x.initial_state is None else x.initial_state
    return *ys, owner.new_empty((sequences, x.weight.shape[0], x.weight.shape[1] - 1))


def _fake_conv_bwd(*arguments):
    x = ConvBwd(*arguments)
    return tuple(_empty_like(y, x.x) for y in x[4:10])


def _fake_norm_fwd(*arguments):
    x = Norm(*arguments).x
    return x.new_empty(x.shape)


def _fake_norm_bwd(*arguments):
    return tuple(y.new_empty(y.shape) for y in NormBwd(*arguments)[1:4])


def _fake_chunk_fwd(*arguments):
    x = Chunk(*arguments)
    q, k, v = x.q, x.k, x.v
    dtype = compute_dtype(q.dtype)
    matrix = (v.shape[-1], q.shape[-1]) if x.state_v_first else (q.shape[-1], v.shape[-1])
    final_state, h = q.new_empty(0, dtype=dtype), k.new_empty(0)
    if x.output_final_state:
        sequences = q.shape[0] if x.cu_seqlens is None else x.cu_seqlens.shape[0] - 1
        final_state = q.new_empty((sequences, v.shape[2], *matrix), dtype=dtype)
    if x.output_chunk_states:
        if x.cu_seqlens is None:
            rows = (q.shape[0], -(-q.shape[1] // x.chunk_size))
        else:
            known = x.chunk_state_rows
            rows = (1, known if known is not None else torch.library.get_ctx().new_dynamic_size())
        h = k.new_empty((*rows, v.shape[2], *matrix))
    return v.new_empty(v.shape), final_state, h


def _fake_chunk_bwd(*arguments):
    x = ChunkBwd(*arguments)
    like = (_like_or_empty(getattr(x, name), x.q) for name in GRADIENTS)
    return tuple(d if x.wanted >> bit & 1 else d.new_empty(0) for bit, d in enumerate(like))


def _fake_prefill(*arguments):
    v = Prefill(*arguments).v
    return v.new_empty(v.shape)


def _fake_in_place(*arguments):
    """Ops that return nothing and write only into their arguments."""


FAKES: dict[str, Callable] = {
    "kda_gate_fwd": _fake_gate_fwd,
    "kda_gate_bwd": _fake_gate_bwd,
    "kda_gate": _fake_gate_fwd,
    "short_conv_fwd": _fake_conv_fwd,
    "short_conv_bwd": _fake_conv_bwd,
    "short_conv": _fake_conv_fwd,
    "gated_rmsnorm_fwd": _fake_norm_fwd,
    "gated_rmsnorm_bwd": _fake_norm_bwd,
    "gated_rmsnorm": _fake_norm_fwd,
    "chunk_fwd": _fake_chunk_fwd,
    "chunk_bwd": _fake_chunk_bwd,
    "chunk": _fake_chunk_fwd,
    "prefill": _fake_prefill,
    "decode": _fake_in_place,
    "decode_commit": _fake_in_place,
    "decode_layer": _fake_in_place,
}

# ---- autograd ------------------------------------------------------------------------------------------------------


class _OnceDifferentiable(torch.autograd.Function):
    """Runs a backward under ``create_graph=True``: an error where its result is differentiated, never a wrong zero."""

    @staticmethod
    def forward(ctx, op, *args):
        ctx.op = op
        return op(*args)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(f"{ctx.op} has no derivative: second derivatives of kda_cuda's ops are not implemented")


def backward_op(namespace: str, name: str, x: Tensor, key_dim: int | None = None) -> Callable:
    """The backward of the same namespace where it has one for this device, else the reference's."""
    served_by, reason = variants.choose_backward(name, namespace, x, key_dim)
    if served_by == NAMESPACE_REFERENCE != namespace:
        variants.warn_no_kernel(name, reason)
    return variants.op_in(served_by, name)


def _backward(namespace: str, name: str, x: Tensor, arguments: tuple, key_dim: int | None = None) -> tuple[Tensor, ...]:
    op = backward_op(namespace, name, x, key_dim)
    return _OnceDifferentiable.apply(op, *arguments) if torch.is_grad_enabled() else op(*arguments)


class _Saved:
    """What a backward takes of its forward's arguments, by name, and the order in which gradients go back to them."""

    def __init__(self, forward: type[tuple], backward: type[tuple], differentiable: tuple[str, ...]):
        shared = [name for name in forward._fields if name in backward._fields]
        tensors = [name for name in shared if name in (*differentiable, "cu_seqlens")]
        options = [name for name in shared if name not in tensors]
        given = [name for name in backward._fields if name not in shared]

        def pick(of: Sequence[str], names: Sequence[str]) -> Callable[[tuple], tuple]:
            return picker(of.index(name) for name in names)

        self._forward, self._backward = forward, backward
        self._tensors, self._options = pick(forward._fields, tensors), pick(forward._fields, options)
        self._arguments = pick((*given, *tensors, *options), backward._fields)
        self._needed = pick(forward._fields, differentiable)
        self._gradients = pick((*differentiable, *forward._fields), forward._fields)
        self._absent = (None,) * len(forward._fields)

    def save(self, ctx, inputs, output) -> None:
        ctx.save_for_backward(*self._tensors(inputs))
        ctx.options = self._options(inputs)
        ctx.set_materialize_grads(False)

    def arguments(self, ctx, *given) -> tuple:
        """Those of the backward. ``given``: what the forward did not have, in the order of the backward."""
        return self._backward._make(self._arguments((*given, *ctx.saved_tensors, *ctx.options)))

    def needed(self, ctx) -> tuple[bool, ...]:
        """Whether each differentiable argument needs a gradient."""
        return self._needed(ctx.needs_input_grad)

    def gradients(self, ctx, gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        """One for each argument of the forward; None where none is needed."""
        wanted = tuple([d if needs else None for needs, d in zip(self.needed(ctx), gradients, strict=True)])
        return self._gradients(wanted + self._absent)


_GATE, _CHUNK = _Saved(Gate, GateBwd, ("g", "A_log", "dt_bias")), _Saved(Chunk, ChunkBwd, GRADIENTS)
_CONV = _Saved(Conv, ConvBwd, ("x", "x2", "x3", "weight", "bias", "initial_state"))
_NORM = _Saved(Norm, NormBwd, ("x", "gate", "weight"))


def _gate_backward(namespace: str, ctx, dy):
    if dy is None:
        return (None,) * len(Gate._fields)
    arguments = _GATE.arguments(ctx, dy)
    return _GATE.gradients(ctx, _backward(namespace, "kda_gate_bwd", arguments.g, arguments))


def _conv_backward(namespace: str, ctx, *gradients):
    if all(d is None for d in gradients):
        return (None,) * len(Conv._fields)
    *dys, dfinal_state = gradients
    if dfinal_state is not None and dfinal_state.numel() == 0:
        dfinal_state = None
    arguments = _CONV.arguments(ctx, *dys, dfinal_state)
    streams = (arguments.x, arguments.x2, arguments.x3)
    for i, x in enumerate(streams):  # an absent stream has an empty output, which may have a gradient
        dys[i] = None if x is None else x.new_zeros(x.shape) if dys[i] is None else dys[i]
    arguments = arguments._replace(dy=dys[0], dy2=dys[1], dy3=dys[2])
    return _CONV.gradients(ctx, _backward(namespace, "short_conv_bwd", arguments.x, arguments))


def _norm_backward(namespace: str, ctx, dy):
    if dy is None:
        return (None,) * len(Norm._fields)
    arguments = _NORM.arguments(ctx, dy)
    return _NORM.gradients(ctx, _backward(namespace, "gated_rmsnorm_bwd", arguments.x, arguments))


def _chunk_backward(namespace: str, ctx, do, dfinal_state, dh):
    wanted = mask_of(_CHUNK.needed(ctx))
    if not wanted or (do is None and dfinal_state is None):
        return (None,) * len(Chunk._fields)
    if dfinal_state is not None and dfinal_state.numel() == 0:
        dfinal_state = None
    arguments = _CHUNK.arguments(ctx, do, dfinal_state, wanted)
    v = arguments.v
    if do is None:
        arguments = arguments._replace(do=v.new_zeros(v.shape))
    return _CHUNK.gradients(ctx, _backward(namespace, "chunk_bwd", v, arguments, arguments.q.shape[3]))


_AUTOGRAD = {
    "chunk": (_chunk_backward, _CHUNK.save),
    "kda_gate": (_gate_backward, _GATE.save),
    "short_conv": (_conv_backward, _CONV.save),
    "gated_rmsnorm": (_norm_backward, _NORM.save),
}


@functools.cache
def _autograd_function(namespace: str, name: str) -> type[torch.autograd.Function]:
    """The op with autograd as eager calls run it: the same forward, backward and context as in the registered op.

    What torch.library wraps around the latter reads the schema anew for every argument of every call, which takes the
    host longer than everything else of a forward (findings/torch_custom_op_autograd_cost.sh).
    """
    backward, save = _AUTOGRAD[name]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            results = variants.op_in(namespace, FUNCTIONAL[name])(*args)
            save(ctx, args, results)
            return results

        @staticmethod
        def backward(ctx, *gradients):
            return backward(namespace, ctx, *gradients)

    Function.__name__ = Function.__qualname__ = f"{namespace}_{name}"
    return Function


def runner(namespace: str, op: str) -> Callable:
    """What runs ``op``, here and now."""
    if op in FUNCTIONAL and not torch.compiler.is_compiling():
        return _autograd_function(namespace, op).apply
    return variants.op_in(namespace, op)


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
