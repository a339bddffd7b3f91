"""What every torch op takes, said once: its schema, in torch's own language, and a NamedTuple of its argument names.

``Tensor(a!)`` is an argument that the op writes. Fakes, autograd, ``explain`` and the calls themselves use the names.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterable
from operator import itemgetter

import torch

from .reference.chunk_bwd import ALL_GRADIENTS

NAMESPACE, NAMESPACE_REFERENCE, NAMESPACE_EMULATED = "kda_cuda", "kda_cuda_reference", "kda_cuda_emulated"

_STREAMS = "Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? A_log, Tensor? dt_bias"
_OPTIONS = (
    "float scale, bool use_qk_l2norm, bool use_gate, bool use_beta_sigmoid, bool allow_neg_eigval, float? lower_bound, "
    "bool state_v_first"
)
_SEQUENCES = f"{_STREAMS}, Tensor? initial_state, Tensor? cu_seqlens, {_OPTIONS}"
_CHUNK = (
    f"({_SEQUENCES}, bool output_final_state, int chunk_size, bool output_chunk_states, SymInt? chunk_state_rows=None, "
    "bool batch_invariant=False) -> (Tensor, Tensor, Tensor)"
)
# Returns the gradients of GRADIENTS. Bit i of `wanted` asks for the i-th; one that is not wanted, or whose argument is
# absent, is empty, in the dtype it would have (that of the argument; absent: fp32, float64 for float64).
_CHUNK_BWD = (
    f"(Tensor do, Tensor? dfinal_state, {_SEQUENCES}, int chunk_size, int wanted={ALL_GRADIENTS}, "
    "bool batch_invariant=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_PREFILL = (
    f"({_STREAMS}, Tensor(a!) state_pool, Tensor? slot_of, Tensor? initial_slot_of, Tensor? has_initial_state, "
    "Tensor(b!)? checkpoint_pool, Tensor? checkpoint_slots, Tensor? cu_seqlens, Tensor(c!)? workspace, "
    f"{_OPTIONS}, bool zero_is_null, int checkpoint_interval, bool batch_invariant) -> Tensor"
)
_DECODE = (  # every state is [slots, HV, V, K] or [slots, HV, K, V]; nothing is allocated
    f"({_STREAMS}, Tensor(a!) out, Tensor(b!)? state, Tensor? slot_of, Tensor(c!)? new_state, Tensor? new_slot_of, "
    "Tensor? num_accepted_tokens, Tensor? cu_seqlens, Tensor? parent_token, Tensor(d!)? record_k, "
    f"Tensor(e!)? record_u, Tensor(f!)? record_g, {_OPTIONS}, bool in_place, bool state_per_token, "
    "bool zero_is_null) -> ()"
)
_COMMIT = (
    "(Tensor(a!) state, Tensor? slot_of, Tensor(b!)? new_state, Tensor? new_slot_of, Tensor record_k, "
    "Tensor record_u, Tensor record_g, Tensor? num_accepted_tokens, Tensor? cu_seqlens, Tensor? parent_token, "
    "Tensor? accepted_token, bool state_v_first, bool zero_is_null) -> ()"
)
_DECODE_LAYER = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor output_gate, Tensor(a!) conv_state, "
    "Tensor q_conv_weight, Tensor k_conv_weight, Tensor v_conv_weight, Tensor? A_log, Tensor? dt_bias, "
    "Tensor norm_weight, Tensor(b!) state, Tensor? slot_of, Tensor(c!) out, float scale, bool allow_neg_eigval, "
    "float? lower_bound, float norm_eps, bool zero_is_null) -> ()"
)
_GATE = "(Tensor g, Tensor? A_log, Tensor? dt_bias, float? lower_bound, ScalarType dtype) -> Tensor"
_GATE_BWD = "(Tensor dy, Tensor g, Tensor? A_log, Tensor? dt_bias, float? lower_bound) -> (Tensor, Tensor, Tensor)"
# Streams x, x2 and x3 have their channels side by side in weight, bias and states. With cu_seqlens they are
# [1, tokens, D]. Returns an output for each, and the final state; empty where absent or not asked for.
_CONV_STREAMS = "Tensor x, Tensor? x2, Tensor? x3, Tensor weight, Tensor? bias, Tensor? initial_state"
_CONV = f"({_CONV_STREAMS}, Tensor? cu_seqlens, bool silu, bool output_final_state) -> (Tensor, Tensor, Tensor, Tensor)"
# Returns the gradients of x, x2, x3, weight, bias and initial_state. That of an absent argument is empty, in x's dtype.
_CONV_BWD = (
    f"(Tensor dy, Tensor? dy2, Tensor? dy3, Tensor? dfinal_state, {_CONV_STREAMS}, Tensor? cu_seqlens, bool silu) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_NORM = "(Tensor x, Tensor gate, Tensor weight, float eps, bool silu) -> Tensor"  # silu: else sigmoid
_NORM_BWD = "(Tensor dy, Tensor x, Tensor gate, Tensor weight, float eps, bool silu) -> (Tensor, Tensor, Tensor)"

SCHEMAS = {
    "kda_gate_fwd": _GATE,
    "kda_gate_bwd": _GATE_BWD,
    "kda_gate": _GATE,
    "short_conv_fwd": _CONV,
    "short_conv_bwd": _CONV_BWD,
    "short_conv": _CONV,
    "gated_rmsnorm_fwd": _NORM,
    "gated_rmsnorm_bwd": _NORM_BWD,
    "gated_rmsnorm": _NORM,
    "chunk_fwd": _CHUNK,
    "chunk_bwd": _CHUNK_BWD,
    "chunk": _CHUNK,
    "prefill": _PREFILL,
    "decode": _DECODE,
    "decode_commit": _COMMIT,
    "decode_layer": _DECODE_LAYER,
}
FUNCTIONAL = {  # op with autograd -> its raw forward
    "chunk": "chunk_fwd",
    "kda_gate": "kda_gate_fwd",
    "short_conv": "short_conv_fwd",
    "gated_rmsnorm": "gated_rmsnorm_fwd",
}


def raw_op(op: str) -> str:
    """The op without autograd that ``op`` runs."""
    return FUNCTIONAL.get(op, op)


def picker(positions: Iterable[int]) -> Callable[[tuple], tuple]:
    """What makes of a tuple the tuple of the items at ``positions``."""
    first, *others = positions
    return itemgetter(first, *others) if others else lambda of: (of[first],)


def _arguments(name: str, schema: str) -> type[tuple]:
    """The NamedTuple of a schema's arguments, with their defaults."""
    parsed = torch._C.parse_schema(f"{NAMESPACE}::{name}{schema}").arguments
    defaults = [a.default_value for a in parsed if a.has_default_value()]
    return namedtuple(name, [a.name for a in parsed], defaults=defaults, module=__name__)


