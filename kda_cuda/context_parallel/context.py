"""The context of a call: what is built once for a batch, checked on all ranks, and handed to every layer."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import INDEX_DTYPES, Checker, check_boundaries, check_contents, cu_seqlens_list
from .exchange import agree
from .routes import LAYOUTS, Part, Piece, Route, even_lengths, piece_of, slots_of

__all__ = ["CPContext", "build_cp_context", "local_cp_contexts", "route_of", "sequences_of_context"]


@dataclass(frozen=True, kw_only=True)
class CPContext:
    """What one rank knows of the sequences of all ranks. Made by :func:`build_cp_context`.

    Up to ``pre_num_conv_tokens_by_part`` the fields have the names and meanings of flash-linear-attention's context.
    """

    group: Any  # the process group; None: a rank that is simulated (local_cp_contexts)
    cu_seqlens: Tensor  # int32 [local sequences + 1]: those of this rank's tokens, where the caller's cu_seqlens is
    cu_seqlens_cpu: Tensor  # the same on the CPU
    conv1d_kernel_size: int | None
    layout: str
    is_first_rank: bool | None = None  # contiguous layout: whether the first local sequence begins here
    is_last_rank: bool | None = None  # whether the last one ends here
    pre_num_ranks: int | None = None  # how many ranks before, and
    post_num_ranks: int | None = None  # after this one share these sequences
    pre_num_conv_tokens: int | None = None  # tokens of the first sequence on ranks before
    part_len: int | None = None  # zigzag layout: tokens of the front part
    front_num_seqs: int | None = None  # local sequences of the front part
    is_first_by_part: tuple[bool, bool] | None = None  # the fields above, of front and back
    is_last_by_part: tuple[bool, bool] | None = None
    pre_num_ranks_by_part: tuple[int, int] | None = None
    post_num_ranks_by_part: tuple[int, int] | None = None
    pre_num_conv_tokens_by_part: tuple[int, int] | None = None
    sequences: tuple[int, ...]  # which of the whole each local sequence is; -1: none, an empty one of its own
    starts: tuple[int, ...]  # the first token of every part of the whole, and the number of tokens
    rank: int
    world_size: int
    exchanges: bool  # whether any sequence lies on several ranks

    @property
    def num_seqs(self) -> int:
        """How many local sequences there are."""
        return len(self.sequences)

    @property
    def is_cp_enabled(self) -> bool:
        return self.group is not None

    @property
    def slots(self) -> tuple[int, ...]:
        """The parts of the whole that this rank has."""
        return slots_of(self.rank, self.world_size, self.layout)

    @property
    def num_tokens(self) -> int:
        """How many tokens this rank has."""
        return sum(self.starts[s + 1] - self.starts[s] for s in self.slots)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's tokens of a tensor ``x`` that has all of them along ``dim``."""
        pieces = [x.narrow(dim, self.starts[s], self.starts[s + 1] - self.starts[s]) for s in self.slots]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def build_cp_context(
    cu_seqlens: Tensor,
    group: Any,
    conv1d_kernel_size: int | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    use_tf32x3_affine_chain: bool = True,
    layout: str = "contiguous",
    *,
    tokens: int | None = None,
) -> CPContext:
    """Divides sequences among the ranks of a group; every rank calls it, with the same sequences.

    The arguments are those of flash-linear-attention's function of this name. Beyond it, ranks may have any number of
    tokens, also none, and empty sequences keep their states. A small description is exchanged once, here: a mismatch
    is an error on every rank.

    Args:
        cu_seqlens: int32 or int64 ``[N + 1]``: sequence n is tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]`` of the
            whole. Together they are all tokens.
        group: the ``torch.distributed`` process group of the ranks, with NCCL for CUDA tensors or gloo.
        conv1d_kernel_size: taps of the short convolutions, at least 1, for :func:`exchange_conv_tails`.
        cu_seqlens_cpu: the same as cu_seqlens, on the CPU; without it a cu_seqlens on the GPU is read once.
        use_tf32x3_affine_chain: must be True. The chain is computed more exactly than that, in float64.
        layout: "contiguous": rank r has the r-th part of the tokens. "zigzag": of twice as many parts, rank r has the
            r-th, and after it the r-th from the end.
        tokens: how many tokens this rank has, in the contiguous layout; they add up to ``cu_seqlens[-1]``. Default:
            parts as ``torch.tensor_split`` makes them; they differ by one token at most.

    Returns:
        A :class:`CPContext`, for ``cp_context`` of :func:`kda_cuda.chunk_kda` and of the layers.

    Raises:
        ValueError, TypeError: an argument does not fit, here or on another rank; the message names it.

    Example:
        >>> import os, tempfile, torch, torch.distributed as dist
        >>> from kda_cuda.parallel import build_cp_context
        >>> os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        >>> store = f"file://{tempfile.mkdtemp()}/store"
        >>> dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        >>> context = build_cp_context(torch.tensor([0, 70, 100]), dist.group.WORLD)
        >>> context.cu_seqlens.tolist(), context.is_last_rank
        ([0, 70, 100], True)
        >>> dist.destroy_process_group()
    """
    c = Checker("build_cp_context")
    if not isinstance(group, dist.ProcessGroup):
        raise c.type_error(f"group is a {type(group).__name__}, expected a torch.distributed.ProcessGroup")
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise c.value_error("group is one that this process is not a member of, expected one of its own")
    bounds, failure = [0, 0], None
    try:
        bounds = _checked_sequences(c, cu_seqlens, cu_seqlens_cpu)
        _check_options(c, conv1d_kernel_size, use_tf32x3_affine_chain, layout, tokens)
    except (TypeError, ValueError) as error:
        failure = error
    own = {
        "world size": ranks,
        "layout (0 contiguous, 1 zigzag)": LAYOUTS.index(layout) if layout in LAYOUTS else -1,
        "conv1d_kernel_size": conv1d_kernel_size if failure is None and conv1d_kernel_size else -1,
        "the number of sequences": len(bounds) - 1,
        "the number of tokens": bounds[-1],
        "the checksum of cu_seqlens": _checksum(bounds),
        "tokens": -1 if failure is not None or tokens is None else tokens,
    }
    device = cu_seqlens.device if isinstance(cu_seqlens, Tensor) else torch.device("cpu")
    lengths = [theirs[-1] for theirs in agree(c, group, device, own, failure)]
    starts = _starts(c, bounds, ranks, layout, None if lengths == [-1] * ranks else lengths)
    return _context(group, rank, ranks, bounds, starts, conv1d_kernel_size, layout, device)


