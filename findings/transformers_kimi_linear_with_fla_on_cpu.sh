#!/usr/bin/env bash
# transformers 5.24.0 with flash-linear-attention 0.6.0. With fla installed, Kimi Linear no longer runs on the CPU.
#
# Without fla a Kimi Linear model runs on the CPU in plain PyTorch. With fla installed, transformers calls fla's Triton
# kernels for tensors of every device. fla notices that there is no GPU and warns that it goes "back to CPU", but it
# has no CPU path: the first forward ends in Triton's RuntimeError. Nothing in the message names fla or transformers.
# A library that serves these calls has to look at the device of the tensors, not at what is installed.
#
# Output seen on 2026-11-29, on a machine without a GPU (on others the script hides it):
#   without fla: finite logits [1, 10, 64]
#   with fla: RuntimeError: 0 active drivers ([]). There should only be one.
#   fla's warning: Triton is not supported on current platform, roll back to CPU.
. "$(dirname "$0")/common.bash"
export CUDA_VISIBLE_DEVICES=""
install torch==2.13.0 numpy==2.4.6 transformers==5.24.0

cat > "$here/forward.py" <<'PY'
import torch
from transformers import KimiLinearConfig, KimiLinearForCausalLM

config = KimiLinearConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, linear_head_dim=8, linear_num_heads=2, layer_types=["linear_attention", "full_attention"],
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, num_experts=4, num_experts_per_token=2,
    moe_intermediate_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
model = KimiLinearForCausalLM(config).eval()
try:
    logits = model(torch.arange(10)[None]).logits
    print("finite logits" if logits.isfinite().all() else "logits", list(logits.shape))
except RuntimeError as error:
    print(f"RuntimeError: {error}")
PY
without=$(python "$here/forward.py" 2> "$here/errors") || { cat "$here/errors" >&2; exit 1; }
echo "without fla: $without"
install --no-deps flash-linear-attention==0.6.0 fla-core==0.6.0 triton==3.6.0 einops==0.8.2
with=$("$here/venv/bin/python" "$here/forward.py" 2> "$here/errors") || { cat "$here/errors" >&2; exit 1; }
echo "with fla: $with"
warning=$(grep -o "Triton is not supported.*" "$here/errors")
echo "fla's warning: $warning"
expect "$without" '^finite logits \[1, 10, 64\]$'
expect "$with" '^RuntimeError: 0 active drivers'
expect "$warning" 'roll back to CPU'
