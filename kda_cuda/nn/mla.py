"""Multi-head latent attention without positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from ..checks import Checker
from ..context_parallel.streams import gather_tokens, key_spans
from .cache import MLACache, check_rows
from .latent_attention import ALIGNED, attend_to_latents
from .layouts import Documents, Layout, layout_of
from .modules import LatentRMSNorm, device_and_dtype, is_plain

__all__ = ["NoPEMultiLatentAttention"]


class NoPEMultiLatentAttention(nn.Module):
    """Causal softmax attention whose keys and values are expanded from one small latent a token; no positions.

    The ``rope_dim`` wide part of the key is shared by all heads and, without positions, not rotated. The cache holds
    the latent and that part alone. Source: Kimi Linear report, section 4 (NoPE MLA).

    Args:
        hidden_size: width of the input and of the output.
        num_heads: of queries, keys and values.
        kv_lora_rank: width of the latent.
        nope_dim, rope_dim: a key is ``nope_dim`` from the latent and ``rope_dim`` shared.
        v_head_dim: of a value.
        q_lora_rank: None, or the width of a latent of the queries, which ``q_b_proj`` expands after a norm.
        output_gate: whether the output of each head is multiplied by ``sigmoid(g_proj(x))``, as in Kimi K3.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kv_lora_rank: int,
        nope_dim: int,
        rope_dim: int,
        v_head_dim: int,
        *,
        q_lora_rank: int | None = None,
        output_gate: bool = False,
    ):
        super().__init__()
        self.options = {"q_lora_rank": q_lora_rank, "output_gate": output_gate}
        self.num_heads, self.kv_lora_rank = num_heads, kv_lora_rank
        self.nope_dim, self.rope_dim, self.v_head_dim = nope_dim, rope_dim, v_head_dim
        q_width = num_heads * (nope_dim + rope_dim)
        if q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=False)
            self.q_a_layernorm = LatentRMSNorm(q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(q_lora_rank, q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_lora_rank + rope_dim, bias=False)
        self.kv_a_layernorm = LatentRMSNorm(kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (nope_dim + v_head_dim), bias=False)
        self.g_proj = nn.Linear(hidden_size, num_heads * v_head_dim, bias=False) if output_gate else None
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)

    def new_cache(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MLACache:
        """For ``batch_size`` sequences that have not begun. Default: device and dtype of the layer's weights."""
        like = device_and_dtype(self)
        device, dtype = like[0] if device is None else torch.device(device), like[1] if dtype is None else dtype
        return MLACache(batch_size, self.kv_lora_rank + self.rope_dim, device, dtype)

    def cache_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Of one sequence."""
        return tokens * (self.kv_lora_rank + self.rope_dim) * dtype.itemsize

    def forward(
        self,
        x: Tensor,
        cache: MLACache | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        layout: Layout | None = None,
        cp_context: object | None = None,
    ) -> Tensor:
        """``[batch, tokens, hidden_size]`` for such an ``x``.

        Args:
            cache: it is read, and gets the latents of x; without it x starts the sequences.
            attention_mask, cu_seqlens, layout, cp_context: as in :class:`KimiDeltaAttention`. Every rank gathers the
                latents of all ranks, and expands those that its queries see.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        op = "NoPEMultiLatentAttention"
        check_rows(Checker(op), x, cache)
        if layout is None:
            own = layout_of(op, x, cache is not None, attention_mask, cu_seqlens, cp_context)
            return own.leave(self._forward(own.enter(x), cache, own))
        return self._forward(x, cache, layout)

    def _forward(self, x: Tensor, cache: MLACache | None, layout: Layout) -> Tensor:
        o = self._attended(x, cache, layout)
        return self.o_proj(o if self.g_proj is None else o * torch.sigmoid(self.g_proj(x)))

    def _attended(self, x: Tensor, cache: MLACache | None, layout: Layout) -> Tensor:
        """The output of all heads ``[batch, tokens, num_heads * v_head_dim]``."""
        low_rank = self.options["q_lora_rank"] is not None
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if low_rank else self.q_proj(x)
        q = q.unflatten(-1, (-1, self.nope_dim + self.rope_dim)).transpose(1, 2)
        latent, shared_key = self.kv_a_proj_with_mqa(x).split((self.kv_lora_rank, self.rope_dim), dim=-1)
        latents = torch.cat((self.kv_a_layernorm(latent), shared_key), dim=-1)
        if layout.cp_context is not None:
            return self._attend_elsewhere(q, latents, layout)
        if isinstance(layout, Documents):
            return self._attend_alone(q, latents, layout)
        starts = None if cache is None else cache.lengths
        if cache is not None and x.shape[1] == 1 and is_plain(self.kv_b_proj, nn.Linear):
            latents = cache.append(latents, layout.counts, 1 if torch.is_grad_enabled() else ALIGNED)
            seen, mask = (cache.length, None) if starts is None else (None, _visible(1, latents, starts)[:, 0, 0])
            return self._attend_in_latent_space(q, latents, seen, mask)
        if cache is not None:
            latents = cache.append(latents, layout.counts)
        return self._attend(q, latents, _visible(x.shape[1], latents, starts))

    def _attend_alone(self, q: Tensor, latents: Tensor, layout: Documents) -> Tensor:
        """Every document by itself; tokens after the last one get zeros."""
        spans = layout.spans()
        parts = [self._attend(q[:, :, begin:end], latents[:, begin:end], None) for begin, end in spans if begin < end]
        o = torch.cat(parts, dim=1) if parts else q.new_zeros(1, 0, q.shape[1] * self.v_head_dim)
        return F.pad(o, (0, 0, 0, q.shape[2] - o.shape[1]))

    def _attend_elsewhere(self, q: Tensor, latents: Tensor, layout: Layout) -> Tensor:
        """Documents that began on other ranks: the queries of this rank over the latents of all."""
        latents, parts = gather_tokens(latents, layout.cp_context), []
        for begin, end, first_key, last_key in key_spans(layout.cp_context):
            alike = end - begin in (0, 1, last_key - first_key)
            mask = None if alike else causal_lower_right(end - begin, last_key - first_key)
            parts.append(self._attend(q[:, :, begin:end], latents[:, first_key:last_key], mask))
        return torch.cat(parts, dim=1)

    def _attend(self, q: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Queries ``[batch, heads, queries, key]`` over keys and values expanded from latents.

        ``mask``: what a query sees; None: a single query sees everything, others themselves and what is before.
        """
        latent, shared_key = latents.split((self.kv_lora_rank, self.rope_dim), dim=-1)
        kv = self.kv_b_proj(latent).unflatten(-1, (q.shape[1], -1)).transpose(1, 2)
        key, value = kv.split((self.nope_dim, self.v_head_dim), dim=-1)
        key = torch.cat((key, shared_key.unsqueeze(1).expand(-1, q.shape[1], -1, -1)), dim=-1)
        causal = mask is None and q.shape[2] > 1
        o = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, is_causal=causal)
        return o.transpose(1, 2).flatten(-2)

    def _attend_in_latent_space(self, q: Tensor, latents: Tensor, seen: int | None, mask: Tensor | None) -> Tensor:
        """One query, without expanding the past: (W_k c) . q = c . (W_k^T q), and likewise for W_v.

        All heads then have the same keys and values. ``seen`` and ``mask`` are those of :func:`attend_to_latents`.
        """
        expand = self.kv_b_proj.weight.to(q.dtype).unflatten(0, (q.shape[1], -1))
        to_key, to_value = expand.split((self.nope_dim, self.v_head_dim), dim=1)
        q_nope, q_rope = q.squeeze(2).split((self.nope_dim, self.rope_dim), dim=-1)
        q = torch.cat((_by_head(q_nope, to_key), q_rope), dim=-1)
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        o = attend_to_latents(q, latents, self.kv_lora_rank, scale, seen, mask)
        return _by_head(o, to_value.transpose(1, 2)).flatten(1).unsqueeze(1)


def _by_head(x: Tensor, weights: Tensor) -> Tensor:
    """``[batch, heads, in]`` times ``[heads, in, out]``. A broadcast product copies the weights for every row."""
    return torch.bmm(x.transpose(0, 1), weights).transpose(0, 1)


def _visible(queries: int, latents: Tensor, starts: Tensor | None) -> Tensor | None:
    """What each of the last queries sees of ``latents`` ``[batch, keys, width]``: the past, and the new ones up to it.

    ``starts`` ``[batch]``: how many latents each row had before; None: all rows the same number. The mask is bool
    ``[queries, keys]`` or ``[batch, 1, queries, keys]``; None says the same as in :meth:`_attend`.
    """
    keys = latents.shape[1]
    if starts is not None:
        new = torch.arange(1, queries + 1, device=latents.device)
        seen = starts[:, None, None, None] + new[:, None]
        return torch.arange(keys, device=latents.device) < seen
    if queries == 1 or queries == keys:
        return None
    return torch.ones(queries, keys, dtype=torch.bool, device=latents.device).tril(keys - queries)
