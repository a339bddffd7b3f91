"""Kimi Linear as a language model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ...checks import Checker
from ...nn.decoder import CausalLM, DecoderBlock
from ...nn.feed_forward import Experts, MixtureOfExperts, Router, SwiGLU
from ...nn.kda import KimiDeltaAttention
from ...nn.mla import NoPEMultiLatentAttention
from . import checkpoint
from .config import FULL, SPARSE, KimiLinearConfig

__all__ = ["KimiLinearForCausalLM"]


class KimiLinearForCausalLM(CausalLM):
    """Kimi Linear: KDA layers, a few of MLA without positions, mixtures of experts (Kimi Linear report, section 4).

    ``forward``, caches and generation are those of :class:`HybridLM`. ``A_log``, ``dt_bias`` and the correction bias of
    the routers stay in fp32 when the model is cast.

    Example:
        >>> import torch
        >>> from kda_cuda.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
        >>> config = KimiLinearConfig(
        ...     vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        ...     linear_num_heads=2, linear_head_dim=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        ...     v_head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_token=2)
        >>> model = KimiLinearForCausalLM(config)
        >>> model.generate(torch.zeros(1, 10, dtype=torch.long), max_new_tokens=5).shape
        torch.Size([1, 15])
    """

    def __init__(self, config: KimiLinearConfig):
        blocks = (_block(config, layer) for layer in range(config.num_hidden_layers))
        super().__init__(blocks, config.vocab_size, config.hidden_size, config.rms_norm_eps)
        self.config = config
        self.reset_scaled_weights()

    def initial_std(self, name: str, module: nn.Linear | nn.Embedding) -> float:
        return self.config.initializer_range

    @torch.no_grad()
    def reset_scaled_weights(self) -> None:
        super().reset_scaled_weights()
        for module in self.modules():
            if isinstance(module, Router | Experts):
                for weight in module.parameters(recurse=False):
                    nn.init.normal_(weight, std=self.config.initializer_range)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> KimiLinearForCausalLM:
        """Loads ``config.json`` and the safetensors of a folder, a tensor at a time.

        Names may be the released ones, those of the modules of transformers, or those that its ``save_pretrained``
        writes. Beside the model, the host holds little more than one file.

        Args:
            folder: with ``model.safetensors``, or with the files of ``model.safetensors.index.json``.
            dtype: of the weights; default: what the config says, else torch's default. ``A_log``, ``dt_bias`` and the
                correction bias of the routers are fp32 in any case.
            device: of the model.

        Raises:
            ImportError: safetensors is not installed.
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, a config field does not fit, or tensors are missing, unexpected or
                misshapen. One message lists all of them, before memory is taken for the model.
        """
        config = KimiLinearConfig.from_pretrained(folder)
        dtype = _dtype_of(config) if dtype is None else dtype
        with torch.device("meta"):
            model = cls(config)
        plan = checkpoint.plan(model, Path(folder))
        model.to(dtype).to_empty(device=device)
        checkpoint.load(model, plan)
        return model.eval()

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
        """Writes ``config.json`` and safetensors of at most ``max_shard_bytes`` with the released names and shapes.

        The files are complete before any of them replaces an older one, and the index is replaced last. Whoever reads
        the folder finds the old weights or the new ones. When writing fails, the old ones are left.

        Args:
            folder: made if it is not there. Other files in it stay.
            max_shard_bytes: of one file, unless a single tensor is larger; the host holds one file at a time.

        Raises:
            ImportError: safetensors is not installed.
            OSError: a file cannot be written, for instance because the disk is full.
        """
        dtype = str(self.weights_dtype()).removeprefix("torch.")
        values = {k: v for k, v in self.config.to_dict().items() if k != "torch_dtype"} | {"dtype": dtype}
        checkpoint.save(self, Path(folder), values, max_shard_bytes)


def _block(c: KimiLinearConfig, layer: int) -> DecoderBlock:
    if c.layer_types[layer] == FULL:
        attention = NoPEMultiLatentAttention(
            c.hidden_size,
            c.num_attention_heads,
            c.kv_lora_rank,
            c.qk_nope_head_dim,
            c.qk_rope_head_dim,
            c.v_head_dim,
            q_lora_rank=c.q_lora_rank,
            output_gate=c.mla_use_output_gate,
        )
    else:
        attention = KimiDeltaAttention(
            c.hidden_size,
            c.linear_num_heads,
            c.linear_head_dim,
            c.linear_conv_kernel_dim,
            c.rms_norm_eps,
            lower_bound=c.gate_lower_bound,
            full_rank_output_gate=c.use_full_rank_gate,
        )
    if c.mlp_layer_types[layer] == SPARSE:
        mlp = MixtureOfExperts(
            c.hidden_size,
            c.moe_intermediate_size,
            c.num_experts,
            c.num_experts_per_token,
            c.num_shared_experts,
            renormalize=c.moe_renormalize,
            scaling=c.routed_scaling_factor,
            num_groups=c.num_expert_group,
            topk_group=c.topk_group,
        )
    else:
        mlp = SwiGLU(c.hidden_size, c.intermediate_size)
    return DecoderBlock(attention, mlp, c.hidden_size, c.rms_norm_eps)


def _dtype_of(config: KimiLinearConfig) -> torch.dtype:
    name = config.extra.get("dtype") or config.extra.get("torch_dtype")
    dtype = torch.get_default_dtype() if name is None else getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise Checker("KimiLinearConfig").value_error(f"dtype is {name!r}, expected a floating point dtype of torch")
    return dtype
