"""Attention of one query of each head over latents that all heads share, as MLA decodes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["attend_to_latents"]

# One product of [heads, keys] and [keys, width] has too few tiles for a GPU unless many sequences take part. Fewer than
# so many get so many pieces each, of at least so many keys, whose results are added.
FEW_SEQUENCES, PIECES, PIECE_KEYS = 32, 128, 256


def attend_to_latents(q: Tensor, latents: Tensor, rank: int, scale: float, mask: Tensor | None = None) -> Tensor:
    """``softmax(scale q . latents)`` over the keys, times the first ``rank`` numbers of each latent.

    Args:
        q: ``[batch, heads, width]``.
        latents: ``[batch, keys, width]``, keys and values of all heads.
        mask: bool ``[batch, keys]``, True for what is seen; None: all. Every row sees something.

    Returns:
        ``[batch, heads, rank]`` in the dtype of q. With 16 bits the scores and sums are fp32, and the weights are
        rounded to 16 bits, as in flash attention.
    """
    in_products = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if in_products and not (torch.is_grad_enabled() and (q.requires_grad or latents.requires_grad)):
        return _in_products(q, latents, rank, scale, mask, torch.bmm)
    mask = None if mask is None else mask[:, None, None]
    keys = latents.unsqueeze(1)
    o = F.scaled_dot_product_attention(q.unsqueeze(1), keys, keys[..., :rank], attn_mask=mask, scale=scale)
    return o.squeeze(1)


def _in_products(q: Tensor, latents: Tensor, rank: int, scale: float, mask: Tensor | None, product) -> Tensor:
    """Without the copies of the latents in fp32 that scaled_dot_product_attention makes at such a width.

    ``product`` is torch.bmm, or what stands for it where it has no ``out_dtype``.
    """
    scores = product(q, latents.transpose(1, 2), out_dtype=torch.float32).mul_(scale)
    if mask is not None:
        scores.masked_fill_(~mask[:, None], float("-inf"))
    weights, values = torch.softmax(scores, -1).to(q.dtype), latents[..., :rank]
    batch, keys = latents.shape[:2]
    if batch >= FEW_SEQUENCES or keys < 2 * PIECE_KEYS:
        return product(weights, values, out_dtype=torch.float32).to(q.dtype)
    return torch.stack([_sum_in_pieces(w, v, product) for w, v in zip(weights, values, strict=True)]).to(q.dtype)


def _sum_in_pieces(weights: Tensor, values: Tensor, product) -> Tensor:
    """``weights @ values`` in fp32, ``[heads, keys]`` and ``[keys, width]``. No piece is copied."""
    keys = len(values)
    size = max(PIECE_KEYS, keys // PIECES // 64 * 64)
    whole = keys // size * size
    pieces = weights[:, :whole].unflatten(1, (-1, size)).transpose(0, 1)
    total = product(pieces, values[:whole].unflatten(0, (-1, size)), out_dtype=torch.float32).sum(0)
    if whole == keys:
        return total
    return total + product(weights[None, :, whole:], values[None, whole:], out_dtype=torch.float32)[0]
