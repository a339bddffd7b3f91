"""The compiled libraries, for what is asked of them beside the ops: plain C functions."""

from __future__ import annotations

import contextlib
import ctypes

import torch
from torch import Tensor

from .build_info import ops_library
from .schemas import NAMESPACE

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/kda/dtype.h
_loaded: dict[str, ctypes.CDLL] = {}
_fits: dict[tuple, bool] = {}


def register(namespace: str, library: ctypes.CDLL) -> None:
    """Names the library that implements a namespace; that of ``kda_cuda`` is found without."""
    _loaded[namespace] = library


def compiled(namespace: str) -> ctypes.CDLL:
    if namespace not in _loaded and namespace == NAMESPACE:
        register(namespace, ctypes.CDLL(str(ops_library())))
    return _loaded[namespace]


def on_device(device: torch.device | None) -> contextlib.AbstractContextManager:
    """Inside, the library's questions are about this GPU."""
    return torch.cuda.device(device) if device is not None and device.type == "cuda" else contextlib.nullcontext()


def backward_fits(namespace: str, x: Tensor, key_dim: int) -> bool:
    """Whether a block of the device has the shared memory of the chunkwise backward, for the dtype of ``x``."""
    key = (x.device, x.dtype, key_dim)
    if x.is_cuda and key in _fits:
        return _fits[key]
    function = getattr(compiled(namespace), "kda_chunk_bwd_fits", None)
    if function is None:
        return True
    with on_device(x.device):
        fits = bool(function(DTYPE_CODES[x.dtype], key_dim))
    if x.is_cuda:
        _fits[key] = fits
    return fits
