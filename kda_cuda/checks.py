"""Argument checks of the public functions: before anything is launched or written.

Order: device, rank, dtype, shape, stride, range. ValueError for values and shapes, TypeError for types; the message
names the op, the argument, what it got and what was expected.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_KEY_DIM = 256


def name_of(dtypes) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


class Checker:
    """Checks on behalf of one op: ``Checker("chunk_kda").shape("k", k, B=2, T=8)``.

    It also notes what the next call of the same signature must do again (:mod:`kda_cuda.recipes`).
    """

    def __init__(self, op: str):
        self.op = op
        self.looks: list[tuple[Tensor, Callable, tuple]] = []
        self.made: list[tuple[Tensor, Callable[[Tensor], Tensor], Tensor]] = []
        self.depends_on_more = False  # than the signature of the call and what is noted here

    def look(self, x: Tensor, check: Callable, *given: object) -> None:
        """``check(self, *given)``, which reads contents, where those on the device of ``x`` may be read."""
        self.looks.append((x, check, given))
        if check_contents(x):
            check(self, *given)

    def make(self, owner: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """``make(owner)``, a tensor that every call makes anew. ``make`` refers to no tensor."""
        x = make(owner)
        self.made.append((x, make, owner))
        return x

    def value_error(self, text: str) -> ValueError:
        return ValueError(f"kda_cuda::{self.op}: {text}")

    def type_error(self, text: str) -> TypeError:
        return TypeError(f"kda_cuda::{self.op}: {text}")

    def not_implemented(self, text: str) -> NotImplementedError:
        return NotImplementedError(f"kda_cuda::{self.op}: {text}")

    def tensor(self, name: str, x: object) -> None:
        if not isinstance(x, Tensor):
            raise self.type_error(f"{name} is a {type(x).__name__}, expected a Tensor")

    def device(self, name: str, x: Tensor, device: torch.device, owner: str | None = None) -> None:
        if x.device != device:
            like = f" like {owner}" if owner else ""
            raise self.value_error(f"{name} is on {x.device}, expected {device}{like}")

    def rank(self, name: str, x: Tensor, dims: str) -> None:
        expected = dims.count(",") + 1
        if x.dim() != expected:
            raise self.value_error(f"{name} has shape {list(x.shape)}, expected {expected} dimensions [{dims}]")

    def dtype(self, name: str, x: Tensor, allowed) -> None:
        if x.dtype not in allowed:
            raise self.type_error(f"{name} has dtype {name_of([x.dtype])}, expected {name_of(allowed)}")

    def shape(self, name: str, x: Tensor, **dims: int) -> None:
        if x.shape != tuple(dims.values()):
            expected = ", ".join(f"{d}={n}" for d, n in dims.items())
            raise self.value_error(f"{name} has shape {list(x.shape)}, expected [{expected}]")

    def boolean(self, name: str, x: object) -> None:
        if not isinstance(x, bool):
            raise self.type_error(f"{name} is {x!r} ({type(x).__name__}), expected a bool")

    def number(self, name: str, x: object) -> float:
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise self.type_error(f"{name} is {x!r} ({type(x).__name__}), expected a number")
        return float(x)

    def integer(self, name: str, x: object) -> None:
        if isinstance(x, bool) or not isinstance(x, int):
            raise self.type_error(f"{name} is {x!r} ({type(x).__name__}), expected an int")

    def choice(self, name: str, x: object, allowed) -> None:
        if x not in allowed:
            raise self.value_error(f"{name} is {x!r}, expected one of {list(allowed)}")


def check_contents(x: Tensor) -> bool:
    """Whether values on ``x``'s device may be read: always on the CPU, on the GPU only if KDA_CUDA_CHECK=1 asks."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get("KDA_CUDA_CHECK") == "1"


def cu_seqlens_list(cu_seqlens: Tensor) -> list[int]:
    return cu_seqlens.detach().tolist()


def check_cu_seqlens(
    c: Checker, q: Tensor, cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None, owner: str = "q"
) -> None:
    """``owner``: what the function calls the tensor ``q`` ``[1, T, ...]``."""
    c.tensor("cu_seqlens", cu_seqlens)
    c.device("cu_seqlens", cu_seqlens, q.device, owner)
    c.rank("cu_seqlens", cu_seqlens, "N+1")
    c.dtype("cu_seqlens", cu_seqlens, INDEX_DTYPES)
    if cu_seqlens.shape[0] < 2:
        raise c.value_error(f"cu_seqlens has shape {list(cu_seqlens.shape)}, expected [N+1] with N >= 1")
    if q.shape[0] != 1:
        raise c.value_error(f"{owner} has shape {list(q.shape)}, expected B=1 with cu_seqlens")
    if cu_seqlens_cpu is not None:
        c.tensor("cu_seqlens_cpu", cu_seqlens_cpu)
        c.device("cu_seqlens_cpu", cu_seqlens_cpu, torch.device("cpu"))
        c.rank("cu_seqlens_cpu", cu_seqlens_cpu, "N+1")
        c.dtype("cu_seqlens_cpu", cu_seqlens_cpu, INDEX_DTYPES)
        c.shape("cu_seqlens_cpu", cu_seqlens_cpu, **{"N+1": cu_seqlens.shape[0]})
        c.look(cu_seqlens_cpu, check_boundaries, "cu_seqlens_cpu", cu_seqlens_cpu, q.shape[1])
    c.look(cu_seqlens, check_boundaries, "cu_seqlens", cu_seqlens, q.shape[1])


