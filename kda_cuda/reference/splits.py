"""Decayed scores inside a chunk, exact for every gate (kda.md §4).

A chunk is split in halves, the halves again, down to single tokens. Every pair (row r, column i < r) is separated by
exactly one split ``[lo, m, hi)`` and meets at its anchor ``m``:

    exp(G_r - G_i) = exp(g_m + ... + g_r) * exp(g_{i+1} + ... + g_{m-1})

Both exponents are sums from the anchor, never positive, and never a difference of longer sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def halves(chunk: int) -> Iterator[int]:
    """Half the length of the splits, level by level."""
    half = chunk // 2
    while half:
        yield half
        half //= 2


def sides(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views of the lower and the upper half of every split: ``[..., C, D] -> [..., splits, half, D]``."""
    x = x.unflatten(-2, (-1, 2, half))
    return x[..., 0, :, :], x[..., 1, :, :]


def sum_before(x: Tensor) -> Tensor:
    """``y_t = x_0 + ... + x_{t-1}`` along the tokens."""
    return torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :].cumsum(-2)], -2)


def sum_after(x: Tensor) -> Tensor:
    """``y_t = x_{t+1} + ... `` along the tokens."""
    return sum_before(x.flip(-2)).flip(-2)


def sum_from(x: Tensor) -> Tensor:
    """``y_t = x_t + x_{t+1} + ...`` along the tokens."""
    return x.flip(-2).cumsum(-2).flip(-2)


def split_decays(g: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """``exp`` of the sums from the anchors: for columns (lower half) and rows (upper half)."""
    lower, upper = sides(g, half)
    return sum_after(lower).exp(), upper.cumsum(-2).exp()


def blocks(a: Tensor, half: int) -> Tensor:
    """View of the split's blocks of ``[..., C, C]``: rows of the upper, columns of the lower half."""
    splits = a.shape[-1] // (2 * half)
    a = a.unflatten(-1, (splits, 2, half)).unflatten(-4, (splits, 2, half))
    return a.diagonal(dim1=-6, dim2=-3)[..., 1, :, 0, :, :].movedim(-1, -3)


def scores(q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``A_qk`` (lower triangle with the diagonal) and ``A_kk`` (strictly lower) of ``[..., C, K]`` inputs."""
    chunk = q.shape[-2]
    a_qk, a_kk = (q.new_zeros(*q.shape[:-1], chunk) for _ in range(2))
    for half in halves(chunk):
        column_decay, row_decay = split_decays(g, half)
        columns = sides(k, half)[0] * column_decay
        rows = torch.cat([sides(q, half)[1] * row_decay, sides(k, half)[1] * row_decay], -2)
        block = rows @ columns.transpose(-1, -2)
        blocks(a_qk, half).copy_(block[..., :half, :])
        blocks(a_kk, half).copy_(block[..., half:, :])
    a_qk.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    return a_qk, a_kk


def scores_bwd(da_qk: Tensor, da_kk: Tensor, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`scores`: dq, dk, dg. ``dg_t`` collects only the pairs that ``g_t`` decays (kda.md §3)."""
    dq, dk, dg = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(g)
    for half in halves(q.shape[-2]):
        column_decay, row_decay = split_decays(g, half)
        (k_lower, k_upper), q_upper = sides(k, half), sides(q, half)[1]
        columns = k_lower * column_decay
        rows = torch.cat([q_upper * row_decay, k_upper * row_decay], -2)
        block = torch.cat([blocks(da_qk, half), blocks(da_kk, half)], -2)
        d_rows = block @ columns
        dq_block = row_decay * d_rows[..., :half, :]
        dk_upper = row_decay * d_rows[..., half:, :]
        dk_lower = column_decay * (block.transpose(-1, -2) @ rows)
        sides(dq, half)[1].add_(dq_block)
        sides(dk, half)[1].add_(dk_upper)
        sides(dk, half)[0].add_(dk_lower)
        sides(dg, half)[1].add_(sum_from(q_upper * dq_block + k_upper * dk_upper))
        sides(dg, half)[0].add_(sum_before(k_lower * dk_lower))
    diagonal = da_qk.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return dq + diagonal * k, dk + diagonal * q, dg
