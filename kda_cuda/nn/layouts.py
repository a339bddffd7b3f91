"""How the sequences of a batch lie in its tensors: whole rows, rows with padding, or documents one after another."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..checks import INDEX_DTYPES, Checker, check_contents, check_cu_seqlens, cu_seqlens_list
from ..context_parallel.context import route_of

__all__ = ["Documents", "Layout", "PaddedRows", "Shard", "documents_of_positions", "layout_of"]

MASK_DTYPES = (torch.bool, torch.int64, torch.int32, torch.uint8, torch.int8, torch.int16)


class Layout:
    """Rows ``[batch, tokens]`` in which every token counts. The other layouts say more."""

    counts: Tensor | None = None  # [batch]: tokens of each row; None: all of them
    cu_seqlens: Tensor | None = None  # [documents + 1]
    cp_context: object | None = None  # of a row whose documents lie on several ranks

    def enter(self, x: Tensor) -> Tensor:
        """``x`` ``[batch, tokens, ...]`` of the caller in the order that the layers compute in."""
        return x

    def leave(self, y: Tensor) -> Tensor:
        """A result in the order of the caller."""
        return y

    def last(self, y: Tensor) -> Tensor:
        """``[batch, ...]`` of the caller's ``y`` ``[batch, tokens, ...]`` at the last token of each row."""
        return y[:, -1]


class PaddedRows(Layout):
    """Rows of different lengths. The layers see the tokens of a row at its front, in order, and zeros after them.

    In this order a causal layer needs no mask: what follows the tokens of a row cannot be seen by them.
    """

    def __init__(self, mask: Tensor):
        """``mask`` bool ``[batch, tokens]``: True for a token, False for padding, anywhere in the row."""
        self.mask = mask
        self.counts = mask.sum(1)
        self.order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        self.place = (mask.cumsum(1) - 1).clamp(min=0)

    def enter(self, x: Tensor) -> Tensor:
        return _along_tokens(x.masked_fill(~_like(self.mask, x), 0), self.order)

    def leave(self, y: Tensor) -> Tensor:
        """Padding gets zeros."""
        return _along_tokens(y, self.place).masked_fill(~_like(self.mask, y), 0)

    def padding(self, tokens: int) -> Tensor:
        """bool ``[batch, tokens]`` in the order of the layers: True where there is no token."""
        return torch.arange(tokens, device=self.counts.device) >= self.counts[:, None]

    def last(self, y: Tensor) -> Tensor:
        """In a row without tokens: at its last column."""
        tokens = self.mask.shape[1]
        column = tokens - 1 - self.mask.to(torch.uint8).flip(1).argmax(1)
        return torch.take_along_dim(y, _like(column.unsqueeze(1), y), dim=1).squeeze(1)


class Documents(Layout):
    """One row ``[1, tokens]`` of documents: n is tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``.

    Tokens after the last one are padding. The layers see zeros there, whatever the caller left.
    """

    def __init__(self, cu_seqlens: Tensor):
        self.cu_seqlens = cu_seqlens
        self._bounds: list[int] | None = None

    def enter(self, x: Tensor) -> Tensor:
        if check_contents(self.cu_seqlens) and self.spans()[-1][1] == x.shape[1]:
            return x
        padding = torch.arange(x.shape[1], device=x.device) >= self.cu_seqlens[-1]
        return x.masked_fill(_like(padding[None], x), 0)

    def spans(self) -> list[tuple[int, int]]:
        """Begin and end of each document, on the host: read once for all layers."""
        if self._bounds is None:
            self._bounds = cu_seqlens_list(self.cu_seqlens)
        return list(itertools.pairwise(self._bounds))