def check_boundaries(c: Checker, name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """From 0 to T or less, never backwards. One vectorised look, a second one to say what is wrong."""
    bounds = cu_seqlens_list(cu_seqlens)
    if bounds[0] == 0 and bounds[-1] <= tokens and bounds == sorted(bounds):
        return
    if bounds[0] != 0:
        raise c.value_error(f"{name}[0] is {bounds[0]}, expected 0")
    for i in range(1, len(bounds)):
        if bounds[i] < bounds[i - 1]:
            raise c.value_error(f"{name}[{i}] is {bounds[i]} after {bounds[i - 1]}, expected no decrease")
    raise c.value_error(f"{name}[-1] is {bounds[-1]}, expected at most T={tokens}")


def check_initial_state(
    c: Checker, state: Tensor, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, state_v_first: bool
) -> None:
    c.tensor("initial_state", state)
    c.device("initial_state", state, q.device, "q")
    dims = "N, HV, V, K" if state_v_first else "N, HV, K, V"
    c.rank("initial_state", state, dims)
    c.dtype("initial_state", state, (torch.float64 if q.dtype == torch.float64 else torch.float32,))
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = {"N": sequences, "HV": v.shape[2], "K": q.shape[3], "V": v.shape[3]}
    c.shape("initial_state", state, **{d: sizes[d] for d in dims.split(", ")})


def check_qkvgb(c: Checker, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    """Devices, ranks, dtypes and shapes of the five streams."""
    streams = {"q": q, "k": k, "v": v, "g": g, "beta": beta}
    for name, x in streams.items():
        c.tensor(name, x)
    for name, x in streams.items():
        c.device(name, x, q.device, "q")
    for name, dims in (("q", "B, T, H, K"), ("k", "B, T, H, K"), ("v", "B, T, HV, V"), ("g", "B, T, HV, K"),
                       ("beta", "B, T, HV")):  # fmt: skip
        c.rank(name, streams[name], dims)
    c.dtype("q", q, FLOAT_DTYPES if q.device.type == "cpu" else FLOAT_DTYPES[:3])
    c.dtype("k", k, (q.dtype,))
    c.dtype("v", v, (q.dtype,))
    wide = (q.dtype,) if q.dtype in (torch.float32, torch.float64) else (q.dtype, torch.float32)
    c.dtype("g", g, wide)
    c.dtype("beta", beta, wide)
    batch, tokens, heads, key_dim = q.shape
    c.shape("k", k, B=batch, T=tokens, H=heads, K=key_dim)
    value_heads, value_dim = v.shape[2:]
    c.shape("v", v, B=batch, T=tokens, HV=value_heads, V=value_dim)
    if heads == 0 or value_heads == 0 or value_heads % heads:
        raise c.value_error(f"v has HV={value_heads} heads, expected a multiple of the H={heads} heads of q and k")
    c.shape("g", g, B=batch, T=tokens, HV=value_heads, K=key_dim)
    c.shape("beta", beta, B=batch, T=tokens, HV=value_heads)
    if not 1 <= key_dim <= MAX_KEY_DIM:
        raise c.value_error(f"q has K={key_dim}, expected 1 <= K <= {MAX_KEY_DIM}")
    if value_dim < 1:
        raise c.value_error(f"v has V={value_dim}, expected V >= 1")


def check_gate_parameters(
    c: Checker, owner: Tensor, value_heads: int, key_dim: int, A_log, dt_bias, lower_bound: float | None
) -> tuple[Tensor | None, Tensor | None, float | None]:
    """The gate parameters as ``[HV]`` and ``[HV, K]``, in fp32 (float64 may stay where ``owner`` has it)."""
    if lower_bound is not None:
        lower_bound = c.number("lower_bound", lower_bound)
        if not -math.inf < lower_bound < 0:
            raise c.value_error(f"lower_bound is {lower_bound}, expected a finite negative number")
    elif A_log is None:
        raise c.value_error("A_log is None, expected a Tensor [HV] (it may be absent only with a lower_bound)")
    computed = (torch.float32,) if owner.dtype != torch.float64 else (torch.float32, torch.float64)

    def as_shape(name: str, x: object, *sizes: int, **dims: int) -> Tensor | None:
        if x is None:
            return None
        c.tensor(name, x)
        c.device(name, x, owner.device, "g")
        c.dtype(name, x, FLOAT_DTYPES)
        if x.numel() != math.prod(sizes):
            c.shape(name, x, **dims)
        x = x if x.dtype in computed else x.float()
        return (x if x.shape == sizes else x.reshape(sizes)).contiguous()

    A_log = as_shape("A_log", A_log, value_heads, HV=value_heads)
    dt_bias = as_shape("dt_bias", dt_bias, value_heads, key_dim, HV=value_heads, K=key_dim)
    return A_log, dt_bias, lower_bound


def empty_like(x: Tensor) -> Tensor:
    """Without gaps, whatever the strides of ``x``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def rows_contiguous(x: Tensor) -> Tensor:
    """Kernels take any strides but the last; only such an input is copied."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
