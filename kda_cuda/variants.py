"""Which implementation serves a call, and why: the one place that decides, and what :func:`explain` prints."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from . import build_info
from .library import NAMESPACE, NAMESPACE_EMULATED, NAMESPACE_REFERENCE

_emulating = os.environ.get("KDA_CUDA_EMULATE") == "1"
_warned: set[str] = set()


def set_emulating(on: bool) -> bool:
    """Whether CPU tensors go to the emulated kernels; returns what was set before. For :mod:`kda_cuda.testing`."""
    global _emulating
    before, _emulating = _emulating, on
    return before


def emulating() -> bool:
    return _emulating


def has_kernel(op: str, emulated: bool = False) -> bool:
    """Whether a compiled kernel of this op is loaded: the dispatcher knows."""
    namespace, key = (NAMESPACE_EMULATED, "CPU") if emulated else (NAMESPACE, "CUDA")
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{op}", key)


def warn_no_kernel(op: str, reason: str) -> None:
    """One warning per op that the reference runs on the GPU; KDA_CUDA_STRICT=1 makes it an error."""
    text = f"kda_cuda::{op} runs the PyTorch reference instead of a kernel: {reason}"
    if os.environ.get("KDA_CUDA_STRICT") == "1":
        raise RuntimeError(f"{text} (KDA_CUDA_STRICT=1)")
    if text not in _warned and not torch.compiler.is_compiling():
        _warned.add(text)
        warnings.warn(text, stacklevel=4)


@dataclass(frozen=True)
class Choice:
    """The namespace that serves a call and the reason."""

    op: str
    namespace: str
    reason: str
    kernel: bool

    def __str__(self) -> str:
        what = "kernel" if self.kernel else "reference"
        return f"{self.op}: {what} (torch.ops.{self.namespace}.{self.op}): {self.reason}"


def unserved(op: str, x: Tensor) -> str | None:
    """Why no kernel of ``op`` can serve tensors like ``x``; None if one can."""
    if not has_kernel(op, emulated=x.device.type == "cpu"):
        return "its kernel is not compiled in" if build_info.ops_library() else build_info.why_no_ops()
    if x.dtype == torch.float64:
        return "kernels take fp32, fp16 and bf16, not float64"
    return None


def choose(op: str, x: Tensor) -> Choice:
    """Decides for ``op`` on tensors like ``x``. Raises inside ``emulated()`` where no emulated kernel serves the call."""
    if x.device.type == "cpu":
        if not _emulating:
            return Choice(op, NAMESPACE, "CPU tensors run the PyTorch reference", False)
        reason = unserved(op, x)
        if reason:
            raise RuntimeError(f"kda_cuda::{op}: no emulated kernel serves this call: {reason}")
        return Choice(op, NAMESPACE_EMULATED, "the kernel, compiled for the CPU", True)
    if x.device.type == "cuda":
        reason = unserved(op, x)
        if reason:
            return Choice(op, NAMESPACE_REFERENCE, reason, False)
        return Choice(op, NAMESPACE, "compiled kernel", True)
    return Choice(op, NAMESPACE_REFERENCE, f"no kernel for {x.device.type} tensors", False)


def op_for(op: str, raw: str, x: Tensor):
    """The callable for functional op ``op`` whose forward kernel is ``raw``."""
    choice = choose(raw, x)
    if choice.namespace == NAMESPACE_REFERENCE and x.device.type == "cuda":
        warn_no_kernel(raw, choice.reason)
    return getattr(getattr(torch.ops, choice.namespace), op)


def explain(q: Tensor, op: str = "chunk_fwd") -> str:
    """Says what would serve ``op`` on tensors like ``q``.

    Args:
        q: a tensor of the device and dtype in question.
        op: ``chunk_fwd``, ``chunk_bwd``, ``kda_gate_fwd``, ``kda_gate_bwd`` or ``recurrent_fwd``.

    Example:
        >>> import torch, kda_cuda
        >>> print(kda_cuda.explain(torch.zeros(1)))
        chunk_fwd: reference (torch.ops.kda_cuda.chunk_fwd): CPU tensors run the PyTorch reference
    """
    return str(choose(op, q))
