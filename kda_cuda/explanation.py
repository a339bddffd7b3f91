"""``kda_cuda.explain``: who would serve a call, how, and why. Runs no op."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import calls, decoding, decoding_layer, ops, prefilling, variants
from .library import FUNCTIONAL
from .plans import ChunkShape, decode_plan
from .reference.chunk_bwd import mask_of

_BACKWARD = {forward: f"{op}_bwd" for op, raw in FUNCTIONAL.items() for forward in (op, raw)}  # op -> its backward
_FUNCTIONS = {
    **{name: getattr(ops, name) for name in ops.__all__},
    "prefill": prefilling.prefill,
    "decode": decoding.decode,
    "commit": decoding.commit,
    "decode_layer": decoding_layer.decode_layer,
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
        *args, **kwargs: those of the public function; they are checked as the function does.
        op: the public function: ``chunk_kda``, ``fused_recurrent_kda``, ``kda_gate``, ``prefill``, ``decode``,
            ``commit`` or ``decode_layer``.
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
    try:
        with variants.planning():
            _FUNCTIONS[op](*args, **kwargs)
    except variants.Planned as planned:
        call = planned
    x = call.arguments[0]
    namespace, reason = variants.choose(call.raw, x)
    kernel = variants.is_kernel(namespace, x)
    plan = _PLANS[call.raw](namespace, call.arguments) if kernel and call.raw in _PLANS else {}
    forward = Step(call.raw, namespace, kernel, reason, plan)
    if backward and call.raw not in _BACKWARD:
        raise ValueError(f"kda_cuda::explain: backward is True, expected False: {call.raw} has no backward")
    return Explanation(op, forward, _backward_step(call, namespace) if backward or call.op in FUNCTIONAL else None)


def _backward_step(call: variants.Planned, namespace: str) -> Step:
    name, x = _BACKWARD[call.raw], call.arguments[0]
    served_by, reason = variants.choose_backward(name, namespace, x)
    kernel = variants.is_kernel(served_by, x)
    plan = {}
    if kernel and name == "chunk_bwd":
        q, _, v = call.arguments[:3]
        plan = ChunkShape.of(q, v, call.arguments[8]).backward_plan(served_by, _wanted(call.arguments[:8]))
    return Step(name, served_by, kernel, reason, plan)


def _wanted(differentiable: tuple) -> int:
    """The mask of those that require a gradient; where none does, of all that are there."""
    given = [isinstance(x, Tensor) for x in differentiable]
    required = [there and x.requires_grad for there, x in zip(given, differentiable, strict=True)]
    return mask_of(required if torch.is_grad_enabled() and any(required) else given)


def _chunk_fwd_plan(namespace: str, arguments: tuple) -> dict[str, str]:
    q, _, v, *_ = arguments
    return ChunkShape.of(q, v, arguments[8]).forward_plan(namespace, arguments[17], arguments[20])


def _prefill_plan(namespace: str, arguments: tuple) -> dict[str, str]:
    q, _, v, *_ = arguments
    return ChunkShape.of(q, v, arguments[13]).forward_plan(namespace, prefilling.CHECKPOINT_TOKENS, arguments[24])


def _decode_plan(namespace: str, arguments: tuple) -> dict[str, str]:
    q, _, v = arguments[:3]
    state, new_state, cu_seqlens, v_first = (arguments[i] for i in (8, 10, 13, 23))
    sizes = (q.shape[1], calls.sequences_of(q, cu_seqlens), v.shape[2], q.shape[3], v.shape[3])
    return decode_plan(namespace, sizes, state, new_state, v_first)


def _commit_plan(namespace: str, arguments: tuple) -> dict[str, str]:
    state, _, new_state, _, k, u, _, _, cu_seqlens, v_first, _ = arguments
    sizes = (k.shape[1], calls.sequences_of(k, cu_seqlens), u.shape[2], k.shape[3], u.shape[3])
    return decode_plan(namespace, sizes, state, new_state, v_first)


def _layer_plan(namespace: str, arguments: tuple) -> dict[str, str]:
    batch, tokens, heads, dim = arguments[0].shape
    return decode_plan(namespace, (tokens, batch, heads, dim, dim), arguments[13], None, True, layer=True)


_PLANS = {  # raw op -> what its library says of a launch
    "chunk_fwd": _chunk_fwd_plan,
    "prefill": _prefill_plan,
    "decode": _decode_plan,
    "decode_commit": _commit_plan,
    "decode_layer": _layer_plan,
}
