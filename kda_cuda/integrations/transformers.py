"""Models of transformers 5.17 and later on the kernels of this package, by either of two doors.

* :func:`register`: ``kimi_linear`` and its relatives call this package's operation in place of their own. No model is
  touched, and an installed fla, which has no CPU path, no longer takes the CPU over.
* :func:`patch`: every KDA layer of one model, of transformers or fla, runs here as a whole: convolutions, gate,
  operation and norm. The layer keeps its parameters, names and caches.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

from torch import nn

from .. import calls, ops
from ..checks import MAX_KEY_DIM
from .patched import fla_forward, transformers_forward
from .serving import attempt, import_if_present

__all__ = ["patch", "register", "unpatch", "unregister"]

MODELS = ("kimi_linear", "glm5_next", "bailing_hybrid")
FUNCTIONS = {"chunk_kimi_delta_attention": ops.chunk_kda, "recurrent_kimi_delta_attention": ops.fused_recurrent_kda}
FORWARDS = (transformers_forward, fla_forward)
STREAMS = ("q_proj", "k_proj", "v_proj", "b_proj", "o_norm", "o_proj")
_installed = {"enabled": False}


# ---- the operation ---------------------------------------------------------------------------------------------------


def register() -> tuple[str, ...]:
    """Makes the KDA models of transformers call this package's operation. A second call changes nothing.

    A call that cannot be served goes to what transformers had chosen: a hub kernel, fla, or PyTorch.

    Returns:
        The models that are served: those of ``kimi_linear``, ``glm5_next`` and ``bailing_hybrid`` that are installed.

    Raises:
        ImportError: transformers is not installed, or none of its models has KDA (before 5.17).
    """
    served = []
    for model in MODELS:
        module = import_if_present(f"transformers.models.{model}.modeling_{model}")
        if module is None:
            continue
        served.append(model)
        for name, function in FUNCTIONS.items():
            own = getattr(module, name)
            if not hasattr(own, "kda_cuda_stands_for"):
                setattr(module, name, _serving(function, own))
    if not served:
        raise ImportError("kda_cuda.integrations.transformers: no model with KDA found, expected transformers >= 5.17")
    _installed["enabled"] = True
    return tuple(served)


def unregister() -> None:
    """transformers runs KDA as before."""
    _installed["enabled"] = False


def _serving(function: Callable, own: Callable) -> Callable:
    """Stands for transformers' function ``own``: ``function`` where it can serve the call."""
    known = set(inspect.signature(function).parameters)

    @functools.wraps(own)
    def kimi_delta_attention(query, key, value, *args, **kwargs):
        if _installed["enabled"] and not args:
            mine = {name: x for name, x in kwargs.items() if name in known or name == "chunk_size"}
            if function is ops.fused_recurrent_kda:
                mine.pop("chunk_size", None)
            call = attempt(function.bind, (query, key, value), mine)
            if not isinstance(call, str):
                return calls.run(call)
        return own(query, key, value, *args, **kwargs)

    kimi_delta_attention.kda_cuda_stands_for = own
    return kimi_delta_attention


# ---- the layer -------------------------------------------------------------------------------------------------------


def patch(model: nn.Module) -> list[str]:
    """Makes every KDA layer of a model run on this package, with its own parameters.

    State dict, optimizer, hooks, adapters of the projections and the library's caches work as before. A second call
    changes nothing. Models can be patched before or after adapters are added to them.

    Args:
        model: of transformers (``kimi_linear``, ``glm5_next``, ``bailing_hybrid``) or fla, or a part of one.

    Returns:
        The names of the KDA layers of the model.

    Raises:
        ValueError: there is no KDA layer, or one that cannot be served; the message names it. Nothing is patched then.

    Example:
        >>> from kda_cuda.integrations import transformers as kda
        >>> model = KimiLinearForCausalLM.from_pretrained(folder)  # doctest: +SKIP
        >>> kda.patch(model)  # doctest: +SKIP
        ['model.layers.0.self_attn', 'model.layers.1.self_attn', 'model.layers.2.self_attn']
    """
    found = list(_layers(model))
    if not found:
        raise ValueError(
            f"kda_cuda::patch: {type(model).__name__} has no KDA layer of transformers or fla, expected one"
        )
    for name, layer, _ in found:
        if reason := _unservable(layer):
            raise ValueError(f"kda_cuda::patch: {name or 'the layer'} has {reason}")
    for _, layer, forward in found:
        if _patched_as(layer) is None:
            setattr(layer, _place(layer), MethodType(forward, layer))
    return [name for name, _, _ in found]


def unpatch(model: nn.Module) -> list[str]:
    """Undoes :func:`patch`. Returns the names of the layers that were patched."""
    undone = []
    for name, layer, _ in _layers(model):
        place = _patched_as(layer)
        if place == "forward":
            del layer.forward
        elif place is not None:
            setattr(layer, place, MethodType(type(layer).forward, layer))
        if place is not None:
            undone.append(name)
    return undone


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Callable]]:
    """The KDA layers of a model by name, each with the forward that it gets."""
    for name, module in model.named_modules():
        kind, has = type(module).__name__, module._modules.keys()
        if not has >= set(STREAMS):
            continue
        if kind == "KimiDeltaAttention" and {"f_proj", "g_proj"} <= has:
            yield name, module, fla_forward
        elif kind.endswith("DeltaAttention") and {"conv1d", "forget_gate"} <= has:
            yield name, module, transformers_forward


def _unservable(layer: Any) -> str | None:
    """What of a layer this package does not do, and what it expected."""
    dim = getattr(layer, "head_k_dim", layer.head_dim)
    if dim > MAX_KEY_DIM:
        return f"head_dim={dim}, expected at most {MAX_KEY_DIM}"
    if "conv1d" in layer._modules and layer.activation not in ("silu", "swish"):
        return f"activation {layer.activation!r}, expected silu"
    if _patched_as(layer) is None and "forward" in vars(layer) and "_old_forward" not in vars(layer):
        return "a forward of its own, expected that of its class"
    return None


def _place(layer: nn.Module) -> str:
    """Where the forward of a layer is: accelerate keeps it under another name when it adds its hooks."""
    return "_old_forward" if "_old_forward" in vars(layer) else "forward"


def _patched_as(layer: nn.Module) -> str | None:
    """The attribute that holds one of our forwards, if there is one."""
    for place in ("forward", "_old_forward"):
        if getattr(vars(layer).get(place), "__func__", None) in FORWARDS:
            return place
    return None
