"""Decayed scores inside a chunk, exact for every gate (docs/mathematics.md, section 4).

A chunk is split in halves, the halves again, down to single tokens. Every pair (row r, column i < r) is separated by
exactly one split ``[lo, m, hi)`` and meets at its anchor ``m``:

    exp(G_r - G_i) = exp(g_m + ... + g_r) * exp(g_{i+1} + ... + g_{m-1})

Both exponents are sums from the anchor, never positive, and never a difference of longer sums. All splits of one
length are one batch of products. Tensors are ``[..., C, D]``; a split level shows them as ``[..., splits, half, D]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


def sides(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views of the lower and the upper half of every split: ``[..., C, D] -> [..., splits, half, D]``."""
    x = x.unflatten(-2, (-1, 2, half))
    return x[..., 0, :, :], x[..., 1, :, :]


def blocks(a: Tensor, half: int) -> Tensor:
    """View of the splits' blocks of ``[..., C, C]``: rows of the upper, columns of the lower half."""
    splits = a.shape[-1] // (2 * half)
    a = a.unflatten(-1, (splits, 2, half)).unflatten(-4, (splits, 2, half))
    return a.diagonal(dim1=-6, dim2=-3)[..., 1, :, 0, :, :].movedim(-1, -3)


@dataclass
class Level:
    """The decays of blocks of ``half`` tokens: of a split of twice that length, the two sides of its anchor.

    Views that the next level overwrites.
    """

    half: int
    column: Tensor  # lower blocks, [..., splits, half, D]: exp(g_{i+1} + ... ) to the end of the block, the anchor
    row: Tensor  # upper blocks: exp(... + g_r) from the start of the block, the anchor

    def kept(self) -> Level:
        return Level(self.half, *(x.clone(memory_format=torch.contiguous_format) for x in (self.column, self.row)))


@dataclass
class ChunkDecays:
    gamma: Tensor  # exp(g_1 + ... + g_r), [..., C, D]
    to_end: Tensor  # exp(g_{i+1} + ... + g_C)


def levels(g: Tensor) -> Iterator[Level | ChunkDecays]:
    """The splits, shortest first, then the chunk. Decays over a block are made of those over its two halves.

    As products of decays, none above 1: the exponential of a sum would carry the rounding of the sum.
    """
    from_start = g.exp()  # up to and including this token
    to_end = torch.ones_like(g)  # after this token
    half = 1
    while half < g.shape[-2]:
        lower_from_start, upper_from_start = sides(from_start, half)
        lower_to_end, _ = sides(to_end, half)
        yield Level(half, lower_to_end, upper_from_start)
        lower_to_end *= upper_from_start[..., -1:, :]
        upper_from_start *= lower_from_start[..., -1:, :]
        half *= 2
    yield ChunkDecays(from_start, to_end)


def scores(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, ChunkDecays]:
    """``A_qk`` (lower triangle with the diagonal), ``A_kk`` (strictly lower), and the decays of the whole chunk."""
    chunk = q.shape[-2]
    a_qk, a_kk = (q.new_zeros(*q.shape[:-1], chunk) for _ in range(2))
    torch.linalg.vecdot(q, k, out=a_qk.diagonal(dim1=-2, dim2=-1))
    rows, columns = torch.empty_like(q), q.new_empty(*q.shape[:-2], chunk // 2, q.shape[-1])  # of every level in turn
    for level in levels(g):
        if isinstance(level, ChunkDecays):
            return a_qk, a_kk, level
        decayed_rows = decay_rows(q, k, level, rows)
        decayed_columns = torch.mul(sides(k, level.half)[0], level.column, out=columns.view(level.column.shape))
        block = decayed_rows @ decayed_columns.transpose(-1, -2)
        blocks(a_qk, level.half).copy_(block[..., : level.half, :])
        blocks(a_kk, level.half).copy_(block[..., level.half :, :])


def decay_rows(q: Tensor, k: Tensor, level: Level, out: Tensor) -> Tensor:
    """The upper halves of q, then of k, decayed from the anchor: ``[..., splits, 2 half, D]`` in the memory of out."""
    rows = out.view(*level.row.shape[:-2], 2 * level.half, q.shape[-1])
    torch.mul(sides(q, level.half)[1], level.row, out=rows[..., : level.half, :])
    torch.mul(sides(k, level.half)[1], level.row, out=rows[..., level.half :, :])
    return rows


class DecayGradient:
    """Collects dg by adding alone (docs/mathematics.md, section 3): ``dg_t`` gets only the paths that token t decays.

    A path that enters row r from an anchor, or from the state, is decayed by the tokens from there to r: ``dg_t`` sums
    the rows r >= t of its block. A path that leaves column i for an anchor, or for the end, is decayed by the tokens
    after i: ``dg_t`` sums the columns i < t. The sums are taken from both ends of ever shorter blocks, beginning with
    the chunk; all contributions to blocks of one length must be there before these are halved.
    """

    def __init__(self, rows: Tensor, columns: Tensor, state: Tensor):
        """Contributions over the whole chunk; ``state [..., 1, K]`` crosses it. All are taken over."""
        self._rows, self._columns = rows, columns
        self._dg = state.expand_as(rows).contiguous()

    def halve(self, half: int) -> None:
        """Blocks of ``2 half`` tokens become blocks of ``half``: what crosses the middle is known now."""
        lower, upper = sides(self._dg, half)
        lower += sides(self._rows, half)[1].sum(-2, keepdim=True)
        upper += sides(self._columns, half)[0].sum(-2, keepdim=True)

    def upper_rows(self, half: int) -> Tensor:
        return sides(self._rows, half)[1]

    def lower_columns(self, half: int) -> Tensor:
        return sides(self._columns, half)[0]

    def finish(self) -> Tensor:
        """At blocks of one token: no column is before it, and it is its only row."""
        return self._dg.add_(self._rows)


def scores_bwd(
    da_qk: Tensor, da_kk: Tensor, q: Tensor, k: Tensor, g: Tensor, dg: DecayGradient
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`scores`, ``dq`` and ``dk``; adds to ``dg``. Upper triangles are not read."""
    diagonal = da_qk.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    dq, dk, rows = diagonal * k, diagonal * q, torch.empty_like(q)
    splits = [level.kept() for level in levels(g) if isinstance(level, Level)]
    while splits:
        level = splits.pop()
        half = level.half
        (k_lower, k_upper), q_upper = sides(k, half), sides(q, half)[1]
        block = torch.cat([blocks(da_qk, half), blocks(da_kk, half)], -2)
        d_rows = block @ (k_lower * level.column)
        dq_upper = d_rows[..., :half, :].mul_(level.row)
        dk_upper = d_rows[..., half:, :].mul_(level.row)
        dk_lower = (block.transpose(-1, -2) @ decay_rows(q, k, level, rows)).mul_(level.column)
        sides(dq, half)[1].add_(dq_upper)
        sides(dk, half)[1].add_(dk_upper)
        sides(dk, half)[0].add_(dk_lower)
        dg.halve(half)
        dg.upper_rows(half).addcmul_(q_upper, dq_upper).addcmul_(k_upper, dk_upper)
        dg.lower_columns(half).addcmul_(k_lower, dk_lower)
    return dq, dk
