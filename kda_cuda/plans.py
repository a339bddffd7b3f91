"""How the compiled library would launch a call on a device, and what memory it needs: asked of the library itself."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from . import calls, variants
from .checks import MAX_KEY_DIM, Checker
from .native import DTYPE_CODES, compiled, on_device
from .reference.chunk_bwd import ALL_GRADIENTS


@dataclass(frozen=True)
class PlannedGpu:
    """A Hopper GPU that need not be there."""

    multiprocessors: int
    copy_tb_s: float  # what a copy reads and writes there, together, in TB/s


@dataclass(frozen=True)
class ChunkShape:
    """What a launch of the chunkwise forward or backward depends on, beside its options."""

    dtype: torch.dtype
    batch: int
    tokens: int
    sequences: int | None  # of cu_seqlens
    heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    device: torch.device | None = None  # which GPU is asked

    @classmethod
    def of(cls, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> ChunkShape:
        sequences = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return cls(q.dtype, *q.shape[:2], sequences, q.shape[2], *v.shape[2:3], q.shape[3], v.shape[3], q.device)

    def forward_plan(
        self,
        namespace: str,
        state_tokens: int = 64,
        batch_invariant: bool = False,
        planned: PlannedGpu | None = None,
    ) -> dict[str, str]:
        """Variant, grids, shared memory, workspace, split, predicted times; or one entry ``plan`` that says why there
        is none. ``state_tokens``: distance of kept states. ``planned``: instead of the device that there is."""
        sizes = (self.value_heads, self.key_dim, self.value_dim, state_tokens, batch_invariant)
        device = (planned.multiprocessors, planned.copy_tb_s) if planned else (0, 0.0)
        return self._plan(namespace, "kda_plan_chunk_fwd", sizes, device)

    def backward_plan(self, namespace: str, wanted: int = ALL_GRADIENTS) -> dict[str, str]:
        """Variant, rounds, workspace; or one entry ``plan``. ``wanted``: which gradients, as ``chunk_bwd`` takes it."""
        sizes = (self.heads, self.value_heads, self.key_dim, self.value_dim, wanted)
        return self._plan(namespace, "kda_plan_chunk_bwd", sizes)

    def _plan(self, namespace: str, name: str, sizes: tuple[int, ...], device: tuple = ()) -> dict[str, str]:
        sequences = -1 if self.sequences is None else self.sequences
        types = [ctypes.c_int, *[ctypes.c_longlong] * 2, *[ctypes.c_int] * (1 + len(sizes))]
        types += [ctypes.c_int, ctypes.c_double][: len(device)]
        arguments = (DTYPE_CODES[self.dtype], self.batch, self.tokens, sequences, *sizes, *device)
        with on_device(self.device):
            return _ask(namespace, name, types, arguments, "no variant fits this device")


def decode_plan(
    namespace: str,
    sizes: tuple[int, ...],
    state: Tensor | None,
    new_state: Tensor | None,
    v_first: bool,
    layer: bool = False,
    tree: bool = False,
) -> dict[str, str]:
    """Variant, grid, threads, shared memory of a decoding kernel. ``sizes``: tokens, sequences, HV, K, V."""
    pools = [(None, 0) if pool is None else (pool.data_ptr(), pool.stride(0)) for pool in (state, new_state)]
    dtype = next((pool.dtype for pool in (state, new_state) if pool is not None), torch.float32)
    types = [*[ctypes.c_int] * 4, ctypes.c_longlong, *[ctypes.c_int] * 4, *[ctypes.c_void_p, ctypes.c_longlong] * 2]
    arguments = (layer, tree, DTYPE_CODES[dtype], v_first, *sizes, *pools[0], *pools[1])
    return _ask(namespace, "kda_plan_decode", types, arguments, "there is nothing to do")


def _ask(namespace: str, name: str, types: list, arguments: tuple, why_none: str) -> dict[str, str]:
    """What the library's function ``name`` writes: lines of ``name=value``; or one entry ``plan``."""
    function = getattr(compiled(namespace), name, None)
    if function is None:
        return {"plan": "unknown: the library was built before it could be asked"}
    function.argtypes = [*types, ctypes.c_char_p, ctypes.c_int]
    text = ctypes.create_string_buffer(2048)
    written = function(*arguments, text, len(text))
    if written <= 0:
        return {"plan": f"none: {why_none}" if written == 0 else "unknown: the device cannot be asked"}
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
    backward: bool = False,
    heads: int | None = None,
) -> int:
    """Bytes of the ``workspace`` of :func:`prefill`, from shapes alone; never less for more tokens or sequences.

    What chunks need (for K >= 64 at most 1.5 times the bytes of q and k of all value heads, or 16 MB), two states per
    value head, and, where heads are few, room for the states of segments: at most a quarter of the first and 32 MB, or
    16 MB. ``explain`` tells the last as ``segment_bytes``.

    With ``backward``: the bytes that the backward of :func:`chunk_kda` allocates for itself, beside the gradients. That
    is at most a quarter of the device's memory, unless one value head needs more.

    Args:
        tokens: T, per batch row.
        value_heads, key_dim, value_dim: HV, K, V.
        dtype: of q.
        device: where the call will run. Kernels need a workspace; the PyTorch reference, which also serves the CPU,
            is counted as 0 bytes.
        batch: B.
        sequences: N, the sequences of cu_seqlens. Default: no cu_seqlens.
        deterministic: as :func:`prefill` will get it.
        backward: of the backward, with every gradient.
        heads: H, of q and k. Default: HV.

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
    heads = value_heads if heads is None else heads
    check_sizes(c, tokens, batch, sequences, heads, value_heads, key_dim, value_dim)
    c.boolean("backward", backward)
    invariant = calls.batch_invariant(c, deterministic)
    x = torch.empty(0, dtype=dtype, device=device)
    namespace, _ = variants.choose("chunk_fwd" if backward else "prefill", x)
    if backward:
        namespace, _ = variants.choose_backward("chunk_bwd", namespace, x, key_dim)
    if not variants.is_kernel(namespace, x):
        return 0
    shape = ChunkShape(dtype, batch, tokens, sequences, heads, value_heads, key_dim, value_dim, x.device)
    plan = shape.backward_plan(namespace) if backward else shape.forward_plan(namespace, batch_invariant=invariant)
    if "workspace_bytes" not in plan:
        raise RuntimeError(f"kda_cuda::workspace_size: {plan['plan']}")
    return int(plan["workspace_bytes"]) + int(plan.get("scratch_bytes", 0))


def check_sizes(
    c: Checker, tokens: int, batch: int, sequences: int | None, heads: int, value_heads: int, key_dim: int,
    value_dim: int,
) -> None:  # fmt: skip
    sizes = {"tokens": tokens, "value_heads": value_heads, "heads": heads, "key_dim": key_dim, "value_dim": value_dim,
             "batch": batch}  # fmt: skip
    for name, size in (sizes if sequences is None else sizes | {"sequences": sequences}).items():
        c.integer(name, size)
        if size < (0 if name in ("tokens", "batch") else 1):
            raise c.value_error(f"{name} is {size}, expected a size")
    if key_dim > MAX_KEY_DIM:
        raise c.value_error(f"key_dim is {key_dim}, expected at most {MAX_KEY_DIM}")
    if value_heads % heads:
        raise c.value_error(f"value_heads is {value_heads}, expected a multiple of heads={heads}")
    if sequences is not None and batch != 1:
        raise c.value_error(f"batch is {batch}, expected 1 with sequences")
