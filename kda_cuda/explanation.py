"""``kda_cuda.explain``: who would serve a call, how, and why. Runs no op."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import ops, variants
from .build_info import ops_library
from .library import NAMESPACE_EMULATED

_BACKWARD = {"chunk": "chunk_bwd", "kda_gate": "kda_gate_bwd"}
_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/kda/dtype.h


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
        op: the public function: ``chunk_kda``, ``fused_recurrent_kda`` or ``kda_gate``.

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
    if op not in ops.__all__:
        raise ValueError(f"kda_cuda::explain: op is {op!r}, expected one of {ops.__all__}")
    try:
        with variants.planning():
            getattr(ops, op)(*args, **kwargs)
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


@functools.cache
def _compiled(namespace: str) -> ctypes.CDLL:
    if namespace == NAMESPACE_EMULATED:
        from .testing import load_emulator

        return load_emulator()
    return ctypes.CDLL(str(ops_library()))


def _chunk_fwd_plan(namespace: str, arguments: tuple) -> dict[str, str]:
    """What the library itself would choose on the current device (csrc/torch/plans.cpp)."""
    q, _, v, *_ = arguments
    cu_seqlens: Tensor | None = arguments[8]
    chunk_size = arguments[17]
    function = getattr(_compiled(namespace), "kda_plan_chunk_fwd", None)
    if function is None:
        return {"plan": "unknown: the library was built before explain() could ask it"}
    sequences = -1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = (q.shape[0], q.shape[1], sequences, v.shape[2], q.shape[3], v.shape[3], chunk_size)
    types = [ctypes.c_int, *[ctypes.c_longlong] * 2, *[ctypes.c_int] * 5, ctypes.c_char_p, ctypes.c_int]
    function.argtypes = types
    text = ctypes.create_string_buffer(1024)
    written = function(_DTYPE_CODES[q.dtype], *sizes, text, len(text))
    if written <= 0:
        return {"plan": "none: no variant fits this device" if written == 0 else "unknown: the device cannot be asked"}
    return dict(pair.split("=", 1) for pair in text.value.decode().split())


_PLANS = {"chunk_fwd": _chunk_fwd_plan}  # raw op -> what its library says of a launch
