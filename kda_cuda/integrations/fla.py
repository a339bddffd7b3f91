"""flash-linear-attention on the kernels of this package: a backend in fla's own registry.

After :func:`register` every fla layer and model with KDA runs here: forward, backward and decoding, unchanged. What
cannot be served on a GPU is declined with its reason, which fla logs at level INFO, and then runs in fla itself. fla
has no path for CPU tensors, so those are always served, or end in an error that names the argument.

``KDA_CUDA_FLA=1`` in the environment registers when kda_cuda is imported. ``python -m kda_cuda.integrations.fla
program.py ...`` registers and runs a program that does not import it (``-m`` works for torchrun too).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import runpy
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import calls, ops
from .serving import attempt, import_if_present

__all__ = ["register", "report", "unregister"]

ENV_VAR = "FLA_KDA_CUDA"
CHUNK, RECURRENT, GATE = "chunk_kda", "fused_recurrent_kda_fwd", "fused_kda_gate"
POOLED = ("ssm_state_indices", "num_accepted_tokens", "out")  # not of fla's public function
_installed: dict[str, Any] = {"enabled": False, "backend": None}
_served: Counter[str] = Counter()
_declined: Counter[tuple[str, str]] = Counter()
_checked = threading.local()  # the call that a verifier has just accepted, for the implementation that follows it


# ---- fla's signatures ------------------------------------------------------------------------------------------------


def _bind_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    scale: float | None = None,
    output_final_state: bool = False,
    inplace_final_state: bool = True,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs,
) -> calls.Call:
    """fla's ``fused_recurrent_kda_fwd``, of which its public function is a wrapper."""
    kwargs = {name: x for name, x in kwargs.items() if x is not None}
    pooled = [name for name in POOLED if name in kwargs] + ["inplace_final_state"] * inplace_final_state
    if pooled:
        raise NotImplementedError(f"kda_cuda::fused_recurrent_kda: got {pooled}, expected none of them through fla")
    return ops.fused_recurrent_kda.bind(
        q,
        k,
        v,
        g,
        beta,
        A_log=A_log,
        dt_bias=dt_bias,
        initial_state=initial_state,
        scale=scale,
        output_final_state=output_final_state,
        state_v_first=state_v_first,
        cu_seqlens=cu_seqlens,
        **kwargs,
    )


def _bind_gate(
    g: Tensor,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    output_dtype: torch.dtype = torch.float32,
) -> calls.Call:
    return ops.kda_gate.bind(g, A_log, dt_bias, lower_bound, dtype=output_dtype)


BINDS = {CHUNK: ops.chunk_kda.bind, RECURRENT: _bind_recurrent, GATE: _bind_gate}


# ---- the backend -----------------------------------------------------------------------------------------------------


def verify(name: str, args: tuple, kwargs: dict) -> tuple[bool, str | None]:
    """Whether this package serves fla's function ``name``; if not, the reason. CPU tensors: always."""
    x = args[0] if args else kwargs.get("g" if name == GATE else "q")
    if isinstance(x, Tensor) and x.device.type == "cpu":
        return True, None
    call = attempt(BINDS[name], args, kwargs)
    if isinstance(call, str):
        _declined[name, call] += 1
        return False, call
    _checked.call = (name, args, kwargs, call)
    return True, None


def _is_same(args: tuple, kwargs: dict, other_args: tuple, other_kwargs: dict) -> bool:
    """Whether two calls have the very same objects as arguments."""
    return (
        len(args) == len(other_args)
        and all(x is y for x, y in zip(args, other_args, strict=True))
        and kwargs.keys() == other_kwargs.keys()
        and all(x is other_kwargs[key] for key, x in kwargs.items())
    )


def run(name: str, args: tuple, kwargs: dict) -> Any:
    """Runs fla's function ``name`` here. The checks of :func:`verify` are not made twice."""
    checked, _checked.call = getattr(_checked, "call", None), None
    _served[name] += 1
    if checked and checked[0] == name and _is_same(args, kwargs, *checked[1:3]):
        return calls.run(checked[3])
    return calls.run(BINDS[name](*args, **kwargs))


