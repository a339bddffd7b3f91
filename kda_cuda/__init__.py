"""Kimi Delta Attention: CUDA kernels as torch ops, a reference for every device, and a hybrid model on top."""

import os as _os

from . import library as _library  # defines torch.ops.kda_cuda before the kernels register with it
from . import variants as _variants
from .build_info import announce_reference_only as _announce_reference_only
from .build_info import build_info
from .build_info import load_ops as _load_ops

if _load_ops():
    _variants.find_kernels(_library.NAMESPACE)
_announce_reference_only()

from .decoding import DraftRecords, commit, decode  # noqa: E402
from .decoding_layer import decode_layer  # noqa: E402
from .explanation import explain  # noqa: E402
from .ops import chunk_kda, fused_recurrent_kda, kda_gate  # noqa: E402
from .plans import workspace_size  # noqa: E402
from .prefilling import prefill  # noqa: E402
from .surroundings import gated_rmsnorm, short_conv  # noqa: E402

if _os.environ.get("KDA_CUDA_EMULATE") == "1":
    from . import testing as _testing  # noqa: F401  (loads the emulated kernels)
if _os.environ.get("KDA_CUDA_FLA") == "1":
    from .integrations import fla as _fla

    _fla.register()

__version__ = "0.1.0"
__all__ = [
    "DraftRecords",
    "__version__",
    "build_info",
    "chunk_kda",
    "commit",
    "decode",
    "decode_layer",
    "explain",
    "fused_recurrent_kda",
    "gated_rmsnorm",
    "kda_gate",
    "prefill",
    "short_conv",
    "workspace_size",
]