class Shard(Documents):
    """The tokens of one rank: documents of which the first may have begun, and the last may go on, on other ranks."""

    def __init__(self, c: Checker, cp_context: object):
        self.route = route_of(c, cp_context)
        super().__init__(cp_context.cu_seqlens)
        self.cp_context, self._bounds = cp_context, list(self.route.bounds)
        self._firsts: Tensor | None = None

    def enter(self, x: Tensor) -> Tensor:
        return x

    def pasts(self, heads: Tensor) -> Tensor:
        """What comes before each document ``[documents, ...]``, from what comes before each part ``[parts, ...]``.

        Only the first document of a part has begun elsewhere. The others have zeros before them.
        """
        if self._firsts is None:
            firsts = [part.first for part in self.route.parts]
            self._firsts = torch.tensor(firsts, dtype=torch.int64, device=self.cu_seqlens.device)
        return heads.new_zeros(len(self.cu_seqlens) - 1, *heads.shape[1:]).index_copy(0, self._firsts, heads)


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(*mask.shape, *[1] * (x.dim() - 2))


def _along_tokens(x: Tensor, index: Tensor) -> Tensor:
    return torch.take_along_dim(x, _like(index, x), dim=1)


def layout_of(
    op: str,
    x: Tensor,
    cached: bool,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cp_context: object | None = None,
) -> Layout:
    """The layout of ``x`` ``[batch, tokens, ...]``, after the checks of what describes it.

    ``cached``: whether there is a cache. An ``attention_mask`` may then begin with the columns of past tokens.
    """
    c = Checker(op)
    if cp_context is not None:
        others = {"cache": cached, "attention_mask": attention_mask is not None, "cu_seqlens": cu_seqlens is not None}
        if given := [name for name, there in others.items() if there]:
            raise c.value_error(f"cp_context and {given[0]} are given, expected one of them")
        shard = Shard(c, cp_context)
        if x.shape[:2] != (1, shard.route.bounds[-1]):
            expected = f"[1, T={shard.route.bounds[-1]}, ...]"
            raise c.value_error(f"the input has shape {list(x.shape)}, expected {expected} with this cp_context")
        return shard
    if cu_seqlens is not None:
        if attention_mask is not None:
            raise c.value_error("attention_mask and cu_seqlens are given, expected one of them")
        if cached:
            raise c.value_error("cache and cu_seqlens are given, expected one of them: a cache has a row a sequence")
        check_cu_seqlens(c, x, cu_seqlens, None)
        return Documents(cu_seqlens.contiguous())
    if attention_mask is None:
        return Layout()
    mask = _checked_mask(c, x, cached, attention_mask)
    if check_contents(mask) and bool(mask.all()):  # rows stay of one length, and cost no masks
        return Layout()
    return PaddedRows(mask)


def _checked_mask(c: Checker, x: Tensor, cached: bool, mask: Tensor) -> Tensor:
    batch, tokens = x.shape[:2]
    c.tensor("attention_mask", mask)
    c.device("attention_mask", mask, x.device)
    c.rank("attention_mask", mask, "batch, tokens")
    c.dtype("attention_mask", mask, MASK_DTYPES)
    with_past = cached and mask.shape[0] == batch and mask.shape[1] >= tokens
    if not with_past:
        c.shape("attention_mask", mask, batch=batch, tokens=tokens)
    return mask[:, mask.shape[1] - tokens :] != 0


def documents_of_positions(op: str, x: Tensor, position_ids: Tensor) -> Tensor:
    """``cu_seqlens`` of the rows ``x`` ``[batch, tokens]``, laid end to end, whose positions restart with a document.

    A document begins with every row and wherever a position is not its predecessor's plus one.
    """
    c = Checker(op)
    c.tensor("position_ids", position_ids)
    c.device("position_ids", position_ids, x.device)
    c.dtype("position_ids", position_ids, INDEX_DTYPES)
    c.shape("position_ids", position_ids, batch=x.shape[0], tokens=x.shape[1])
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    starts = begins.flatten().nonzero().flatten()
    if not len(starts):
        starts = starts.new_zeros(1)
    return torch.cat((starts, starts.new_tensor([x.shape[0] * x.shape[1]])))