class _Served:
    """What fla asks of a backend: for a function ``f`` a method ``f`` and a method ``f_verifier``."""

    backend_type = "kda_cuda"
    package_name = None
    env_var = ENV_VAR
    priority = 1  # the smallest number is asked first; FlashKDA has 3, Triton comes last

    @classmethod
    def is_available(cls) -> bool:
        return True

    @classmethod
    def is_enabled(cls) -> bool:
        return _installed["enabled"] and os.environ.get(ENV_VAR, "1") != "0"


def _add_methods(name: str) -> None:
    setattr(_Served, name, lambda self, *args, **kwargs: run(name, args, kwargs))
    setattr(_Served, f"{name}_verifier", lambda self, *args, **kwargs: verify(name, args, kwargs))


for _name in BINDS:
    _add_methods(_name)


# ---- registration ----------------------------------------------------------------------------------------------------


def register() -> tuple[str, ...]:
    """Makes fla run KDA here. A second call changes nothing.

    ``FLA_KDA_CUDA=0`` in the environment switches the backend off, at any time.

    Returns:
        The functions of fla that are served: ``chunk_kda``, ``fused_recurrent_kda``, ``fused_kda_gate``.

    Raises:
        ImportError: fla is not installed, or it has neither the registry of 0.6 nor that of 0.5.
        RuntimeError: ``FLA_DISABLE_BACKEND_DISPATCH=1`` has switched off fla's registry.
    """
    backends = import_if_present("fla.backends") or import_if_present("fla.ops.backends")
    if backends is None:
        try:
            found = f"found fla {importlib.metadata.version('fla-core')}"
        except importlib.metadata.PackageNotFoundError:
            found = "fla is not installed"
        raise ImportError(f"kda_cuda.integrations.fla: {found}, expected fla-core 0.5 or 0.6")
    if os.environ.get("FLA_DISABLE_BACKEND_DISPATCH") == "1":
        raise RuntimeError("kda_cuda.integrations.fla: FLA_DISABLE_BACKEND_DISPATCH is 1, expected fla's registry on")
    if _installed["backend"] is None:
        backend = type("KDACudaBackend", (_Served, backends.BaseBackend), {"__module__": __name__})
        _install(backends, backend)
        _installed["backend"] = backend
    _installed["enabled"] = True
    return "chunk_kda", "fused_recurrent_kda", "fused_kda_gate"


def _install(backends: ModuleType, backend: type) -> None:
    kda = importlib.import_module("fla.ops.kda")
    if hasattr(backends, "register"):  # 0.6: a registry for the function, another one for the operation
        backends.register(kda.chunk_kda)(backend)
        backends.register("kda")(backend)
        return
    importlib.import_module("fla.ops.kda.backends").kda_registry.register(backend())
    recurrent = importlib.import_module("fla.ops.kda.fused_recurrent")  # 0.5 does not dispatch this one
    setattr(recurrent, RECURRENT, _or_else(backend(), getattr(recurrent, RECURRENT)))


def _or_else(backend: Any, default: Callable) -> Callable:
    """fla 0.5's recurrent function, asked as the others are."""

    @torch.compiler.disable
    def fused_recurrent_kda_fwd(*args, **kwargs):
        if backend.is_enabled() and verify(RECURRENT, args, kwargs)[0]:
            return run(RECURRENT, args, kwargs)
        return default(*args, **kwargs)

    return fused_recurrent_kda_fwd


def report() -> dict[str, dict]:
    """Calls since the process began: ``served`` by function, ``declined`` by function and reason.

    A call of a CPU tensor that ends in an error counts as served.
    """
    return {"served": dict(_served), "declined": {f"{name}: {reason}": n for (name, reason), n in _declined.items()}}


def unregister() -> None:
    """fla runs KDA as before. Without :func:`register` before it, this changes nothing."""
    _installed["enabled"] = False


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m kda_cuda.integrations.fla PROGRAM.py [ARGUMENT ...]")
    # This module runs as __main__: the copy that others import is the one to register.
    importlib.import_module("kda_cuda.integrations.fla").register()
    sys.argv[:] = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
