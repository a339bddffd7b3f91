"""Attention of one query of each head over latents that all heads share, as MLA decodes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ALIGNED", "attend_to_latents"]

# One product of [heads, keys] and [keys, width] has too few tiles for a GPU unless many sequences take part. Fewer than
# so many get so many pieces each, of at least so many keys, whose results are added.
FEW_SEQUENCES, PIECES, PIECE_KEYS = 32, 128, 256
# softmax has one block a row. Fewer rows than so many, of at least so many keys, are reduced by ops that split a row.
FEW_ROWS, LONG_ROW = 256, 8192
ALIGNED = 64  # keys: products of other numbers of them run without the wide loads of the tensor cores


def attend_to_latents(
    q: Tensor, latents: Tensor, rank: int, scale: float, seen: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """``softmax(scale q . latents)`` over the keys, times the first ``rank`` numbers of each latent.

    Args:
        q: ``[batch, heads, width]``.
        latents: ``[batch, keys, width]``, keys and values of all heads; a multiple of ``ALIGNED`` of them is fastest.
        seen: so many keys count; those behind are finite. Default: all.
        mask: bool ``[batch, keys]``, True for what counts of these. Default: all. Every row sees something.

    Returns:
        ``[batch, heads, rank]`` in the dtype of q. With 16 bits the scores and sums are fp32, and the weights are
        rounded to 16 bits, as in flash attention.
    """
    in_products = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if in_products and not (torch.is_grad_enabled() and (q.requires_grad or latents.requires_grad)):
        return _in_products(q, latents, rank, scale, seen, mask, torch.bmm)
    keys = latents[:, :seen].unsqueeze(1)
    mask = None if mask is None else mask[:, None, None, :seen]
    o = F.scaled_dot_product_attention(q.unsqueeze(1), keys, keys[..., :rank], attn_mask=mask, scale=scale)
    return o.squeeze(1)


def _in_products(
    q: Tensor, latents: Tensor, rank: int, scale: float, seen: int | None, mask: Tensor | None, product
) -> Tensor:
    """Without the copies of the latents in fp32 that scaled_dot_product_attention makes at such a width.

    ``product`` is torch.bmm, or what stands for it where it has no ``out_dtype``.
    """
    scores = product(q, latents.transpose(1, 2), out_dtype=torch.float32)
    if seen is not None:
        scores[..., seen:] = float("-inf")
    if mask is not None:
        scores.masked_fill_(~mask[:, None], float("-inf"))
    weights, total = _exponentials(scores, scale, q.dtype)
    o = _weighted_sum(weights, latents[..., :rank], product)
    return (o if total is None else o / total).to(q.dtype)


def _exponentials(scores: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """``softmax(scale scores)`` in ``dtype``; or ``exp(scale (scores - their maximum))``, and its sum. Overwrites."""
    batch, heads, keys = scores.shape
    if batch * heads >= FEW_ROWS or keys < LONG_ROW:
        return torch.softmax(scores.mul_(scale), -1).to(dtype), None
    top = scores.amax(-1, keepdim=True)
    torch.add(top * -scale, scores, alpha=scale, out=scores).exp_()
    return scores.to(dtype), scores.sum(-1, keepdim=True)


def _weighted_sum(weights: Tensor, values: Tensor, product) -> Tensor:
    """``weights @ values`` in fp32, ``[batch, heads, keys]`` and ``[batch, keys, width]``."""
    batch, keys = values.shape[:2]
    if batch >= FEW_SEQUENCES or keys < 2 * PIECE_KEYS:
        return product(weights, values, out_dtype=torch.float32)
    return torch.stack([_sum_in_pieces(w, v, product) for w, v in zip(weights, values, strict=True)])


def _sum_in_pieces(weights: Tensor, values: Tensor, product) -> Tensor:
    """Of one sequence, without a copy of any piece."""
    keys = len(values)
    size = max(PIECE_KEYS, keys // PIECES // 64 * 64)
    whole = keys // size * size
    pieces = weights[:, :whole].unflatten(1, (-1, size)).transpose(0, 1)
    total = product(pieces, values[:whole].unflatten(0, (-1, size)), out_dtype=torch.float32).sum(0)
    if whole == keys:
        return total
    return total + product(weights[None, :, whole:], values[None, whole:], out_dtype=torch.float32)[0]
