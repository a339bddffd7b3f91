"""A layer whose own core attention only says that it ran."""

from vllm.model_executor.custom_op import PluggableLayer


class KimiGatedDeltaNetAttention(PluggableLayer):
    conv1d = A_log = dt_bias = gate_lower_bound = o_norm = None

    def __init__(self, **parts):
        super().__init__()
        self.__dict__.update(parts, own_calls=0)

    def _forward(self, mixed_qkv, g1, g2, beta, core_attn_out) -> None:
        self.own_calls += 1
