"""What the doors share: whether this package serves a call, and imports of what may be absent."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

from .. import calls, variants
from ..schemas import FUNCTIONAL, raw_op

__all__ = ["attempt", "import_if_present"]


def attempt(bind: Callable[..., calls.Call], args: tuple, kwargs: dict) -> calls.Call | str:
    """The checked call, or the reason why it is left to the library that it came from."""
    try:
        call = bind(*args, **kwargs)
        return unserved(call) or call
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        return str(error)


def unserved(call: calls.Call) -> str | None:
    """Why a call, or the backward that will follow it, has no kernel. On the CPU the reference serves as well."""
    raw, x = raw_op(call.op), call.owner
    namespace, reason = variants.choose(raw, x)
    if x.device.type == "cpu":
        return None
    if not variants.is_kernel(namespace, x):
        return f"kda_cuda::{raw}: {reason}"
    if call.op in FUNCTIONAL:
        backward = raw.replace("_fwd", "_bwd")
        namespace, reason = variants.choose_backward(backward, namespace, x, x.shape[3] if call.op == "chunk" else None)
        if not variants.is_kernel(namespace, x):
            return f"kda_cuda::{backward}: {reason}"
    return None


def import_if_present(name: str) -> ModuleType | None:
    """The module, or None if there is none of this name. What it fails to import itself is an error."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise
