"""The language model around the layers: residual blocks, embedding and head, caches. A model is its list of blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import INDEX_DTYPES, Checker, check_contents
from .cache import KDACache, MLACache
from .generation import Generation
from .hybrid_cache import HybridCache
from .kda import GATE_PARAMETERS, KimiDeltaAttention
from .layouts import Documents, Layout, documents_of_positions, layout_of
from .modules import device_and_dtype

__all__ = ["CausalLM", "DecoderBlock"]


class DecoderBlock(nn.Module):
    """Pre-norm residual block: attention, then a feed-forward module.

    Args:
        self_attn: a :class:`KimiDeltaAttention` or a :class:`NoPEMultiLatentAttention`.
        mlp: a :class:`SwiGLU` or a :class:`MixtureOfExperts`.
        hidden_size: width of the residual stream.
        norm_eps: of the two norms.
    """

    def __init__(self, self_attn: nn.Module, mlp: nn.Module, hidden_size: int, norm_eps: float):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden_size, norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, norm_eps)
        self.mlp = mlp

    def forward(self, x: Tensor, cache: KDACache | MLACache | None, layout: Layout) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache, layout=layout)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    def __init__(self, blocks: Iterable[DecoderBlock], vocab_size: int, hidden_size: int, norm_eps: float):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(hidden_size, norm_eps)
        self.recompute = False

    def forward(self, tokens: Tensor, cache: HybridCache | None, layout: Layout) -> Tensor:
        x = self.embed_tokens(tokens)
        recompute = self.recompute and cache is None and torch.is_grad_enabled()
        for layer, layer_cache in zip(self.layers, cache.layers if cache else [None] * len(self.layers), strict=True):
            inputs = (x, layer_cache, layout)
            x = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        return self.norm(x)


class CausalLM(Generation, nn.Module):
    """A causal language model of residual blocks, on a :class:`HybridCache`; :class:`HybridLM` is a small one.

    Args:
        blocks: read once, after the embedding has been made.
        vocab_size, hidden_size: of the embedding and of the head, which are not tied.
        norm_eps: of the last norm.
    """

    def __init__(self, blocks: Iterable[DecoderBlock], vocab_size: int, hidden_size: int, norm_eps: float):
        super().__init__()
        self.model = Backbone(blocks, vocab_size, hidden_size, norm_eps)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def initial_std(self, name: str, module: nn.Linear | nn.Embedding) -> float:
        """Of the weights that a new model has in the module of this name."""
        raise NotImplementedError

    def recompute_blocks(self, recompute: bool = True) -> None:
        """Whether training keeps the inputs of blocks alone, and computes the blocks once more in the backward.

        A forward on a cache keeps what it needs, whatever is said here.
        """
        self.model.recompute = recompute

    @torch.no_grad()
    def reset_weights(self) -> None:
        """Sets every parameter as a new model has them: also after ``to_empty`` of a model built on ``meta``."""
        for module in self.modules():
            if module._parameters and not isinstance(module, nn.Linear | nn.Embedding | KimiDeltaAttention):
                module.reset_parameters()
        self.reset_scaled_weights()

    @torch.no_grad()
    def reset_scaled_weights(self) -> None:
        """Sets those weights whose scale the model decides, and the gates."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.initial_std(name, module))
            elif isinstance(module, KimiDeltaAttention):
                module.reset_gate_parameters()

    def forward(
        self,
        tokens: Tensor,
        cache: HybridCache | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        last_only: bool = False,
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
            last_only: logits ``[batch, vocab_size]`` of the last token of each row alone; zeros in a row without
                tokens. Not with packed documents.
            cp_context: as in :func:`kda_cuda.chunk_kda`: tokens is ``[1, tokens of this rank]``. Not with the others.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it. Contents of tokens are looked at on
                the CPU, and on a GPU if ``KDA_CUDA_CHECK=1`` asks.
        """
        c = Checker(type(self).__name__)
        self._check_tokens(c, tokens, cache)
        shape = tokens.shape
        if position_ids is not None:
            if any(x is not None for x in (cache, cu_seqlens, attention_mask, cp_context)):
                others = "cache, attention_mask, cu_seqlens or cp_context"
                raise c.value_error(f"position_ids is given with {others}, expected one of them")
            cu_seqlens = documents_of_positions(c.op, tokens, position_ids)
            tokens = tokens.reshape(1, -1)
        layout = layout_of(c.op, tokens, cache is not None, attention_mask, cu_seqlens, cp_context)
        if last_only and (isinstance(layout, Documents) or not tokens.shape[1]):
            raise c.value_error(f"last_only is given with tokens {list(shape)}, expected rows of at least one token")
        tokens = layout.enter(tokens)
        self._check_vocabulary(c, tokens)
        hidden = self.model(tokens, cache, layout)
        if last_only:
            return self.lm_head(layout.last(layout.leave(hidden)))
        logits = layout.leave(self.lm_head(hidden))
        return logits.view(*shape, logits.shape[-1]) if position_ids is not None else logits

    def _check_tokens(self, c: Checker, tokens: Tensor, cache: HybridCache | None) -> None:
        c.tensor("tokens", tokens)
        c.rank("tokens", tokens, "batch, tokens")
        c.dtype("tokens", tokens, INDEX_DTYPES)
        if cache is not None and len(tokens) != cache.batch_size:
            raise c.value_error(
                f"tokens has shape {list(tokens.shape)}, expected batch={cache.batch_size}, the rows of the cache"
            )

    def _check_vocabulary(self, c: Checker, tokens: Tensor) -> None:
        size = self.lm_head.out_features
        if check_contents(tokens) and tokens.numel():
            low, high = (int(x) for x in tokens.aminmax())
            if low < 0 or high >= size:
                raise c.value_error(f"tokens has {low if low < 0 else high}, expected 0 <= token < {size}, vocab_size")

    def new_cache(
        self, batch_size: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> HybridCache:
        """For ``batch_size`` sequences that have not begun. Default: device and dtype of the weights."""
        return HybridCache([layer.self_attn.new_cache(batch_size, device, dtype) for layer in self.model.layers])

    def weights_dtype(self) -> torch.dtype:
        """That of the weights which are not kept in fp32."""
        return device_and_dtype(self, leave_out=GATE_PARAMETERS)[1]

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of the cache of one sequence of ``tokens``: constant for KDA layers, growing for the others."""
        return sum(layer.self_attn.cache_bytes(tokens, self.weights_dtype()) for layer in self.model.layers)
