"""Which implementation serves a call, and why: the one place that decides, and what ``explain`` prints."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .build_info import ops_library, why_no_ops
from .native import backward_fits
from .schemas import NAMESPACE, NAMESPACE_EMULATED, NAMESPACE_REFERENCE, SCHEMAS

_kernels: dict[str, frozenset[str]] = {NAMESPACE: frozenset(), NAMESPACE_EMULATED: frozenset()}
_warned: set[str] = set()
_WITHOUT_OPS = None if ops_library() else why_no_ops()
_EMULATE = os.environ.get("KDA_CUDA_EMULATE") == "1"
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Emulation(threading.local):
    """Whether a thread emulates. A context variable would not do: torch.compile cannot read one, and guards this."""

    def __init__(self):
        self.on = _EMULATE


_emulation = _Emulation()


def set_emulating(on: bool) -> bool:
    """Whether CPU tensors of this thread go to the emulated kernels; returns what was set before. For
    :mod:`kda_cuda.testing`."""
    before, _emulation.on = _emulation.on, on
    return before


def emulating() -> bool:
    return _emulation.on


def find_kernels(namespace: str) -> None:
    """Asks the dispatcher which ops a library just loaded implements: once, which torch.compile needs."""
    key = "CPU" if namespace == NAMESPACE_EMULATED else "CUDA"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    _kernels[namespace] = frozenset(op for op in SCHEMAS if has_kernel(f"{namespace}::{op}", key))


def kernels(namespace: str) -> frozenset[str]:
    """The ops of a namespace that a loaded library implements."""
    return _kernels[namespace]


def unserved(op: str, x: Tensor) -> str | None:
    """Why no kernel of ``op`` can serve tensors like ``x``; None if one can."""
    namespace = NAMESPACE_EMULATED if x.device.type == "cpu" else NAMESPACE
    if op not in _kernels[namespace]:
        return _WITHOUT_OPS if _WITHOUT_OPS and namespace == NAMESPACE else "no kernel of it is compiled in"
    if x.dtype not in KERNEL_DTYPES:
        return f"kernels take float32, float16 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    return None


def choose(op: str, x: Tensor) -> tuple[str, str]:
    """The namespace that serves ``op`` on tensors like ``x``, and the reason.

    Raises inside ``emulated()`` where no emulated kernel serves the call.
    """
    if x.device.type == "cpu":
        if not emulating():
            return NAMESPACE, "CPU tensors run the PyTorch reference"
        reason = unserved(op, x)
        if reason:
            raise RuntimeError(f"kda_cuda::{op}: no emulated kernel serves this call: {reason}")
        return NAMESPACE_EMULATED, "the kernel, compiled for the CPU"
    if x.device.type == "cuda":
        reason = unserved(op, x)
        return (NAMESPACE_REFERENCE, reason) if reason else (NAMESPACE, "compiled kernel")
    return NAMESPACE_REFERENCE, f"no kernel for {x.device.type} tensors"


def choose_backward(op: str, namespace: str, x: Tensor, key_dim: int | None = None) -> tuple[str, str]:
    """The same for the backward of a call that ``namespace`` served: its own, or the reference on the same device.

    ``key_dim``: of a chunkwise call, whose kernels not every device has the shared memory for.
    """
    if not is_kernel(namespace, x):
        return namespace, "the forward runs the PyTorch reference"
    if op not in _kernels[namespace]:
        return NAMESPACE_REFERENCE, "its backward kernel is not compiled in"
    if key_dim is not None and not backward_fits(namespace, x, key_dim):
        dtype = str(x.dtype).removeprefix("torch.")
        return NAMESPACE_REFERENCE, f"this device has too little shared memory per block for {dtype} and K={key_dim}"
    return namespace, "compiled kernel"


def warn_no_kernel(op: str, reason: str) -> None:
    """One warning per op that the reference runs on the GPU; KDA_CUDA_STRICT=1 makes it an error."""
    text = f"kda_cuda::{op} runs the PyTorch reference instead of a kernel: {reason}"
    if os.environ.get("KDA_CUDA_STRICT") == "1":
        raise RuntimeError(f"{text} (KDA_CUDA_STRICT=1)")
    if not torch.compiler.is_compiling() and text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=4)


def op_in(namespace: str, op: str) -> Callable:
    return getattr(getattr(torch.ops, namespace), op).default


def is_kernel(namespace: str, x: Tensor) -> bool:
    """Whether ``namespace`` serves tensors like ``x`` with a compiled kernel."""
    return namespace == NAMESPACE_EMULATED or (namespace == NAMESPACE and x.is_cuda)


def serves(op: str, x: Tensor) -> bool:
    """Whether a kernel runs ``op`` on tensors like ``x``."""
    wants_kernel = x.device.type == "cuda" or (x.device.type == "cpu" and emulating())
    return wants_kernel and unserved(op, x) is None


def prefers_chunks(x: Tensor) -> bool:
    """Whether a few tokens like ``x`` have a chunkwise kernel but no decoding one."""
    return serves("chunk_fwd", x) and not serves("decode", x)
