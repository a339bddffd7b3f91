"""Small models of Kimi Linear in transformers, with weights that make every part count."""

from __future__ import annotations

import pytest
import torch

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KDA, MLA = "linear_attention", "full_attention"
CONFIGS = {
    "released": {"layer_types": [KDA, KDA, KDA, MLA]},
    "groups": {
        "layer_types": [KDA, MLA, MLA, KDA],
        "q_lora_rank": 24,
        "num_local_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 1.0,
    },
    "odd": {
        "layer_types": [MLA, KDA, KDA],
        "num_hidden_layers": 3,
        "norm_topk_prob": False,
        "linear_conv_kernel_dim": 3,
        "linear_num_heads": 3,
        "linear_head_dim": 20,
        "v_head_dim": 12,
        "hidden_size": 40,
        "rms_norm_eps": 1e-3,
        "mlp_layer_types": ["sparse", "dense", "sparse"],
        "moe_intermediate_size": 10,
    },
    "one expert": {
        "layer_types": [KDA, MLA],
        "num_hidden_layers": 2,
        "num_experts_per_tok": 1,
        "mlp_layer_types": ["sparse", "sparse"],
    },
}


def transformers():
    """The module; a test that needs it fails without it, because the Makefile installs it."""
    try:
        import transformers
    except ImportError as error:
        pytest.fail(f"transformers is not installed and this test compares with it (make venv installs it): {error}")
    return transformers


def theirs(name: str):
    """The model of transformers: matrices keep the scale of their input, biases of routers choose other experts."""
    library = transformers()
    torch.manual_seed(1)
    config = library.KimiLinearConfig(**BASE | CONFIGS[name])
    config._experts_implementation = "eager"  # its grouped product takes multiples of four channels alone
    model = library.KimiLinearForCausalLM(config).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.3)
            elif tensor.dim() > 1 and "A_log" not in key:
                tensor.normal_(std=1.0 if "embed" in key else tensor.flatten(1).shape[1] ** -0.5)
            elif key.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
    return model


def tokens(batch: int, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 61, (batch, count), generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest number."""
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
