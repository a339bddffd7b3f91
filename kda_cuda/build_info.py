"""The compiled parts of the package: where they are, what they were built for, and why they may be missing."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

_HERE = Path(__file__).parent


@functools.cache
def ops_library() -> Path | None:
    """``_ops.so`` if it was built: all kernels, through torch's stable ABI, for any Python and torch >= 2.10."""
    path = _HERE / "_ops.so"
    return path if path.exists() else None


def why_no_ops() -> str:
    return (
        f"this is a reference-only install ({_HERE / '_ops.so'} does not exist): "
        "build it with nvcc and KDA_CUDA_BUILD=require"
    )


def load_ops() -> bool:
    """Registers the kernels of ``_ops.so`` with torch, if there are any."""
    path = ops_library()
    if path is None:
        return False
    torch.ops.load_library(str(path))
    return True


def build_info() -> dict:
    """What the compiled extension says of itself: versions, architectures, and registers, shared memory and spills of
    every variant. ``{"ops": None}`` for a reference-only install; ``"c_extension"`` tells whether ``_C`` was loaded.
    """
    info: dict = {"ops": str(ops_library()) if ops_library() else None, "c_extension": False}
    try:
        from . import _C
    except ImportError as e:  # missing, or built for another Python: every call is then checked (recipes.py)
        info["c_extension_error"] = str(e)
        return info
    info.update(_C.build_info(), c_extension=True)
    return info


def announce_reference_only() -> None:
    """Says once, loudly, that a package built with KDA_CUDA_BUILD=off has no kernels."""
    import warnings

    if (_HERE / "_reference_only.txt").exists() and os.environ.get("KDA_CUDA_QUIET") != "1":
        warnings.warn(f"kda_cuda: {(_HERE / '_reference_only.txt').read_text().strip()}", stacklevel=3)
