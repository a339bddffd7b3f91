"""KDA layers of SGLang on the kernels of this package: a plugin that SGLang finds and loads by itself.

Where SGLang has chosen its Triton kernels for KDA, which is its default, a hook puts a kernel class of this package in
their place: for decoding, for prompts and for the verification of drafts. Convolutions, norms, pools, prefix caching
and CUDA graphs stay SGLang's. What cannot be served runs in SGLang's Triton kernels, from which the class inherits.

``KDA_CUDA_SGLANG=1`` in the environment switches the plugin on. No engine has run it on a GPU yet, so it is off at
first.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import calls
from ..prefilling import CHECKPOINT_TOKENS
from . import engine_steps as steps
from .engine_steps import Streams
from .serving import engine_folder, open_if_asked, when_imported
from .signatures import SGLANG, differences

__all__ = ["plugin", "register", "report", "unregister"]

BACKEND = "sglang.srt.layers.attention.linear.kda_backend"
KERNELS = ("decode_kernel", "extend_kernel", "verify_kernel")
OF_OTHER_KERNELS = (  # arguments of ``extend`` that SGLang's own Triton kernel does not read either
    "chunk_indices",
    "chunk_offsets",
    "extend_prefix_lens",
    "layer_id",
    "num_state_checkpoints",
    "state_checkpoint_cu_starts",
    "state_checkpoint_every_n_tokens",
    "state_checkpoint_indices",
    "track_ssm_h_batch_src",
)
ERRORS = (AttributeError, RuntimeError, TypeError, ValueError)
_state = {"enabled": False, "registered": False}
_ledger = steps.Ledger(__name__)


# ---- SGLang's calls --------------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """Checked calls in their order, and what SGLang gets of the last one's output."""

    calls: tuple[calls.Call, ...]
    returned: Callable[[Tensor], Any]


def _planned(returned: Callable[[Tensor], Any], *given: calls.Call | str) -> Planned:
    for call in given:
        if isinstance(call, str):
            raise ValueError(call)
    return Planned(given, returned)


def _refuse(others: dict) -> None:
    """Arguments that ask for something else. None and False ask for nothing."""
    if asked := sorted(name for name, x in others.items() if x is not None and x is not False):
        raise ValueError(f"got {', '.join(asked)}, expected none of them")


def _streams(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Streams:
    """q, k, v ``[1, T, heads, dim]``; g with HV * K and beta with HV numbers a token, in any of SGLang's shapes."""
    tokens, value_heads, key_dim = q.shape[1], v.shape[2], q.shape[3]
    return Streams(q, k, v, g.reshape(1, tokens, value_heads, key_dim), beta.reshape(1, tokens, value_heads))


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    ssm_states: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    lower_bound: float | None = None,
    scale: float | None = None,
    **others,
) -> Planned:
    """One token of each sequence, ``[1, sequences, heads, dim]``; returns o in this shape.

    Raises:
        ValueError, TypeError: the call is not served; the message says why. Nothing has run.
    """
    _refuse(others)
    gates = steps.raw_gates(A_log, dt_bias, lower_bound)
    x = _streams(q, k, v, a, b)
    call = steps.decode_call(x, ssm_states, cache_indices, zero_is_null=False, gates=gates, scale=scale)
    return _planned(lambda o: o.transpose(0, 1), call)


def packed_decode(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    ssm_states: Tensor,
    num_v_heads: int,
    head_v_dim: int,
    **others,
) -> Planned:
    """:func:`decode` of q|k|v ``[sequences, 2 * H * K + HV * V]``."""
    key_dim, value_width = ssm_states.shape[-1], num_v_heads * head_v_dim
    width = (mixed_qkv.shape[1] - value_width) // 2
    q, k, v = mixed_qkv[None].split((width, width, value_width), dim=-1)
    heads = (x.unflatten(-1, (-1, dim)) for x, dim in ((q, key_dim), (k, key_dim), (v, head_v_dim)))
    return decode(*heads, a, b, ssm_states=ssm_states, query_start_loc=None, **others)


def extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    ssm_states: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    beta_is_raw: bool = False,
    return_intermediate_states: bool = False,
    extend_seq_lens_cpu: list[int] | None = None,
    is_spec_decode: bool = False,
    track_state: Tensor | None = None,
    track_chunk_idx: Tensor | None = None,
    track_ssm_h_src: Tensor | None = None,
    **others,
) -> Planned:
    """Packed prompts, in place in the pool. Row n of ``track_state`` gets the state before ``track_chunk_idx[n]``.

    Returns o, or with ``return_intermediate_states`` o and None: SGLang reads ``track_state`` instead.

    Raises:
        ValueError, TypeError: the call is not served; the message says why. Nothing has run.
    """
    _refuse({name: x for name, x in others.items() if name not in OF_OTHER_KERNELS} | {"drafts": is_spec_decode})
    reads_chunks = track_ssm_h_src is None or track_ssm_h_src.numel() > 0
    if return_intermediate_states and track_state is None and reads_chunks:
        raise ValueError("states of all chunks are asked for, expected track_state")
    if A_log is not None and not beta_is_raw:
        raise ValueError("g is raw and beta_is_raw is False, expected both raw or both activated")
    gates = dict(steps.ACTIVATED, use_beta_sigmoid_in_kernel=beta_is_raw)
    if A_log is not None:
        gates = steps.raw_gates(A_log, dt_bias, lower_bound)
    x, before, checkpoints = _streams(q, k, v, g, beta), (), None
    if track_state is not None:
        longest = q.shape[1] if extend_seq_lens_cpu is None else max(extend_seq_lens_cpu, default=0)
        rows = torch.arange(cache_indices.shape[0], device=cache_indices.device, dtype=cache_indices.dtype)
        checkpoints = steps.Checkpoints(track_chunk_idx, rows, int(longest) // CHECKPOINT_TOKENS, track_state)
        begins = torch.where(track_chunk_idx == 0, cache_indices, -1)
        before = (steps.copy_call(x, ssm_states, begins, track_state),)
    call = steps.prefill_call(
        x, ssm_states, cache_indices, query_start_loc, checkpoints=checkpoints, zero_is_null=False, gates=gates
    )
    return _planned((lambda o: (o, None)) if return_intermediate_states else (lambda o: o), *before, call)


def target_verify(
    A_log: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    ssm_states: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    intermediate_states_buffer: Tensor | None,
    intermediate_state_indices: Tensor,
    cache_steps: int,
    retrieve_parent_token: Tensor | None = None,
    lower_bound: float | None = None,
    **others,
) -> Planned:
    """Drafts: the state after token t of sequence n goes to ``intermediate_states_buffer[indices[n], t]``.

    ``retrieve_parent_token`` ``[sequences, tokens]`` makes trees of them; its first column is not read. Returns o.

    Raises:
        ValueError, TypeError: the call is not served; the message says why. Nothing has run.
    """
    _refuse(others)
    if intermediate_states_buffer is None:
        raise ValueError("intermediate_states_buffer is None, expected a Tensor")
    sequences, parents = query_start_loc.shape[0] - 1, None
    if retrieve_parent_token is not None:
        parents = retrieve_parent_token[:sequences].clone()
        parents[:, 0] = -1
        parents = parents.reshape(1, -1)
    states, pitch = _side_by_side(intermediate_states_buffer)
    rows = intermediate_state_indices[:sequences, None]
    columns = torch.arange(cache_steps, device=rows.device, dtype=rows.dtype)
    call = steps.verify_call(
        _streams(q, k, v, a, b),
        ssm_states,
        cache_indices[:sequences],
        cu_seqlens=query_start_loc,
        states=states,
        state_slots=torch.where(rows < 0, -1, rows * pitch + columns),
        parents=parents,
        zero_is_null=False,
        gates=steps.raw_gates(A_log, dt_bias, lower_bound),
    )
    return _planned(lambda o: o, call)


def _side_by_side(buffer: Tensor) -> tuple[Tensor, int]:
    """States ``[rows, tokens, HV, V, K]`` as one pool, and how many of its slots a row takes. A row may be a part."""
    size, (rows, tokens) = buffer[0, 0].numel(), buffer.shape[:2]
    if not buffer[0].is_contiguous() or buffer.stride(0) % size:
        raise ValueError(f"intermediate_states_buffer has strides {list(buffer.stride())}, expected rows of states")
    pitch = buffer.stride(0) // size
    slots = (rows - 1) * pitch + tokens
    return buffer.as_strided((slots, *buffer.shape[2:]), (size, *buffer.stride()[2:])), pitch


PLANS = {plan.__name__: plan for plan in (decode, packed_decode, extend, target_verify)}


# ---- the kernel class ------------------------------------------------------------------------------------------------


@torch.no_grad()
def attempt(name: str, args: tuple, kwargs: dict) -> tuple[bool, Any]:
    """Whether a call of SGLang's method ``name`` has been served, and what it returns then."""
    if not _state["enabled"]:
        return False, None
    try:
        planned = PLANS[name](*args, **kwargs)
    except ERRORS as error:
        _ledger.decline(name, str(error))
        return False, None
    o = [steps.run(call) for call in planned.calls][-1]
    _ledger.served[name] += 1
    return True, planned.returned(o)


def kernel_class(base: type) -> type:
    """The kernel class that asks this package first, and then ``base``, SGLang's Triton kernels."""

    def method(name: str) -> Callable:
        own = getattr(base, name)

        def serve(self, *args, **kwargs):
            served, result = attempt(name, args, kwargs)
            return result if served else own(self, *args, **kwargs)

        serve.__name__ = name
        return serve

    members = {name: method(name) for name in PLANS}
    flags = {"supports_fused_chain_verify": False, "supports_track_state_snapshot": True, "__module__": __name__}
    return type("KdaCudaKernel", (base,), members | flags)


def replace_kernels(result: None, dispatcher: Any, *args, **kwargs) -> None:
    """The hook: runs after the constructor of SGLang's dispatcher, whose arguments it gets."""
    base = importlib.import_module("sglang.srt.layers.attention.linear.kernels.kda_triton").TritonKDAKernel
    kernel = kernel_class(base)()
    for name in KERNELS:
        chosen = type(getattr(dispatcher, name))
        if chosen is base:
            setattr(dispatcher, name, kernel)
        else:
            _ledger.decline(name, f"{chosen.__name__} is chosen, expected SGLang's Triton kernels")


# ---- registration ----------------------------------------------------------------------------------------------------


def _hook(_: ModuleType) -> None:
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(f"{BACKEND}.KDAKernelDispatcher.__init__", replace_kernels, hooks.HookType.AFTER)
    source = getattr(hooks, "_current_plugin_source", None)
    if source is None or source.get() is None:  # while SGLang loads its plugins, it is about to apply all their hooks
        hooks.HookRegistry.apply_hooks()


def register() -> tuple[str, ...]:
    """Makes the KDA layers that SGLang builds from now on run here. A second call changes nothing.

    SGLang itself calls :func:`plugin`; this function is for tests and for engines in the same process. It imports
    nothing of SGLang: the hook is set when SGLang imports its KDA backend.

    Returns:
        The methods of SGLang's kernel class that are served.

    Raises:
        ImportError: SGLang is not installed.
        RuntimeError: its sources differ from those that this door was written for; the message names each difference.
    """
    if found := differences(SGLANG, engine_folder("sglang", __name__)):
        raise RuntimeError(f"{__name__}: {'; '.join(found)}; expected that of sglang 0.5.23")
    if not _state["registered"]:
        _state["registered"] = True
        when_imported(BACKEND, _hook)
    _state["enabled"] = True
    return tuple(PLANS)


def plugin() -> None:
    """What SGLang calls in each of its processes (``sglang.srt.plugins``). Logs what :func:`register` would raise."""
    open_if_asked("SGLang", os.environ.get("KDA_CUDA_SGLANG"), register)


def unregister() -> None:
    """SGLang runs KDA as before, in layers that it has built as well."""
    _state["enabled"] = False


def report() -> dict[str, dict[str, int]]:
    """Calls of this process: ``served`` by method, ``declined`` by method and reason.

    The replay of a CUDA graph is not counted.
    """
    return _ledger.report()
