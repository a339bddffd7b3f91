"""A hybrid language model: three layers of Kimi Delta Attention, then one of full attention, and so on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from .checks import Checker
from .nn.decode_graph import DecodeGraph
from .nn.decoder import CausalLM, DecoderBlock
from .nn.feed_forward import SwiGLU
from .nn.hybrid_cache import HybridCache
from .nn.kda import KimiDeltaAttention
from .nn.mla import NoPEMultiLatentAttention

__all__ = ["DecodeGraph", "HybridCache", "HybridConfig", "HybridLM"]


@dataclass(frozen=True)
class HybridConfig:
    """Sizes of a :class:`HybridLM`. The defaults make the small byte-level model of the demo.

    Raises:
        ValueError, TypeError: a size does not fit; the message names it.
    """

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
        c = Checker("HybridConfig")
        for name, value in vars(self).items():
            (c.number if name == "norm_eps" else c.integer)(name, value)
            if not 0 < value < math.inf:
                raise c.value_error(f"{name} is {value}, expected a positive number")

    def is_full_attention(self, layer: int) -> bool:
        """Whether the layer of this index, from 0, is MLA."""
        return (layer + 1) % self.full_attention_every == 0


def _block(c: HybridConfig, full_attention: bool, kda_layer: type[KimiDeltaAttention]) -> DecoderBlock:
    if full_attention:
        widths = (c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim)
        attention = NoPEMultiLatentAttention(c.hidden_size, c.num_heads, *widths)
    else:
        attention = kda_layer(c.hidden_size, c.num_heads, c.head_dim, c.conv_size, c.norm_eps)
    return DecoderBlock(attention, SwiGLU(c.hidden_size, c.intermediate_size), c.hidden_size, c.norm_eps)


class HybridLM(CausalLM):
    """Kimi Delta Attention and NoPE MLA, 3 : 1, as a language model (Kimi Linear report, section 4).

    Args:
        config: sizes.
        kda_layer: class of the layers that are not MLA: :class:`KimiDeltaAttention`, or one that is compared with it.

    Example:
        >>> import torch
        >>> from kda_cuda.model import HybridConfig, HybridLM
        >>> model = HybridLM(HybridConfig(hidden_size=64, head_dim=32))
        >>> model(torch.zeros(1, 10, dtype=torch.long)).shape
        torch.Size([1, 10, 256])
        >>> model.generate(torch.zeros(1, 10, dtype=torch.long), max_new_tokens=5).shape
        torch.Size([1, 15])
    """

    def __init__(self, config: HybridConfig, kda_layer: type[KimiDeltaAttention] = KimiDeltaAttention):
        kinds = (config.is_full_attention(layer) for layer in range(config.num_layers))
        blocks = (_block(config, full_attention, kda_layer) for full_attention in kinds)
        super().__init__(blocks, config.vocab_size, config.hidden_size, config.norm_eps)
        self.config = config
        self.reset_scaled_weights()

    def initial_std(self, name: str, module: nn.Linear | nn.Embedding) -> float:
        """Projections keep the scale of their input; those that end a residual branch are damped by the depth."""
        if isinstance(module, nn.Embedding):
            return 1.0
        damping = (2 * self.config.num_layers) ** -0.5 if name.endswith(("o_proj", "down_proj")) else 1
        return damping * module.in_features**-0.5

    def multi_latent_cache_bytes(self, tokens: int) -> int:
        """The same if every layer were MLA."""
        c = self.config
        return c.num_layers * tokens * (c.kv_lora_rank + c.qk_rope_head_dim) * self.weights_dtype().itemsize

    def full_attention_cache_bytes(self, tokens: int) -> int:
        """The same if every layer were multi-head attention, with keys and values of all heads of ``head_dim``."""
        c = self.config
        return c.num_layers * tokens * 2 * c.num_heads * c.head_dim * self.weights_dtype().itemsize