def local_cp_contexts(
    cu_seqlens: Tensor,
    world_size: int,
    conv1d_kernel_size: int | None = None,
    layout: str = "contiguous",
    tokens: Sequence[int] | None = None,
) -> list[CPContext]:
    """The contexts of ``world_size`` ranks that are simulated in this process, for :func:`run_local`.

    Args:
        cu_seqlens, conv1d_kernel_size, layout: as in :func:`build_cp_context`.
        world_size: how many ranks, at least 1.
        tokens: of each rank, in the contiguous layout.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    c = Checker("local_cp_contexts")
    bounds = _checked_sequences(c, cu_seqlens, None)
    c.integer("world_size", world_size)
    if world_size < 1:
        raise c.value_error(f"world_size is {world_size}, expected >= 1")
    if tokens is not None and len(tokens) != world_size:
        raise c.value_error(f"tokens has {len(tokens)} elements, expected world_size={world_size}")
    for n in tokens if tokens is not None else (None,):
        _check_options(c, conv1d_kernel_size, True, layout, n)
    starts = _starts(c, bounds, world_size, layout, tokens)
    options = (bounds, starts, conv1d_kernel_size, layout, cu_seqlens.device)
    return [_context(None, rank, world_size, *options) for rank in range(world_size)]


def _checked_sequences(c: Checker, cu_seqlens: Tensor, cu_seqlens_cpu: Tensor | None) -> list[int]:
    """The boundaries on the host."""
    for name, x in (("cu_seqlens", cu_seqlens), ("cu_seqlens_cpu", cu_seqlens_cpu)):
        if x is None and name == "cu_seqlens_cpu":
            continue
        c.tensor(name, x)
        if name == "cu_seqlens_cpu":
            c.device(name, x, torch.device("cpu"))
        c.rank(name, x, "N+1")
        c.dtype(name, x, INDEX_DTYPES)
        if x.shape[0] < 2:
            raise c.value_error(f"{name} has shape {list(x.shape)}, expected [N+1] with N >= 1")
    if cu_seqlens_cpu is not None:
        c.shape("cu_seqlens_cpu", cu_seqlens_cpu, **{"N+1": cu_seqlens.shape[0]})
    read, name = (cu_seqlens, "cu_seqlens") if cu_seqlens_cpu is None else (cu_seqlens_cpu, "cu_seqlens_cpu")
    bounds = cu_seqlens_list(read)
    check_boundaries(c, name, read, bounds[-1])
    return bounds


def _check_options(c: Checker, taps: int | None, tf32x3: bool, layout: str, tokens: int | None) -> None:
    if taps is not None:
        c.integer("conv1d_kernel_size", taps)
        if taps < 1:
            raise c.value_error(f"conv1d_kernel_size is {taps}, expected >= 1")
    if tf32x3 is not True:
        raise c.value_error(f"use_tf32x3_affine_chain is {tf32x3!r}, expected True: the chain is always exact")
    c.choice("layout", layout, LAYOUTS)
    if tokens is not None:
        c.integer("tokens", tokens)
        if tokens < 0:
            raise c.value_error(f"tokens is {tokens}, expected >= 0")
        if layout == "zigzag":
            raise c.value_error(f"tokens is {tokens} in the zigzag layout, expected None")


def _checksum(bounds: Sequence[int]) -> int:
    return int.from_bytes(hashlib.sha256(str(list(bounds)).encode()).digest()[:7], "big")


def _starts(c: Checker, bounds: list[int], ranks: int, layout: str, lengths: Sequence[int] | None) -> list[int]:
    """The first token of every slot, and the number of tokens; ``lengths``: of the ranks, if they chose them."""
    total = bounds[-1]
    if lengths is None:
        lengths = even_lengths(total, ranks if layout == "contiguous" else 2 * ranks)
    elif -1 in lengths:
        raise c.value_error(f"tokens is None on rank {list(lengths).index(-1)}, expected a number as on other ranks")
    elif sum(lengths) != total:
        raise c.value_error(
            f"tokens is {list(lengths)} on the ranks, together {sum(lengths)}, expected cu_seqlens[-1]={total}"
        )
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def _context(
    group: Any,
    rank: int,
    ranks: int,
    bounds: list[int],
    starts: list[int],
    taps: int | None,
    layout: str,
    device: torch.device,
) -> CPContext:
    pieces = [piece_of(bounds, starts, slot) for slot in slots_of(rank, ranks, layout)]
    local = [*pieces[0].bounds]
    for piece in pieces[1:]:
        local += [local[-1] + bound for bound in piece.bounds[1:]]
    inside = set(starts[1:-1]) - {0, starts[-1]}
    cu_seqlens_cpu = torch.tensor(local, dtype=torch.int32)
    return CPContext(
        group=group,
        cu_seqlens=cu_seqlens_cpu.to(device),
        cu_seqlens_cpu=cu_seqlens_cpu,
        conv1d_kernel_size=taps,
        layout=layout,
        sequences=tuple(n for piece in pieces for n in piece.sequences),
        starts=tuple(starts),
        rank=rank,
        world_size=ranks,
        exchanges=not inside <= set(bounds),
        **(_contiguous_fields(*pieces) if layout == "contiguous" else _zigzag_fields(*pieces)),
    )


def _contiguous_fields(piece: Piece) -> dict[str, object]:
    return {
        "is_first_rank": not piece.before,
        "is_last_rank": not piece.after,
        "pre_num_ranks": piece.before,
        "post_num_ranks": piece.after,
        "pre_num_conv_tokens": piece.past,
    }


def _zigzag_fields(front: Piece, back: Piece) -> dict[str, object]:
    pieces = (front, back)
    return {
        "part_len": front.bounds[-1],
        "front_num_seqs": len(front.sequences),
        "is_first_by_part": tuple(not piece.before for piece in pieces),
        "is_last_by_part": tuple(not piece.after for piece in pieces),
        "pre_num_ranks_by_part": tuple(piece.before for piece in pieces),
        "post_num_ranks_by_part": tuple(piece.after for piece in pieces),
        "pre_num_conv_tokens_by_part": tuple(piece.past for piece in pieces),
    }


FIELDS = (
    "group",
    "cu_seqlens",
    "layout",
    "pre_num_ranks",
    "post_num_ranks",
    "pre_num_conv_tokens",
    "front_num_seqs",
    "pre_num_ranks_by_part",
    "post_num_ranks_by_part",
    "pre_num_conv_tokens_by_part",
)


def route_of(c: Checker, context: Any) -> Route:
    """The route of a context of this package or of flash-linear-attention, known by its fields."""
    if missing := [name for name in FIELDS if not hasattr(context, name)]:
        kind = type(context).__name__
        raise c.type_error(f"cp_context is a {kind} without the field {missing[0]!r}, expected a CPContext")
    c.tensor("cp_context.cu_seqlens", context.cu_seqlens)
    c.choice("cp_context.layout", context.layout, LAYOUTS)
    if getattr(context, "pre_num_ranks_dev", None) is not None:
        raise c.value_error("cp_context.pre_num_ranks_dev is given, expected None: ranks are counted on the host here")
    ours = isinstance(context, CPContext)
    if context.group is None and not ours:
        raise c.value_error("cp_context.group is None, expected a process group")
    rank = context.rank if ours else dist.get_rank(context.group)
    ranks = context.world_size if ours else dist.get_world_size(context.group)
    exchanges = context.exchanges if ours else ranks > 1
    on_host = getattr(context, "cu_seqlens_cpu", None)
    bounds = cu_seqlens_list(context.cu_seqlens if on_host is None else on_host)
    return Route(rank, ranks, _parts(context, rank, ranks), tuple(bounds), exchanges)


def sequences_of_context(c: Checker, context: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The local sequences, on the device and on the CPU. ``cu_seqlens``: the caller's."""
    own = context.cu_seqlens
    if cu_seqlens is not None and cu_seqlens is not own:
        c.tensor("cu_seqlens", cu_seqlens)
        if cu_seqlens.shape != own.shape or (check_contents(cu_seqlens) and not torch.equal(cu_seqlens.to(own), own)):
            raise c.value_error("cu_seqlens differs from cp_context.cu_seqlens, expected None or the context's")
    return own, getattr(context, "cu_seqlens_cpu", None)


def _parts(x: Any, rank: int, ranks: int) -> tuple[Part, ...]:
    sequences = x.cu_seqlens.shape[0] - 1
    if x.layout == "contiguous":
        counts = (x.pre_num_ranks or 0, x.post_num_ranks or 0, x.pre_num_conv_tokens or 0)
        return (Part(rank, 0, sequences - 1, *counts),)
    front, back = zip(x.pre_num_ranks_by_part, x.post_num_ranks_by_part, x.pre_num_conv_tokens_by_part, strict=True)
    slots = slots_of(rank, ranks, x.layout)
    return Part(slots[0], 0, x.front_num_seqs - 1, *front), Part(slots[1], x.front_num_seqs, sequences - 1, *back)
