"""``kda_cuda.explain``: who would serve a call, how, and why. Runs no op."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import calls, decoding, decoding_layer, ops, prefilling, surroundings, variants
from .calls import Call
from .plans import ChunkShape, decode_plan
from .reference.chunk_bwd import GRADIENTS, mask_of
from .schemas import FUNCTIONAL, Chunk, Commit, Decode, DecodeLayer, Prefill, raw_op

_FUNCTIONS = {
    **{name: getattr(ops, name) for name in ops.__all__},
    "prefill": prefilling.prefill,
    "decode": decoding.decode,
    "commit": decoding.commit,
    "decode_layer": decoding_layer.decode_layer,
    **{name: getattr(surroundings, name) for name in surroundings.__all__},
}


@dataclass(frozen=True)
class Step:
    """One op of a call."""

    op: str
    namespace: str  # torch.ops.<namespace>.<op>
    kernel: bool  # else the PyTorch reference
    reason: str
    plan: dict[str, str] = field(
        default_factory=dict
    )  # variant, grids, shared memory, workspace: where a kernel says so

    def __str__(self) -> str:
        text = f"{'kernel' if self.kernel else 'reference'}  torch.ops.{self.namespace}.{self.op}: {self.reason}"
        return text + "".join(f"\n      {name} {value}" for name, value in self.plan.items())


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` returns; its text says everything."""

    function: str
    forward: Step
    backward: Step | None  # None: no input needs a gradient

    def __str__(self) -> str:
        text = f"{self.function}\n  forward   {self.forward}"
        return text if self.backward is None else f"{text}\n  backward  {self.backward}"

    __repr__ = __str__


def explain(*args: Any, op: str = "chunk_kda", backward: bool = False, **kwargs: Any) -> Explanation:
    """Says which kernel would serve a call, how it would be launched, and why.

    Args:
        args, kwargs: those of the public function; they are checked as the function does.
        op: the public function: ``chunk_kda``, ``fused_recurrent_kda``, ``kda_gate``, ``prefill``, ``decode``,
            ``commit``, ``decode_layer``, ``short_conv`` or ``gated_rmsnorm``.
        backward: also explain the backward where no input requires a gradient, as if every one did.

    Returns:
        An :class:`Explanation`: print it, or read ``forward`` and ``backward``.

    Raises:
        ValueError, TypeError: those of the public function; ``backward`` of a call that has none.
        RuntimeError: inside ``kda_cuda.testing.emulated()``, that no emulated kernel serves the call.

    Example:
        >>> import torch, kda_cuda
        >>> x = torch.zeros(1, 100, 2, 64)
        >>> print(kda_cuda.explain(x, x, x, x, x[..., 0]))
        chunk_kda
          forward   reference  torch.ops.kda_cuda.chunk_fwd: CPU tensors run the PyTorch reference
    """
    if op not in _FUNCTIONS:
        raise ValueError(f"kda_cuda::explain: op is {op!r}, expected one of {list(_FUNCTIONS)}")
    call = _FUNCTIONS[op].bind(*args, **kwargs)
    raw = raw_op(call.op)
    namespace, reason = variants.choose(raw, call.owner)
    kernel = variants.is_kernel(namespace, call.owner)
    plan = _PLANS[raw](namespace, call.arguments) if kernel and raw in _PLANS else {}
    forward = Step(raw, namespace, kernel, reason, plan)
    if backward and raw not in _BACKWARD:
        raise ValueError(f"kda_cuda::explain: backward is True, expected False: {raw} has no backward")
    return Explanation(op, forward, _backward_step(call, namespace) if backward or call.op != raw else None)


def _backward_step(call: Call, namespace: str) -> Step:
    name = _BACKWARD[raw_op(call.op)]
    key_dim = call.arguments.q.shape[3] if name == "chunk_bwd" else None
    served_by, reason = variants.choose_backward(name, namespace, call.owner, key_dim)
    kernel = variants.is_kernel(served_by, call.owner)
    plan = _chunk_bwd_plan(served_by, call.arguments) if kernel and name == "chunk_bwd" else {}
    return Step(name, served_by, kernel, reason, plan)


def _chunk_fwd_plan(namespace: str, x: Chunk) -> dict[str, str]:
    return ChunkShape.of(x.q, x.v, x.cu_seqlens).forward_plan(namespace, x.chunk_size, x.batch_invariant)


def _chunk_bwd_plan(namespace: str, x: Chunk) -> dict[str, str]:
    """The plan for the gradients that are required; if none is, for those of all arguments given."""
    given = [isinstance(getattr(x, name), Tensor) for name in GRADIENTS]
    required = [there and getattr(x, name).requires_grad for name, there in zip(GRADIENTS, given, strict=True)]
    wanted = mask_of(required if torch.is_grad_enabled() and any(required) else given)
    return ChunkShape.of(x.q, x.v, x.cu_seqlens).backward_plan(namespace, wanted)


def _prefill_plan(namespace: str, x: Prefill) -> dict[str, str]:
    shape = ChunkShape.of(x.q, x.v, x.cu_seqlens)
    return shape.forward_plan(namespace, prefilling.CHECKPOINT_TOKENS, x.batch_invariant)


def _decode_plan(namespace: str, x: Decode) -> dict[str, str]:
    sizes = (x.q.shape[1], calls.sequences_of(x.q, x.cu_seqlens), x.v.shape[2], x.q.shape[3], x.v.shape[3])
    return decode_plan(namespace, sizes, x.state, x.new_state, x.state_v_first, tree=x.parent_token is not None)


def _commit_plan(namespace: str, x: Commit) -> dict[str, str]:
    k, u = x.record_k, x.record_u
    sizes = (k.shape[1], calls.sequences_of(k, x.cu_seqlens), u.shape[2], k.shape[3], u.shape[3])
    return decode_plan(namespace, sizes, x.state, x.new_state, x.state_v_first, tree=x.parent_token is not None)


def _layer_plan(namespace: str, x: DecodeLayer) -> dict[str, str]:
    batch, tokens, heads, dim = x.q.shape
    return decode_plan(namespace, (tokens, batch, heads, dim, dim), x.state, None, True, layer=True)


_BACKWARD = {raw: f"{raw.removesuffix('_fwd')}_bwd" for raw in FUNCTIONAL.values()}  # raw op -> its backward
_PLANS = {  # raw op -> what its library says of a launch
    "chunk_fwd": _chunk_fwd_plan,
    "prefill": _prefill_plan,
    "decode": _decode_plan,
    "decode_commit": _commit_plan,
    "decode_layer": _layer_plan,
}
