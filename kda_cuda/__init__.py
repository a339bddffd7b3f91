"""Kimi Delta Attention: CUDA kernels as torch ops, a reference for every device, and a hybrid model on top."""

from . import build_info as _build_info
from . import library as _library  # noqa: F401  (defines torch.ops.kda_cuda before the kernels register with it)

_build_info.load_ops()
_build_info.announce_reference_only()

from .build_info import build_info  # noqa: E402
from .ops import chunk_kda, fused_recurrent_kda, kda_gate  # noqa: E402
from .variants import explain  # noqa: E402

__version__ = "0.1.0"
__all__ = ["__version__", "build_info", "chunk_kda", "explain", "fused_recurrent_kda", "kda_gate"]
