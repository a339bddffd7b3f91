"""A hybrid language model: three layers of Kimi Delta Attention, then one of full attention, and so on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import Checker
from .nn.cache import KDACache, MLACache
from .nn.hybrid_cache import HybridCache
from .nn.kda import GATE_PARAMETERS, KimiDeltaAttention
from .nn.layouts import Layout, documents_of_positions, layout_of
from .nn.mla import NoPEMultiLatentAttention
from .nn.modules import device_and_dtype

__all__ = ["HybridCache", "HybridConfig", "HybridLM"]


@dataclass(frozen=True)
class HybridConfig:
    """Sizes of a :class:`HybridLM`. The defaults make the small byte-level model of the demo."""

    vocab_size: int = 256
    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 2
    head_dim: int = 64  # of KDA; also of the multi-head attention that cache sizes are compared with
    conv_size: int = 4
    full_attention_every: int = 4  # layers 4, 8, ... (and none other) are MLA: 3 KDA to 1 MLA
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 64
    intermediate_size: int = 352
    norm_eps: float = 1e-5

    def __post_init__(self):
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"HybridConfig: {name} is {value}, expected a positive number")

    def is_full_attention(self, layer: int) -> bool:
        """Whether the layer of this index, from 0, is MLA."""
        return (layer + 1) % self.full_attention_every == 0


class SwiGLU(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class HybridBlock(nn.Module):
    """Pre-norm residual block: attention of one of the two kinds, then SwiGLU."""

    def __init__(self, config: HybridConfig, full_attention: bool):
        super().__init__()
        c = config
        self.input_layernorm = nn.RMSNorm(c.hidden_size, c.norm_eps)
        if full_attention:
            self.self_attn = NoPEMultiLatentAttention(
                c.hidden_size, c.num_heads, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
            )
        else:
            self.self_attn = KimiDeltaAttention(c.hidden_size, c.num_heads, c.head_dim, c.conv_size, c.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, c.norm_eps)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor, cache: KDACache | MLACache | None, layout: Layout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache, layout=layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class HybridBackbone(nn.Module):
    def __init__(self, config: HybridConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            HybridBlock(config, config.is_full_attention(layer)) for layer in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, tokens: Tensor, cache: HybridCache | None, layout: Layout) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer, layer_cache in zip(self.layers, cache.layers if cache else [None] * len(self.layers), strict=True):
            x = layer(x, layer_cache, layout)
        return self.norm(x)


class HybridLM(nn.Module):
    """Kimi Delta Attention and NoPE MLA, 3 : 1, as a language model (Kimi Linear report, section 4).

    Example:
        >>> import torch
        >>> from kda_cuda.model import HybridConfig, HybridLM
        >>> model = HybridLM(HybridConfig(hidden_size=64, head_dim=32))
        >>> model(torch.zeros(1, 10, dtype=torch.long)).shape
        torch.Size([1, 10, 256])
        >>> model.generate(torch.zeros(1, 10, dtype=torch.long), max_new_tokens=5).shape
        torch.Size([1, 15])
    """

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        self.model = HybridBackbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.no_grad():
            self._reset_scaled_weights()

    @torch.no_grad()
    def reset_weights(self) -> None:
        """Sets every parameter as a new model has them: also after ``to_empty`` of a model built on ``meta``."""
        for module in self.modules():
            if module._parameters and not isinstance(module, nn.Linear | nn.Embedding | KimiDeltaAttention):
                module.reset_parameters()
        self._reset_scaled_weights()

    def _reset_scaled_weights(self) -> None:
        """Projections keep the scale of their input; those that end a residual branch are damped by the depth."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                damping = (2 * self.config.num_layers) ** -0.5 if name.endswith(("o_proj", "down_proj")) else 1
                nn.init.normal_(module.weight, std=damping * module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight)
            elif isinstance(module, KimiDeltaAttention):
                module.reset_gate_parameters()

    def forward(
        self,
        tokens: Tensor,
        cache: HybridCache | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        cp_context: object | None = None,
    ) -> Tensor:
        """Logits ``[batch, tokens, vocab_size]`` for ``tokens`` ``[batch, tokens]``.

        Args:
            cache: of :meth:`new_cache`; the tokens continue it, and it is brought forward. Gradients flow through it,
                into earlier pieces too, while they are enabled.
            attention_mask: bool or integer ``[batch, tokens]``, nonzero for tokens: the others, anywhere in a row, are
                padding. They change nothing and get logits of zero. With a cache, columns of past tokens may come
                first.
            cu_seqlens: int32 or int64 ``[documents + 1]``: tokens is one row, and document n its tokens
                ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``. No document sees another. Tokens after the last one are
                padding: they change nothing, may be any number, and their logits mean nothing. Not with a cache.
            position_ids: int32 or int64 ``[batch, tokens]``, instead of ``cu_seqlens``: a document begins with every
                row and wherever a position does not follow the one before. The model has no other use for positions.
            cp_context: as in :func:`kda_cuda.chunk_kda`: tokens is ``[1, tokens of this rank]``. Not with the others.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        c = Checker("HybridLM")
        c.tensor("tokens", tokens)
        c.rank("tokens", tokens, "batch, tokens")
        if cache is not None and len(tokens) != cache.batch_size:
            raise c.value_error(
                f"tokens has shape {list(tokens.shape)}, expected batch={cache.batch_size}, the rows of the cache"
            )
        shape = tokens.shape
        if position_ids is not None:
            if any(x is not None for x in (cache, cu_seqlens, attention_mask, cp_context)):
                others = "cache, attention_mask, cu_seqlens or cp_context"
                raise c.value_error(f"position_ids is given with {others}, expected one of them")
            cu_seqlens = documents_of_positions(c.op, tokens, position_ids)
            tokens = tokens.reshape(1, -1)
        layout = layout_of(c.op, tokens, cache is not None, attention_mask, cu_seqlens, cp_context)
        logits = layout.leave(self.lm_head(self.model(layout.enter(tokens), cache, layout)))
        return logits.view(*shape, logits.shape[-1]) if position_ids is not None else logits

    def new_cache(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HybridCache:
        """For ``batch_size`` sequences that have not begun. Default: device and dtype of the weights."""
        return HybridCache([layer.self_attn.new_cache(batch_size, device, dtype) for layer in self.model.layers])

    def _dtype(self) -> torch.dtype:
        return device_and_dtype(self, leave_out=GATE_PARAMETERS)[1]

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the cache of one sequence of ``tokens``: constant for KDA, growing for one layer in four."""
        return sum(layer.self_attn.cache_bytes(tokens, self._dtype()) for layer in self.model.layers)

    def multi_latent_cache_bytes(self, tokens: int) -> int:
        """The same if every layer were MLA."""
        c = self.config
        return c.num_layers * tokens * (c.kv_lora_rank + c.qk_rope_head_dim) * self._dtype().itemsize

    def full_attention_cache_bytes(self, tokens: int) -> int:
        """The same if every layer were multi-head attention, with keys and values of all heads of ``head_dim``."""
        c = self.config
        return c.num_layers * tokens * 2 * c.num_heads * c.head_dim * self._dtype().itemsize

    def generate(self, tokens: Tensor, max_new_tokens: int, **sampling) -> Tensor:
        """``tokens`` ``[batch, prompt]`` followed by ``max_new_tokens`` more; arguments as in :meth:`stream`."""
        return torch.cat((tokens, *self.stream(tokens, max_new_tokens, **sampling)), dim=1)

    @torch.no_grad()
    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        seed: int = 0,
        attention_mask: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yields the next tokens ``[batch, 1]`` one by one: the prompt in parallel, then one step a token.

        Args:
            tokens: the prompt ``[batch, prompt]``, at least one token.
            max_new_tokens: how many to add.
            temperature: 0 takes the most likely token; otherwise draws from ``softmax(logits / temperature)``.
            top_k: draw only from this many most likely tokens.
            seed: of the draws; the same seed gives the same tokens.
            attention_mask: as in :meth:`forward`: prompts of different length, padded on the left or on the right.
        """
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"generate: tokens has shape {list(tokens.shape)}, expected [batch, prompt], prompt >= 1")
        if temperature < 0:
            raise ValueError(f"generate: temperature is {temperature}, expected >= 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"generate: top_k is {top_k}, expected >= 1")
        generator = torch.Generator(tokens.device).manual_seed(seed)
        cache = self.new_cache(len(tokens), tokens.device)
        prompt = layout_of("generate", tokens, False, attention_mask)
        if attention_mask is not None and bool(attention_mask.all()):  # one look, which may spare masks in every step
            attention_mask, prompt = None, Layout()
        options = {} if attention_mask is None else {"attention_mask": attention_mask}
        for _ in range(max_new_tokens):
            logits = prompt.last(self(tokens, cache, **options)).float()
            tokens = _next_token(logits, temperature, top_k, generator)
            yield tokens
            options, prompt = {}, Layout()


def _next_token(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)
