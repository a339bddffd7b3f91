"""``kda_cuda.explain``: who would serve a call, how, and why. Runs no op."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from . import calls, decoding, decoding_layer, ops, prefilling, variants
from .plans import ChunkCall, decode_plan

_BACKWARD = {"chunk": "chunk_bwd", "kda_gate": "kda_gate_bwd"}
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


def explain(*args: Any, op: str = "chunk_kda", **kwargs: Any) -> Explanation:
    """Says which kernel would serve a call, how it would be launched, and why.

    Args:
        *args, **kwargs: those of the public function; they are checked as the function does.
        op: the public function: ``chunk_kda``, ``fused_recurrent_kda``, ``kda_gate``, ``prefill``, ``decode``,
            ``commit`` or ``decode_layer``.

    Returns:
        An :class:`Explanation`: print it, or read ``forward`` and ``backward``.

    Raises:
        ValueError, TypeError: those of the public function.
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
    backward = None
    if call.op in _BACKWARD:
        name = _BACKWARD[call.op]
        served_by, reason = variants.choose_backward(name, namespace, x)
        backward = Step(name, served_by, variants.is_kernel(served_by, x), reason)
    return Explanation(op, forward, backward)


def _chunk_fwd_plan(namespace: str, arguments: tuple) -> dict[str, str]:
    q, _, v, *_ = arguments
    return ChunkCall.of(q, v, arguments[8], arguments[17], arguments[20]).plan(namespace)


def _prefill_plan(namespace: str, arguments: tuple) -> dict[str, str]:
    q, _, v, *_ = arguments
    return ChunkCall.of(q, v, arguments[13], prefilling.CHECKPOINT_TOKENS, arguments[24]).plan(namespace)


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
