"""The layers of a hybrid KDA model. Parameters carry the names of the released Kimi-Linear checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import decoding_layer
from .ops import chunk_kda, fused_recurrent_kda

__all__ = ["GatedRMSNorm", "KDACache", "KimiDeltaAttention", "MLACache", "NoPEMultiLatentAttention", "ShortConvolution"]


@dataclass
class KDACache:
    """What a KDA layer keeps of the past: the same number of bytes after any number of tokens."""

    conv: Tensor  # [batch, 3 projections' channels, taps - 1]: the last inputs of the convolutions of q | k | v
    state: Tensor  # [batch, heads, value_dim, key_dim], fp32

    def reset_state(self) -> None:
        """Forgets everything but the last inputs of the convolutions."""
        self.state = torch.zeros_like(self.state)

    def nbytes(self) -> int:
        return self.conv.nbytes + self.state.nbytes


class MLACache:
    """The latents of the past tokens, in a buffer that doubles when it is full: appending stays O(1) a token."""

    def __init__(self, batch_size: int, width: int, device: torch.device, dtype: torch.dtype):
        self.buffer = torch.empty(batch_size, 16, width, device=device, dtype=dtype)
        self.length = 0

    def append(self, latents: Tensor) -> Tensor:
        """Adds ``[batch, tokens, width]`` and returns all latents so far."""
        end = self.length + latents.shape[1]
        if end > self.buffer.shape[1]:
            grown = self.buffer.new_empty(len(self.buffer), max(end, 2 * self.buffer.shape[1]), self.buffer.shape[2])
            grown[:, : self.length] = self.buffer[:, : self.length]
            self.buffer = grown
        self.buffer[:, self.length : end] = latents
        self.length = end
        return self.buffer[:, :end]

    def reset_state(self) -> None:
        self.length = 0

    def nbytes(self) -> int:
        """Of the latents held, not of the buffer's room to grow."""
        return self.buffer[:, : self.length].nbytes


class ShortConvolution(nn.Conv1d):
    r"""Causal depthwise convolution, then SiLU: :math:`y_{t,c} = SiLU(\sum_j w_{c,j} x_{t-taps+1+j,c})`.

    Args:
        channels: of the input ``[batch, tokens, channels]``.
        taps: how many tokens an output sees, its own included.

    Source: Kimi Linear report, section 4.
    """

    def __init__(self, channels: int, taps: int = 4):
        super().__init__(channels, channels, taps, groups=channels, bias=False)

    def forward(self, x: Tensor, past: Tensor | None = None) -> Tensor:
        """``past`` [batch, channels, taps - 1]: the inputs before x; None: zeros, the start of a sequence."""
        x = x.transpose(1, 2)
        taps = self.kernel_size[0]
        x = F.pad(x, (taps - 1, 0)) if past is None else torch.cat((past.to(x.dtype), x), dim=2)
        return F.silu(F.conv1d(x, self.weight, groups=self.groups)).transpose(1, 2)


