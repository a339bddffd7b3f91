"""KDA layers of vLLM on the kernels of this package: a plugin that vLLM finds and loads by itself.

The layer classes are replaced by subclasses, in vLLM's own registry for that. A subclass overrides one method, which
runs everything between the projections: convolutions, recurrence and, in some models, the gated norm. Projections,
weights, caches, metadata and CUDA graphs stay vLLM's. What cannot be served runs in the method of the class itself.

``KDA_CUDA_VLLM=1`` in the environment switches the plugin on. No engine has run it on a GPU yet, so it is off at first.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import calls
from ..checks import rows_contiguous
from . import engine_steps as steps
from .serving import engine_folder, open_if_asked, when_imported
from .signatures import VLLM, VLLM_LAYERS, differences
from .vllm_work import WORK, Step, Work, checkpoints_of, steps_of

__all__ = ["plugin", "register", "report", "unregister"]

EXPECTED = "expected that of vllm 0.33.0"
ERRORS = (AttributeError, RuntimeError, TypeError, ValueError)
_enabled = {"now": False}
_registered: set[str] = set()
_ledger = steps.Ledger(__name__)


# ---- the core attention ----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A step whose call has been checked, with the streams as they are before their convolutions."""

    step: Step
    work: Work  # of its tokens
    call: calls.Call

    def convolved(self, streams: tuple[Tensor, ...]) -> calls.Call:
        """The same call behind the convolutions, which change neither shape nor dtype."""
        x, given = self.work.inputs(streams), self.call.arguments
        q, k, v = (rows_contiguous(y).view(given.q.shape) for y in (x.q, x.k, x.v))
        return self.call._replace(arguments=given._replace(q=q, k=k, v=v))


class Caches(NamedTuple):
    """Of one layer."""

    conv: Tensor  # [slots, 3 * H * D, inputs]
    pool: Tensor  # [slots, H, V, K]


def caches_of(layer: Any) -> Caches:
    conv, pool = layer.kv_cache[:2]
    dim_first = importlib.import_module("vllm.model_executor.layers.mamba.mamba_utils").is_conv_state_dim_first()
    return Caches(conv if dim_first else conv.transpose(-1, -2), pool)


def plan(layer: Any, work: Work, m: Any, caches: Caches) -> list[Part] | calls.Call | str:
    """The checked parts of a step, or the one call that does all of it, or why vLLM must serve it."""
    if getattr(layer, "use_recoverssm", False):
        return "use_recoverssm is on, expected speculation with a state for each draft"
    found = steps_of(m)
    if [x.kind for x in found] == ["decode"] and work.output_gate is not None:
        call = _whole_layer(layer, work.select(found[0].tokens), found[0].slots, caches)
        if not isinstance(call, str):
            return call
    parts = []
    for step in found:
        kept = checkpoints_of(step.checkpoint, getattr(layer, "_checkpoint_exporter", None))
        own = work.select(step.tokens)
        call = _call(step, own, kept, caches.pool)
        if isinstance(call, str):
            return call
        parts.append(Part(step, own, call))
    return parts


def _call(step: Step, work: Work, checkpoints: steps.Checkpoints | None, pool: Tensor) -> calls.Call | str:
    x, out, options = work.inputs(work.streams), work.out, {"zero_is_null": True, "gates": work.gates}
    if step.kind == "prefill":
        options |= {"has_initial_state": step.has_initial_state, "checkpoints": checkpoints}
        return steps.prefill_call(x, pool, step.slots, step.cu_seqlens, **options)
    if step.kind == "decode":
        return steps.decode_call(x, pool, step.slots, out=None if out is None else out[0].unsqueeze(1), **options)
    options |= {"cu_seqlens": step.cu_seqlens, "accepted": step.accepted, "out": out}
    return steps.verify_call(x, pool, step.slots, **options)


def _whole_layer(layer: Any, work: Work, slots: Tensor, caches: Caches) -> calls.Call | str:
    """One token of each sequence, all in one launch."""
    norm = layer.o_norm
    if norm.activation != "sigmoid" or norm.weight is None:
        return "the norm has another gate or no weight"
    rows = work.inputs(work.streams).rows(1)
    width = work.g.shape[2] * work.g.shape[3]
    gate = work.output_gate[: len(rows.q)].unsqueeze(1)
    return steps.layer_call(
        (*rows, gate),
        caches.pool,
        slots,
        gates=work.gates,
        zero_is_null=True,
        conv_state=caches.conv,
        conv_weights=work.weights[0].split(width),
        norm_weight=norm.weight.detach(),
        norm_eps=norm.eps,
        out=work.out[0].unsqueeze(1),
    )


def execute(layer: Any, work: Work, parts: list[Part], m: Any, caches: Caches) -> None:
    for part in parts:
        o = steps.run(part.convolved(_convolved(part, caches.conv, m)))
        if isinstance(part.step.tokens, slice):
            if part.step.kind == "prefill":
                part.work.out.copy_(o)
        else:
            work.out.index_copy_(1, part.step.tokens.long(), o.view(1, -1, *o.shape[2:]))
        if part.step.checkpoint is not None:
            layer._checkpoint_exporter.export(
                part.step.checkpoint,
                raw_qkv=part.work.streams[0],
                conv_state=caches.conv,
                cu_seqlens=part.step.cu_seqlens,
            )
        _ledger.served[part.step.kind] += 1
    if work.output_gate is not None:
        work.out.copy_(layer.o_norm(work.out, work.output_gate))


