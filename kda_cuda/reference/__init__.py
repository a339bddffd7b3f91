"""KDA in plain PyTorch: the specification of the kernels, and what CPU tensors run.

Every function has the parameters of the op of the same name (``kda_cuda/library.py``). Inputs are never modified, but
for the pools of ``prefill``, and outputs never alias them. Sixteen-bit inputs are computed in fp32, float64 in float64.
"""

from .chunk_bwd import chunk_bwd
from .chunk_fwd import chunk_fwd
from .gates import kda_gate_bwd, kda_gate_fwd
from .prefill import prefill
from .recurrence import recurrent_fwd

__all__ = ["chunk_bwd", "chunk_fwd", "kda_gate_bwd", "kda_gate_fwd", "prefill", "recurrent_fwd"]