class GatedRMSNorm(nn.Module):
    r""":math:`y = x / \sqrt{mean(x^2) + eps} \cdot weight \cdot \sigma(gate)` over the last dimension, in fp32.

    Source: Kimi Linear report, section 4 (the sigmoid output gate).
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps)
        return (normed * torch.sigmoid(gate.to(wide))).to(x.dtype)


class KimiDeltaAttention(nn.Module):
    """Kimi Delta Attention over ``[batch, tokens, hidden_size]``, in parallel or a few tokens on top of a cache.

    Projections, a causal convolution with SiLU on each of q, k and v, the gate
    ``-exp(A_log) softplus(f_b(f_a x) + dt_bias)``, ``beta = sigmoid(b x)``, l2-normalised q and k, the delta rule, and
    ``o_proj(RMSNorm(o) sigmoid(g_b(g_a x)))``. Source: Kimi Linear report, section 4.

    Args:
        hidden_size: width of the input and of the output.
        num_heads, head_dim: of q, k and v alike.
        conv_size: taps of the short convolutions.
        norm_eps: of the output norm.

    Example:
        >>> import torch
        >>> from kda_cuda.layers import KimiDeltaAttention
        >>> layer = KimiDeltaAttention(hidden_size=64, num_heads=2, head_dim=32)
        >>> layer(torch.randn(1, 10, 64)).shape
        torch.Size([1, 10, 64])
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, conv_size: int = 4, norm_eps: float = 1e-5):
        super().__init__()
        self.num_heads, self.head_dim, self.conv_size = num_heads, head_dim, conv_size
        width = num_heads * head_dim
        for name in ("q", "k", "v"):
            self.add_module(f"{name}_proj", nn.Linear(hidden_size, width, bias=False))
            self.add_module(f"{name}_conv1d", ShortConvolution(width, conv_size))
        self.f_a_proj = nn.Linear(hidden_size, head_dim, bias=False)
        self.f_b_proj = nn.Linear(head_dim, width, bias=False)
        self.b_proj = nn.Linear(hidden_size, num_heads, bias=False)
        self.g_a_proj = nn.Linear(hidden_size, head_dim, bias=False)
        self.g_b_proj = nn.Linear(head_dim, width, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.o_norm = GatedRMSNorm(head_dim, norm_eps)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.reset_gate_parameters()

    @torch.no_grad()
    def reset_gate_parameters(self) -> None:
        """Amplitudes A uniform in [1, 16]; time steps softplus(dt_bias) log-uniform in [1e-3, 1e-1]."""
        self.A_log.uniform_(1, 16).log_()
        dt = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        dt.add_(torch.log(-torch.expm1(-dt)))

    def _apply(self, fn, recurse=True):
        """Casting a model to 16 bits leaves A_log and dt_bias in fp32: they scale every decay of a whole context."""
        kept = [t for p in (self.A_log, self.dt_bias) for t in (p, p.grad) if t is not None]

        def keep_fp32(t: Tensor) -> Tensor:
            moved = fn(t)
            is_kept = moved.dtype != t.dtype and any(t is x for x in kept)
            return t.to(moved.device) if is_kept else moved

        return super()._apply(keep_fp32, recurse)

    def new_cache(self, batch_size: int) -> KDACache:
        weight = self.q_proj.weight
        conv = weight.new_zeros(batch_size, 3 * self.num_heads * self.head_dim, self.conv_size - 1)
        shape = (batch_size, self.num_heads, self.head_dim, self.head_dim)
        state = torch.zeros(shape, device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
        return KDACache(conv, state)

    def cache_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Of one sequence; ``tokens`` does not matter."""
        width = self.num_heads * self.head_dim
        return 3 * width * (self.conv_size - 1) * dtype.itemsize + width * self.head_dim * 4

    def _convolved(self, x: Tensor, cache: KDACache | None) -> list[Tensor]:
        """q, k, v ``[batch, tokens, heads, head_dim]``; the cache then holds the last inputs."""
        inputs = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        pasts = [None] * 3 if cache is None else cache.conv.chunk(3, dim=1)
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        heads = [
            conv(y, past).unflatten(-1, (self.num_heads, self.head_dim))
            for conv, y, past in zip(convolutions, inputs, pasts, strict=True)
        ]
        if cache is not None:
            streams = torch.cat((cache.conv, torch.cat(inputs, dim=-1).transpose(1, 2).to(cache.conv.dtype)), dim=2)
            cache.conv = streams[:, :, streams.shape[2] - self.conv_size + 1 :].contiguous()
        return heads

    def forward(self, x: Tensor, cache: KDACache | None = None) -> Tensor:
        """``cache`` is read, and brought forward past the tokens of x; without it x starts a sequence."""
        heads = (self.num_heads, self.head_dim)
        gate = self.f_b_proj(self.f_a_proj(x)).unflatten(-1, heads)
        beta = self.b_proj(x)
        output_gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, heads)
        single_step = cache is not None and x.shape[1] == 1
        if single_step and decoding_layer.serves(gate, self.head_dim, self.conv_size):
            return self.o_proj(self._fused_step(x, gate, beta, output_gate, cache).flatten(-2))
        q, k, v = self._convolved(x, cache)
        o, state = (fused_recurrent_kda if single_step else chunk_kda)(
            q, k, v, gate, beta,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            initial_state=None if cache is None else cache.state,
            output_final_state=cache is not None,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            state_v_first=True,
        )  # fmt: skip
        if cache is not None:
            cache.state = state
        return self.o_proj(self.o_norm(o, output_gate).flatten(-2))

    def _fused_step(self, x: Tensor, gate: Tensor, beta: Tensor, output_gate: Tensor, cache: KDACache) -> Tensor:
        """Everything between the projections in one launch; the cache is updated in place."""
        q, k, v = (
            proj(x).unflatten(-1, (self.num_heads, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return decoding_layer.decode_layer(
            q, k, v, gate, beta, output_gate,
            conv_state=cache.conv,
            conv_weights=(self.q_conv1d.weight, self.k_conv1d.weight, self.v_conv1d.weight),
            norm_weight=self.o_norm.weight,
            state=cache.state,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            norm_eps=self.o_norm.eps,
        )  # fmt: skip


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
    """

    def __init__(
        self, hidden_size: int, num_heads: int, kv_lora_rank: int, nope_dim: int, rope_dim: int, v_head_dim: int
    ):
        super().__init__()
        self.num_heads, self.kv_lora_rank = num_heads, kv_lora_rank
        self.nope_dim, self.rope_dim, self.v_head_dim = nope_dim, rope_dim, v_head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * (nope_dim + rope_dim), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, kv_lora_rank + rope_dim, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * (nope_dim + v_head_dim), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)

    def new_cache(self, batch_size: int) -> MLACache:
        weight = self.q_proj.weight
        return MLACache(batch_size, self.kv_lora_rank + self.rope_dim, weight.device, weight.dtype)

    def cache_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Of one sequence."""
        return tokens * (self.kv_lora_rank + self.rope_dim) * dtype.itemsize

    def forward(self, x: Tensor, cache: MLACache | None = None) -> Tensor:
        """``cache`` is read, and gets the latents of x; without it x starts a sequence."""
        queries = x.shape[1]
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        latent, shared_key = self.kv_a_proj_with_mqa(x).split((self.kv_lora_rank, self.rope_dim), dim=-1)
        normed = self.kv_a_layernorm(latent.to(self.kv_a_layernorm.weight.dtype))  # the two differ under autocast
        latents = torch.cat((normed.to(latent.dtype), shared_key), dim=-1)
        if cache is not None:
            latents = cache.append(latents)
            if queries == 1:
                return self.o_proj(self._attend_in_latent_space(q, latents))
        return self.o_proj(self._attend(q, latents))

    def _attend(self, q: Tensor, latents: Tensor) -> Tensor:
        """Queries ``[batch, heads, queries, key]`` of the last tokens, over keys and values expanded from latents."""
        latent, shared_key = latents.split((self.kv_lora_rank, self.rope_dim), dim=-1)
        kv = self.kv_b_proj(latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key, value = kv.split((self.nope_dim, self.v_head_dim), dim=-1)
        key = torch.cat((key, shared_key.unsqueeze(1).expand(-1, self.num_heads, -1, -1)), dim=-1)
        queries, past, mask = q.shape[2], key.shape[2] - q.shape[2], None
        if past:  # query i sees the past and the new tokens up to i
            mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=q.device).tril(past)
        o = F.scaled_dot_product_attention(q, key, value, attn_mask=mask, is_causal=not past)
        return o.transpose(1, 2).flatten(-2)

    def _attend_in_latent_space(self, q: Tensor, latents: Tensor) -> Tensor:
        """The same for one query, without expanding the past: (W_k c) . q = c . (W_k^T q), and likewise for W_v."""
        expand = self.kv_b_proj.weight.to(q.dtype).unflatten(0, (self.num_heads, -1))
        to_key, to_value = expand.split((self.nope_dim, self.v_head_dim), dim=1)
        q_nope, q_rope = q.split((self.nope_dim, self.rope_dim), dim=-1)
        q = torch.cat((q_nope @ to_key, q_rope), dim=-1)
        keys = latents.unsqueeze(1).expand(-1, self.num_heads, -1, -1)
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        o = F.scaled_dot_product_attention(q, keys, keys[..., : self.kv_lora_rank], scale=scale)
        return (o @ to_value.transpose(1, 2)).transpose(1, 2).flatten(-2)
