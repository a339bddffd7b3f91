"""The two layouts of config.json, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from kda_cuda.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kda_cuda.models.kimi_linear.names import released

FULL_LAYERS = [4, 8, 12, 16, 20, 24, 27]
RELEASED = {  # the fields of Kimi-Linear-48B-A3B
    "architectures": ["KimiLinearForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_kimi.KimiLinearConfig"},
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": FULL_LAYERS,
        "head_dim": 128,
        "num_heads": 32,
        "short_conv_kernel_size": 4,
        "kda_layers": [i for i in range(1, 28) if i not in FULL_LAYERS],
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "transformers_version": "4.57.1",
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def test_the_released_config_loads_and_is_written_back():
    config = KimiLinearConfig.from_dict(RELEASED)
    assert [i for i, kind in enumerate(config.layer_types, 1) if kind == "full_attention"] == FULL_LAYERS
    assert config.mlp_layer_types == ("dense",) + ("sparse",) * 26
    assert config.extra["eos_token_id"] == 163586
    assert config == KimiLinearConfig(extra=config.extra)  # the defaults are the released model
    written = config.to_dict()
    assert {name: written[name] for name in RELEASED} == RELEASED
    assert KimiLinearConfig.from_dict(json.loads(json.dumps(written))).to_dict() == written


def test_names_and_shapes_of_the_released_model():
    with torch.device("meta"):
        tensors = released(KimiLinearForCausalLM(KimiLinearConfig.from_dict(RELEASED)))
    layer, attention = "model.layers.1.", "model.layers.1.self_attn."
    shapes = {
        attention + "q_proj.weight": [4096, 2304],
        attention + "q_conv1d.weight": [4096, 1, 4],
        attention + "f_a_proj.weight": [128, 2304],
        attention + "f_b_proj.weight": [4096, 128],
        attention + "b_proj.weight": [32, 2304],
        attention + "g_b_proj.weight": [4096, 128],
        attention + "A_log": [1, 1, 32, 1],
        attention + "dt_bias": [4096],
        attention + "o_norm.weight": [128],
        "model.layers.3.self_attn.q_proj.weight": [32 * 192, 2304],
        "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": [576, 2304],
        "model.layers.3.self_attn.kv_b_proj.weight": [32 * 256, 512],
        layer + "block_sparse_moe.gate.weight": [256, 2304],
        layer + "block_sparse_moe.gate.e_score_correction_bias": [256],
        layer + "block_sparse_moe.experts.255.w1.weight": [1024, 2304],
        layer + "block_sparse_moe.experts.0.w2.weight": [2304, 1024],
        layer + "block_sparse_moe.shared_experts.up_proj.weight": [1024, 2304],
        "model.layers.0.mlp.gate_proj.weight": [9216, 2304],
        "lm_head.weight": [163840, 2304],
    }
    assert {name: list(tensors[name].shape) for name in shapes} == shapes
    assert len([name for name in tensors if ".experts." in name]) == 26 * 256 * 3
    assert round(sum(t.numel() for t in tensors.values()) / 1e9) == 49


def test_fields_of_transformers_and_of_kimi_k3():
    types = ["linear_attention", "full_attention"]
    config = KimiLinearConfig.from_dict(
        {
            "num_hidden_layers": 2,
            "layer_types": types,
            "mlp_layer_types": ["sparse", "dense"],
            "n_group": 2,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 0,
            "norm_topk_prob": False,
            "linear_head_dim": 16,
            "max_position_embeddings": 7,
            "mla_use_output_gate": True,
            "gate_lower_bound": -5.0,
            "use_full_rank_gate": True,
        }
    )
    assert config.layer_types == tuple(types) and config.mlp_layer_types == ("sparse", "dense")
    assert (config.num_experts, config.num_expert_group, config.num_shared_experts) == (8, 2, 0)
    assert not config.moe_renormalize and config.extra == {"model_max_length": 7}
    written = config.to_dict()
    assert written["linear_attn_config"]["gate_lower_bound"] == -5.0 and written["mla_use_output_gate"]
    assert written["mlp_layer_types"] == ["sparse", "dense"]  # no first_k_dense_replace says this
    assert KimiLinearConfig.from_dict(written).to_dict() == written


LISTS = RELEASED["linear_attn_config"]
ERRORS = [
    (
        {"hidden_sise": 3, "quantization_config": {}},
        ValueError,
        "unknown fields ['hidden_sise', 'quantization_config'], expected those of Kimi Linear",
    ),
    ({"linear_attn_config": LISTS | {"taps": 4}}, ValueError, "unknown fields ['linear_attn_config.taps']"),
    (
        {"linear_attn_config": LISTS | {"kda_layers": [1]}},
        ValueError,
        "kda_layers and full_attn_layers do not have each of the layers 1 to 27 once",
    ),
    ({"layer_types": ["full_attention"] * 27}, ValueError, "layer_types differs from the lists"),
    ({"layer_types": ["sliding"] * 27, "linear_attn_config": None}, ValueError, "layer_types is ['sliding'"),
    (
        {"hidden_act": "gelu", "mla_use_nope": False},
        ValueError,
        "hidden_act is 'gelu', expected 'silu'; mla_use_nope is False, expected True",
    ),
    ({"num_key_value_heads": 8}, ValueError, "num_key_value_heads is 8, expected 32"),
    ({"use_grouped_topk": False, "num_expert_group": 4}, ValueError, "use_grouped_topk is False with several groups"),
    ({"moe_layer_freq": 0}, ValueError, "moe_layer_freq is 0, expected a positive number"),
    ({"first_k_dense_replace": "1"}, TypeError, "first_k_dense_replace is '1' (str), expected an int"),
    ({"hidden_size": 0}, ValueError, "hidden_size is 0, expected a positive number"),
    ({"hidden_size": "2304"}, TypeError, "hidden_size is '2304' (str), expected an int"),
    ({"gate_lower_bound": 5.0}, ValueError, "gate_lower_bound is 5.0, expected a negative number"),
    ({"moe_renormalize": 1}, TypeError, "moe_renormalize is 1 (int), expected a bool"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[message for *_, message in ERRORS])
def test_errors(change, error, message):
    with pytest.raises(error) as raised:
        KimiLinearConfig.from_dict(RELEASED | change)
    assert str(raised.value).startswith("kda_cuda::KimiLinearConfig: ") and message in str(raised.value)


def test_a_folder_without_a_config(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        KimiLinearConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"kda_cuda::KimiLinearConfig: .*config\.json is no JSON"):
        KimiLinearConfig.from_pretrained(tmp_path)
