"""KDA in plain PyTorch: the specification of the kernels, and what CPU tensors run.

Every function has the parameters of the op of the same name (``kda_cuda/library.py``). Inputs are never modified and
outputs never alias them, but for what an op's schema declares to be written. Sixteen-bit inputs are computed in fp32,
float64 in float64.
"""

from .chunk_bwd import chunk_bwd
from .chunk_fwd import chunk_fwd
from .decode import decode, decode_commit
from .decode_layer import decode_layer
from .gated_rmsnorm import gated_rmsnorm_bwd, gated_rmsnorm_fwd
from .gates import kda_gate_bwd, kda_gate_fwd
from .prefill import prefill
from .short_conv import short_conv_bwd, short_conv_fwd

__all__ = [
    "chunk_bwd",
    "chunk_fwd",
    "decode",
    "decode_commit",
    "decode_layer",
    "gated_rmsnorm_bwd",
    "gated_rmsnorm_fwd",
    "kda_gate_bwd",
    "kda_gate_fwd",
    "prefill",
    "short_conv_bwd",
    "short_conv_fwd",
]
