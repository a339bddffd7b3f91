"""A layer whose own core attention only says that it ran."""

from vllm.model_executor.custom_op import PluggableLayer


class Glm5NextLinearAttention(PluggableLayer):
    q_conv1d = k_conv1d = v_conv1d = A_log = dt_bias = kda_lower_bound = _checkpoint_exporter = None

    def __init__(self, **parts):
        super().__init__()
        self.__dict__.update(parts, own_calls=0)

    def _forward(self, qkv_proj_states, g1, beta, core_attn_out) -> None:
        self.own_calls += 1
