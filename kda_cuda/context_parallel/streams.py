"""What a layer needs of tokens on other ranks: the last inputs of its convolutions, the latents of its attention."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import Checker
from .context import route_of
from .exchange import by_slot, exchange, gather
from .routes import Route

__all__ = ["exchange_conv_tails", "gather_tokens", "key_spans"]


def exchange_conv_tails(x: Tensor, cp_context: Any, kernel_size: int | None = None) -> Tensor:
    """The inputs of a causal convolution that come before each part of this rank's tokens, with gradients.

    Args:
        x: ``[1, T, channels]``: the inputs of this rank's tokens, any floating dtype.
        cp_context: as in :func:`kda_cuda.chunk_kda`.
        kernel_size: taps; default: the ``conv1d_kernel_size`` of the context.

    Returns:
        ``[parts, kernel_size - 1, channels]``: the tokens before each part, the nearest one last. Zero where they
        belong to another sequence. They may come from several ranks. There is one part, or two in the zigzag layout.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    c = Checker("exchange_conv_tails")
    route = _route_of_tokens(c, x, cp_context)
    taps = cp_context.conv1d_kernel_size if kernel_size is None else kernel_size
    c.integer("kernel_size", taps)
    if cp_context.conv1d_kernel_size not in (None, taps):
        raise c.value_error(
            f"kernel_size is {taps}, expected cp_context.conv1d_kernel_size={cp_context.conv1d_kernel_size}"
        )
    if not route.exchanges or taps == 1:
        return x.new_zeros(len(route.parts), taps - 1, x.shape[2])
    _check_group(c, cp_context)
    return _Tails.apply(x, route, cp_context.group, taps - 1, _lengths(cp_context, route))


def _check_group(c: Checker, context: Any) -> None:
    if context.group is None:
        raise c.value_error("cp_context is one of local_cp_contexts, expected one of build_cp_context")


def _lengths(context: Any, route: Route) -> list[int]:
    """Tokens of every slot. Contexts of flash-linear-attention divide evenly."""
    if starts := getattr(context, "starts", None):
        return [end - begin for begin, end in itertools.pairwise(starts)]
    return [route.bounds[-1] // len(route.parts)] * route.slots


def _spans(route: Route) -> list[tuple[int, int]]:
    """The local tokens of each part."""
    return [(route.bounds[part.first], route.bounds[part.last + 1]) for part in route.parts]


class _Tails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, route: Route, group: Any, width: int, lengths: list[int]) -> Tensor:
        ctx.route, ctx.group, ctx.width, ctx.lengths, ctx.shape = route, group, width, lengths, x.shape
        tails = torch.stack([_last(x[0, begin:end], width) for begin, end in _spans(route)])
        everywhere = by_slot(gather(tails, group), route)
        heads = torch.zeros_like(tails)
        for head, part in zip(heads, route.parts, strict=True):
            for slot, theirs, own in _sources(part.slot, lengths, min(width, part.past)):
                head[width - own[1] : width - own[0]] = everywhere[slot, width - theirs[1] : width - theirs[0]]
        return heads

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_heads: Tensor):
        route, width = ctx.route, ctx.width
        d_heads = d_heads.clone()
        for d_head, part in zip(d_heads, route.parts, strict=True):
            d_head[: width - min(width, part.past)] = 0
        everywhere = by_slot(gather(d_heads, ctx.group), route)
        dx = d_heads.new_zeros(ctx.shape)
        for part, (_, end) in zip(route.parts, _spans(route), strict=True):
            for later in range(part.slot + 1, route.slots):
                for slot, theirs, own in _sources(later, ctx.lengths, width):
                    if slot == part.slot:
                        dx[0, end - theirs[1] : end - theirs[0]] += everywhere[later, width - own[1] : width - own[0]]
        return dx, None, None, None, None


def _last(x: Tensor, width: int) -> Tensor:
    """The last ``width`` of ``[tokens, channels]``; zeros before, if there are fewer."""
    return F.pad(x, (0, 0, max(0, width - x.shape[0]), 0))[-width:]


def _sources(slot: int, lengths: list[int], width: int) -> list[tuple[int, tuple[int, int], tuple[int, int]]]:
    """Where the ``width`` tokens before ``slot`` lie: slots, and in each a span counted from the end of its tokens.

    The second span is that of the same tokens, counted backwards from the beginning of ``slot``.
    """
    found, reached = [], 0
    for other in range(slot - 1, -1, -1):
        count = min(lengths[other], width - reached)
        if count:
            found.append((other, (0, count), (reached, reached + count)))
        reached += count
    return found


def _route_of_tokens(c: Checker, x: Tensor, cp_context: Any) -> Route:
    """The route of a context whose tokens on this rank are those of ``x``."""
    c.tensor("x", x)
    c.rank("x", x, "1, T, channels")
    route = route_of(c, cp_context)
    if x.shape[:2] != (1, route.bounds[-1]):
        raise c.value_error(f"x has shape {list(x.shape)}, expected [1, T={route.bounds[-1]}, channels]")
    return route


def gather_tokens(x: Tensor, cp_context: Any) -> Tensor:
    """The tokens of all ranks in their order, ``[1, all, channels]`` for ``x`` ``[1, T, channels]``, with gradients.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    c = Checker("gather_tokens")
    route = _route_of_tokens(c, x, cp_context)
    if route.ranks == 1 and len(route.parts) == 1:
        return x
    _check_group(c, cp_context)
    return _Gathered.apply(x, route, cp_context.group, _lengths(cp_context, route))


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, route: Route, group: Any, lengths: list[int]) -> Tensor:
        ctx.route, ctx.group, ctx.lengths = route, group, lengths
        longest = max(lengths)
        parts = torch.stack([F.pad(x[0, b:e], (0, 0, 0, longest - (e - b))) for b, e in _spans(route)])
        everywhere = by_slot(gather(parts, group), route)
        return torch.cat([own[:n] for own, n in zip(everywhere, lengths, strict=True)]).unsqueeze(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d: Tensor):
        """Each rank gets the gradients of its tokens from all, and adds them in the order of ranks."""
        route, lengths = ctx.route, ctx.lengths
        pieces = d[0].split(lengths)
        longest, order = max(lengths), route.slot_order()
        sent = d.new_zeros(route.slots, longest, d.shape[2])  # rank after rank and part after part
        for slot, place in enumerate(order):
            sent[place, : lengths[slot]] = pieces[slot]
        received = exchange(sent, ctx.group).view(route.ranks, len(route.parts), longest, d.shape[2])
        total = torch.zeros_like(received[0], dtype=torch.promote_types(d.dtype, torch.float32))
        for theirs in received:
            total += theirs
        own = [total[i, : lengths[part.slot]] for i, part in enumerate(route.parts)]
        return torch.cat(own).unsqueeze(0).to(d.dtype), None, None, None


def key_spans(cp_context: Any) -> list[tuple[int, int, int, int]]:
    """For each local sequence: its tokens here, and among all ranks' those that its last token sees (begin, end)."""
    route = route_of(Checker("key_spans"), cp_context)
    lengths, found = _lengths(cp_context, route), []
    for part, (start, _) in zip(route.parts, _spans(route), strict=True):
        ahead = sum(lengths[: part.slot]) - start
        for n in range(part.first, part.last + 1):
            begin, end = route.bounds[n : n + 2]
            past = part.past if n == part.first else 0
            found.append((begin, end, begin + ahead - past, end + ahead))
    return found