def _convolved(part: Part, conv_state: Tensor, m: Any) -> tuple[Tensor, ...]:
    """The streams behind vLLM's own convolutions, whose states it updates."""
    ops = importlib.import_module("vllm.model_executor.layers.mamba.ops.causal_conv1d")
    step, streams, weights = part.step, part.work.streams, part.work.weights
    states = conv_state.split([x.shape[-1] for x in streams], dim=-2)
    if step.kind == "prefill":
        return tuple(
            ops.causal_conv1d_fn(
                x.transpose(0, 1),
                weight,
                None,
                activation="silu",
                conv_states=state,
                metadata=m,
                has_initial_state=step.has_initial_state,
                cache_indices=step.slots,
                query_start_loc=step.cu_seqlens,
            ).transpose(0, 1)
            for x, weight, state in zip(streams, weights, states, strict=True)
        )
    options = {"conv_state_indices": step.slots, "validate_data": True}
    if step.kind == "verify":
        options = {
            "conv_state_indices": step.slots[:, 0],
            "num_accepted_tokens": step.accepted,
            "query_start_loc": step.cu_seqlens,
            "max_query_len": step.slots.shape[1],
            "validate_data": False,
        }
    return tuple(
        ops.causal_conv1d_update(
            x,
            state,
            weight,
            None,
            activation="silu",
            out=torch.empty_like(x, memory_format=torch.contiguous_format),
            **options,
        )
        for x, weight, state in zip(streams, weights, states, strict=True)
    )


@torch.no_grad()
def serve(name: str, layer: Any, arguments: dict) -> bool:
    """Runs the core attention of a layer of class ``name`` here. False: nothing has run, and vLLM must do it."""
    metadata = importlib.import_module("vllm.forward_context").get_forward_context().attn_metadata
    m = metadata.get(layer.prefix) if isinstance(metadata, dict) else None
    if m is None or not _enabled["now"]:
        return False
    try:
        work, caches = WORK[name](layer, **arguments), caches_of(layer)
        planned = plan(layer, work, m, caches)
    except ERRORS as error:
        planned = str(error)
    if isinstance(planned, str):
        _ledger.decline(name, planned)
        return False
    if isinstance(planned, calls.Call):
        steps.run(planned)
        _ledger.served["decode_layer"] += 1
    else:
        execute(layer, work, planned, m, caches)
    return True


# ---- registration ----------------------------------------------------------------------------------------------------


def layer_class(base: type) -> type:
    """The subclass of one of vLLM's layer classes that asks this package first."""
    breakable = importlib.import_module("vllm.compilation.breakable_cudagraph")
    own, name = base._forward, base.__name__
    signature = inspect.signature(own)

    def _forward(self, *args, **kwargs) -> None:
        if torch.compiler.is_compiling():
            return own(self, *args, **kwargs)
        arguments = signature.bind(self, *args, **kwargs).arguments
        given = {key: x for key, x in arguments.items() if x is not self}
        return None if serve(name, self, given) else own(self, *args, **kwargs)

    members = {"_forward": breakable.eager_break_during_capture(_forward), "__module__": __name__}
    return type(f"KdaCuda{name}", (base,), members)


def _replace(name: str) -> Callable[[ModuleType], None]:
    def replace(module: ModuleType) -> None:
        pluggable = importlib.import_module("vllm.model_executor.custom_op").PluggableLayer
        try:
            pluggable.register_oot(layer_class(getattr(module, name)), name=name)
        except AssertionError:  # how vLLM says that another plugin has replaced the class
            _ledger.decline(name, "another plugin replaces this class, expected none")

    return replace


def register() -> tuple[str, ...]:
    """Makes the KDA layers that vLLM builds from now on run here. A second call changes nothing.

    vLLM itself calls :func:`plugin`; this function is for tests and for engines in the same process. It imports
    nothing of vLLM: a layer class is replaced when vLLM imports it.

    Returns:
        The layer classes that are served.

    Raises:
        ImportError: vLLM is not installed.
        RuntimeError: its sources differ from those that this door was written for; the message names each difference.
    """
    folder = engine_folder("vllm", __name__)
    found = differences(VLLM, folder)
    served = []
    for module, names in VLLM_LAYERS.items():
        name = next(iter(names)).partition(".")[0]
        wrong = differences({module: names}, folder)
        found += wrong
        if not wrong:
            served.append((module, name))
    if not served or differences(VLLM, folder):
        raise RuntimeError(f"{__name__}: {'; '.join(found)}; {EXPECTED}")
    for wrong in found:
        _ledger.decline("a layer class", f"{wrong}; {EXPECTED}")
    for module, name in served:
        if name not in _registered:
            _registered.add(name)
            when_imported(module, _replace(name))
    _enabled["now"] = True
    return tuple(name for _, name in served)


def plugin() -> None:
    """What vLLM calls in each of its processes (``vllm.general_plugins``). Logs what :func:`register` would raise."""
    open_if_asked("vLLM", os.environ.get("KDA_CUDA_VLLM"), register)


def unregister() -> None:
    """vLLM runs KDA as before, in layers that it has built as well."""
    _enabled["now"] = False


def report() -> dict[str, dict[str, int]]:
    """Calls of this process: ``served`` by kind, ``declined`` by layer class and reason.

    The replay of a CUDA graph is not counted.
    """
    return _ledger.report()
