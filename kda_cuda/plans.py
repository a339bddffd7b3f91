"""How the compiled library would launch a call on a device, and what memory it needs: asked of the library itself."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import calls, variants
from .build_info import ops_library
from .checks import MAX_KEY_DIM, Checker
from .library import NAMESPACE_EMULATED

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # csrc/kda/dtype.h


@functools.cache
def compiled(namespace: str) -> ctypes.CDLL:
    if namespace == NAMESPACE_EMULATED:
        from .testing import load_emulator

        return load_emulator()
    return ctypes.CDLL(str(ops_library()))


@contextlib.contextmanager
def planning_for(namespace: str, multiprocessors: int, copy_tb_s: float) -> Iterator[None]:
    """Inside, :meth:`ChunkCall.plan` tells of a Hopper GPU that need not be there.

    Args:
        namespace: whose library.
        multiprocessors: of that GPU.
        copy_tb_s: what a copy reads and writes there, together, in TB/s.
    """
    function = compiled(namespace).kda_plan_for
    function.argtypes, function.restype = [ctypes.c_int, ctypes.c_double], None
    function(multiprocessors, copy_tb_s)
    try:
        yield
    finally:
        function(0, 0.0)


@dataclass(frozen=True)
class ChunkCall:
    """What a launch of the chunkwise forward depends on: shapes alone."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    tokens: int
    sequences: int | None  # of cu_seqlens
    value_heads: int
    key_dim: int
    value_dim: int
    state_tokens: int = 64  # distance of kept states
    batch_invariant: bool = False

    @classmethod
    def of(cls, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, *more) -> ChunkCall:
        sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return cls(q.device, q.dtype, q.shape[0], q.shape[1], sequences, v.shape[2], q.shape[3], v.shape[3], *more)

    def plan(self, namespace: str) -> dict[str, str]:
        """Variant, grids, shared memory, workspace, split, predicted times; or one entry ``plan`` that says why there
        is none."""
        function = getattr(compiled(namespace), "kda_plan_chunk_fwd", None)
        if function is None:
            return _OLDER
        sizes = (
            self.batch, self.tokens, -1 if self.sequences is None else self.sequences, self.value_heads, self.key_dim,
            self.value_dim, self.state_tokens, self.batch_invariant,
        )  # fmt: skip
        types = [ctypes.c_int, *[ctypes.c_longlong] * 2, *[ctypes.c_int] * 6, ctypes.c_char_p, ctypes.c_int]
        function.argtypes = types
        text = ctypes.create_string_buffer(2048)
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with on_device:
            written = function(_DTYPE_CODES[self.dtype], *sizes, text, len(text))
        if written <= 0:
            why = "none: no variant fits this device" if written == 0 else "unknown: the device cannot be asked"
            return {"plan": why}
        return _lines(text)


def decode_plan(
    namespace: str,
    sizes: tuple[int, ...],
    state: Tensor | None,
    new_state: Tensor | None,
    v_first: bool,
    layer: bool = False,
) -> dict[str, str]:
    """Variant, grid, threads, shared memory of a decoding kernel. ``sizes``: tokens, sequences, HV, K, V."""
    function = getattr(compiled(namespace), "kda_plan_decode", None)
    if function is None:
        return _OLDER
    pools = [(None, 0) if pool is None else (pool.data_ptr(), pool.stride(0)) for pool in (state, new_state)]
    dtype = next((pool.dtype for pool in (state, new_state) if pool is not None), torch.float32)
    types = [*[ctypes.c_int] * 3, ctypes.c_longlong, *[ctypes.c_int] * 4, *[ctypes.c_void_p, ctypes.c_longlong] * 2]
    function.argtypes = [*types, ctypes.c_char_p, ctypes.c_int]
    text = ctypes.create_string_buffer(1024)
    arguments = (layer, _DTYPE_CODES[dtype], v_first, *sizes, *pools[0], *pools[1])
    if function(*arguments, text, len(text)) <= 0:
        return {"plan": "none: there is nothing to do"}
    return _lines(text)


_OLDER = {"plan": "unknown: the library was built before it could be asked"}


def _lines(text: ctypes.Array) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.value.decode().splitlines())


def workspace_size(
    *,
    tokens: int,
    value_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cuda",
    batch: int = 1,
    sequences: int | None = None,
    deterministic: bool | str = True,
) -> int:
    """Bytes of the ``workspace`` of :func:`prefill`, from shapes alone; never less for more tokens or sequences.

    What chunks need (for K >= 64 at most 1.5 times the bytes of q and k of all value heads, or 16 MB), two states per
    value head, and, where heads are few, room for the states of segments: at most a quarter of the first and 32 MB, or
    16 MB. ``explain`` tells the last as ``segment_bytes``.

    Args:
        tokens: T, per batch row.
        value_heads, key_dim, value_dim: HV, K, V.
        dtype: of q.
        device: where the call will run; on the CPU nothing is needed.
        batch: B.
        sequences: N, the sequences of cu_seqlens. Default: no cu_seqlens.
        deterministic: as :func:`prefill` will get it.

    Raises:
        ValueError, TypeError: an argument does not fit.
        RuntimeError: no kernel fits the device.

    Example:
        >>> import torch, kda_cuda
        >>> shape = {"value_heads": 32, "key_dim": 128, "value_dim": 128, "dtype": torch.bfloat16}
        >>> kda_cuda.workspace_size(tokens=8192, sequences=16, **shape, device="cpu")
        0
    """
    c = Checker("workspace_size")
    sizes = {"tokens": tokens, "value_heads": value_heads, "key_dim": key_dim, "value_dim": value_dim, "batch": batch}
    for name, size in (sizes if sequences is None else sizes | {"sequences": sequences}).items():
        c.integer(name, size)
        if size < (0 if name in ("tokens", "batch") else 1):
            raise c.value_error(f"{name} is {size}, expected a size")
    if key_dim > MAX_KEY_DIM:
        raise c.value_error(f"key_dim is {key_dim}, expected at most {MAX_KEY_DIM}")
    if sequences is not None and batch != 1:
        raise c.value_error(f"batch is {batch}, expected 1 with sequences")
    invariant = calls.batch_invariant(c, deterministic)
    x = torch.empty(0, dtype=dtype, device=device)
    namespace, _ = variants.choose("prefill", x)
    if not variants.is_kernel(namespace, x):
        return 0
    call = ChunkCall(
        x.device, dtype, batch, tokens, sequences, value_heads, key_dim, value_dim, batch_invariant=invariant
    )
    plan = call.plan(namespace)
    if "workspace_bytes" not in plan:
        raise RuntimeError(f"kda_cuda::workspace_size: {plan['plan']}")
    return int(plan["workspace_bytes"])