Inputs = _arguments("Inputs", f"({_STREAMS}, Tensor? cu_seqlens, {_OPTIONS}) -> ()")  # shared by ops on sequences
Gate = _arguments("Gate", _GATE)
GateBwd = _arguments("GateBwd", _GATE_BWD)
Conv = _arguments("Conv", _CONV)
ConvBwd = _arguments("ConvBwd", _CONV_BWD)
Norm = _arguments("Norm", _NORM)
NormBwd = _arguments("NormBwd", _NORM_BWD)
Chunk = _arguments("Chunk", _CHUNK)
ChunkBwd = _arguments("ChunkBwd", _CHUNK_BWD)
Prefill = _arguments("Prefill", _PREFILL)
Decode = _arguments("Decode", _DECODE)
Commit = _arguments("Commit", _COMMIT)
DecodeLayer = _arguments("DecodeLayer", _DECODE_LAYER)

ARGUMENTS = {
    "kda_gate_fwd": Gate,
    "kda_gate_bwd": GateBwd,
    "kda_gate": Gate,
    "short_conv_fwd": Conv,
    "short_conv_bwd": ConvBwd,
    "short_conv": Conv,
    "gated_rmsnorm_fwd": Norm,
    "gated_rmsnorm_bwd": NormBwd,
    "gated_rmsnorm": Norm,
    "chunk_fwd": Chunk,
    "chunk_bwd": ChunkBwd,
    "chunk": Chunk,
    "prefill": Prefill,
    "decode": Decode,
    "decode_commit": Commit,
    "decode_layer": DecodeLayer,
}
