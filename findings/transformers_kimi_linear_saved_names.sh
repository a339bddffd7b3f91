#!/usr/bin/env bash
# transformers 5.24.0. What save_pretrained writes of a Kimi Linear model is no file of the released form.
#
# Released checkpoints have linear_attn_config in config.json and the MLP of their first layer under "mlp.".
# transformers maps its own names back to released names when it saves, but too eagerly: the dense MLP of the first
# layer lands under "block_sparse_moe.", and config.json has flat keys in place of linear_attn_config.
# transformers reads both forms, so a round trip shows nothing. Other readers of the released form fail twice:
# mlx-lm 0.32.2 first misses its configuration, then finds three unknown weights. With both corrected, it loads and
# its logits agree with those of transformers. A loader should accept both forms.
#
# Output seen on 2026-11-29:
#   linear_attn_config in config.json: False
#   dense layer: ['block_sparse_moe.down_proj', 'block_sparse_moe.gate_proj', 'block_sparse_moe.up_proj']
#   as saved: TypeError, ... missing 2 required positional arguments: 'rope_theta' and 'linear_attn_config'
#   with the released configuration: ValueError, Received 3 parameters not in model: ...
#   with the released names too: loads, logits agree: True
#   transformers itself, as saved: loads, logits agree: True
. "$(dirname "$0")/common.bash"
install torch==2.13.0 numpy==2.4.6 transformers==5.24.0 mlx-lm==0.32.2 "mlx[cpu]==0.32.4"

cat > "$here/save_and_load.py" <<'PY'
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from safetensors.torch import load_file, save_file
from transformers import KimiLinearConfig, KimiLinearForCausalLM

folder = Path(sys.argv[1])
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2,
             kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, linear_head_dim=32,
             linear_num_heads=2, num_experts=4, num_experts_per_token=2, moe_intermediate_size=16, num_hidden_layers=4)
kinds = dict(layer_types=["linear_attention"] * 3 + ["full_attention"], pad_token_id=0, bos_token_id=1, eos_token_id=2)
released = {
    "linear_attn_config": {"head_dim": 32, "num_heads": 2, "short_conv_kernel_size": 4, "kda_layers": [1, 2, 3],
                           "full_attn_layers": [4]},
    "rope_theta": 10000.0, "mla_use_nope": True, "first_k_dense_replace": 1,
}
torch.manual_seed(0)
model = KimiLinearForCausalLM(KimiLinearConfig(**sizes, **kinds)).eval()
model.save_pretrained(folder)
tokens = torch.arange(10)[None]
truth = model(tokens).logits[0].detach().numpy()
config, weights = folder / "config.json", folder / "model.safetensors"


def agree(logits):
    return f"loads, logits agree: {np.abs(np.array(logits) - truth).max() < 1e-3 * np.abs(truth).max()}"


def by_mlx_lm():
    try:
        loaded, _ = load_model(folder)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}, {error}".splitlines()[0]
    return agree(loaded(mx.array(tokens.numpy()))[0])


print("linear_attn_config in config.json:", "linear_attn_config" in json.loads(config.read_text()))
dense = [name.removesuffix(".weight") for name in load_file(weights) if "layers.0." in name and "_proj" in name]
print("dense layer:", sorted(name.removeprefix("model.layers.0.") for name in dense if "self_attn" not in name))
itself = agree(KimiLinearForCausalLM.from_pretrained(folder).eval()(tokens).logits[0].detach())
print("as saved:", by_mlx_lm())
config.write_text(json.dumps(json.loads(config.read_text()) | released))
print("with the released configuration:", by_mlx_lm())
renamed = {k.replace("layers.0.block_sparse_moe.", "layers.0.mlp."): v for k, v in load_file(weights).items()}
save_file(renamed, weights, metadata={"format": "pt"})
print("with the released names too:", by_mlx_lm())
print("transformers itself, as saved:", itself)
PY
output=$(python "$here/save_and_load.py" "$here/model" 2> "$here/errors") || { cat "$here/errors" >&2; exit 1; }
echo "$output"
expect "$output" '^linear_attn_config in config.json: False$'
expect "$output" "^dense layer: \['block_sparse_moe.down_proj', 'block_sparse_moe.gate_proj', 'block_sparse_moe.up_proj'\]$"
expect "$output" "^as saved: TypeError, .*'linear_attn_config'"
expect "$output" '^with the released configuration: ValueError, Received 3 parameters not in model'
expect "$output" '^with the released names too: loads, logits agree: True$'
expect "$output" '^transformers itself, as saved: loads, logits agree: True$'
