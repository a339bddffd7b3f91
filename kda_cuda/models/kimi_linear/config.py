"""The configuration of Kimi Linear, and the two layouts of ``config.json`` that are met."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from ...checks import Checker

__all__ = ["KimiLinearConfig"]

LINEAR, FULL, DENSE, SPARSE = "linear_attention", "full_attention", "dense", "sparse"
MAY_BE_ZERO = {"num_shared_experts"}

OTHER_NAMES = {  # names of transformers and of other models of this kind
    "norm_topk_prob": "moe_renormalize",
    "n_group": "num_expert_group",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "max_position_embeddings": "model_max_length",
}
ONE_VALUE = {  # what the model computes, and nothing else
    "model_type": "kimi_linear",
    "hidden_act": "silu",
    "moe_router_activation_func": "sigmoid",
    "mla_use_nope": True,
    "attention_bias": False,
    "attention_dropout": 0,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
}
WITHOUT_EFFECT = {  # of tokens, of other programs, or of rotations, which a model without positions does not have
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "model_max_length",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "qk_head_dim",
    "rope_scaling",
    "rope_theta",
    "rope_parameters",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "_name_or_path",
}
LINEAR_ATTENTION = {  # keys of ``linear_attn_config`` and the fields that they fill
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
    "gate_lower_bound": "gate_lower_bound",
    "use_full_rank_gate": "use_full_rank_gate",
}
LAYER_LISTS = {"kda_layers": LINEAR, "full_attn_layers": FULL}  # of ``linear_attn_config``; they count from one
RELEASED_ONLY = {"first_k_dense_replace", "moe_layer_freq", "num_key_value_heads", "use_grouped_topk"}


@dataclass(frozen=True)
class KimiLinearConfig:
    """Sizes of a :class:`KimiLinearForCausalLM`. The defaults are those of Kimi-Linear-48B-A3B.

    Args:
        layer_types: ``"linear_attention"`` (KDA) or ``"full_attention"`` (MLA) for each layer. Default: every fourth
            layer and the last one are MLA.
        mlp_layer_types: ``"dense"`` or ``"sparse"`` (a mixture of experts) for each layer. Default: the first is dense.
        gate_lower_bound: None for the softplus gate of the released model, or the bound of a bounded one.
        use_full_rank_gate: the output gate of KDA is one projection, as in Kimi K3.
        mla_use_output_gate: MLA has a sigmoid output gate, as in Kimi K3.
        extra: fields of ``config.json`` that do not change what is computed. They are kept and written back.

    Raises:
        ValueError, TypeError: a field does not fit; the message names it.
    """

    vocab_size: int = 163840
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 27
    num_attention_heads: int = 32
    linear_num_heads: int = 32
    linear_head_dim: int = 128
    linear_conv_kernel_dim: int = 4
    kv_lora_rank: int = 512
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    moe_intermediate_size: int = 1024
    num_experts: int = 256
    num_experts_per_token: int = 8
    num_shared_experts: int = 1
    num_expert_group: int = 1
    topk_group: int = 1
    moe_renormalize: bool = True
    routed_scaling_factor: float = 2.446
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    gate_lower_bound: float | None = None
    use_full_rank_gate: bool = False
    mla_use_output_gate: bool = False
    layer_types: tuple[str, ...] | None = None
    mlp_layer_types: tuple[str, ...] | None = None
    extra: dict = field(default_factory=dict)

    def __post_init__(self):
        c = Checker("KimiLinearConfig")
        for f in fields(self):
            self._check(c, f.name, f.type, getattr(self, f.name))
        n = self.num_hidden_layers
        every_fourth = [FULL if i % 4 == 0 or i == n else LINEAR for i in range(1, n + 1)]
        first_dense = [SPARSE if i else DENSE for i in range(n)]
        self._set_types(c, "layer_types", every_fourth, {LINEAR, FULL})
        self._set_types(c, "mlp_layer_types", first_dense, {DENSE, SPARSE})

    def _set_types(self, c: Checker, name: str, default: list[str], known: set[str]) -> None:
        types = getattr(self, name) or default
        if len(types) != len(default) or not set(types) <= known:
            raise c.value_error(f"{name} is {list(types)}, expected {len(default)} of {sorted(known)}")
        object.__setattr__(self, name, tuple(types))

    @staticmethod
    def _check(c: Checker, name: str, kind: str, value: object) -> None:
        if value is None and "None" in kind:
            return
        if kind.startswith("int"):
            c.integer(name, value)
            if value < (0 if name in MAY_BE_ZERO else 1):
                raise c.value_error(f"{name} is {value}, expected a positive number")
        elif kind.startswith("float"):
            number = c.number(name, value)
            if (number >= 0) == (name == "gate_lower_bound") or number == 0:
                sign = "negative" if name == "gate_lower_bound" else "positive"
                raise c.value_error(f"{name} is {value}, expected a {sign} number")
        elif kind == "bool":
            c.boolean(name, value)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> KimiLinearConfig:
        """Reads ``config.json`` of a folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError, TypeError: it is no JSON, or a field does not fit; the message names it.
        """
        path = Path(folder) / "config.json"
        try:
            values = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise Checker("KimiLinearConfig").value_error(f"{path} is no JSON: {error}") from None
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict) -> KimiLinearConfig:
        """The configuration of a released ``config.json``, or of one that transformers wrote, as a dictionary.

        Layer lists of ``linear_attn_config`` count from one. A field that is absent has its default.

        Raises:
            ValueError, TypeError: a field is unknown, or asks for what the model does not compute; all such fields
                stand in one message.
        """
        c = Checker("KimiLinearConfig")
        values = {OTHER_NAMES.get(name, name): value for name, value in values.items()}
        linear = dict(values.pop("linear_attn_config", None) or {})
        lists = {kind: linear.pop(name, None) for name, kind in LAYER_LISTS.items()}
        known = {f.name for f in fields(cls)} - {"extra"}
        unknown = sorted(set(values) - known - set(ONE_VALUE) - WITHOUT_EFFECT - RELEASED_ONLY)
        unknown += sorted(f"linear_attn_config.{name}" for name in set(linear) - set(LINEAR_ATTENTION))
        if unknown:
            raise c.value_error(f"unknown fields {unknown}, expected those of Kimi Linear")
        chosen = {name: value for name, value in values.items() if name in known}
        chosen |= {LINEAR_ATTENTION[name]: value for name, value in linear.items()}
        layers = chosen.get("num_hidden_layers", cls.num_hidden_layers)
        first, every = values.get("first_k_dense_replace", 1), values.get("moe_layer_freq", 1)
        for name, count in (("num_hidden_layers", layers), ("first_k_dense_replace", first), ("moe_layer_freq", every)):
            c.integer(name, count)
        problems = [
            f"{name} is {values[name]!r}, expected {only!r}"
            for name, only in ONE_VALUE.items()
            if name in values and values[name] != only
        ]
        heads = chosen.get("num_attention_heads", cls.num_attention_heads)
        if values.get("num_key_value_heads") not in (None, heads):
            problems.append(
                f"num_key_value_heads is {values['num_key_value_heads']}, expected {heads}, as queries have"
            )
        if not values.get("use_grouped_topk", True) and chosen.get("num_expert_group", 1) != 1:
            problems.append("use_grouped_topk is False with several groups, expected True")
        if every < 1:
            problems.append(f"moe_layer_freq is {every}, expected a positive number")
        if any(numbers is not None for numbers in lists.values()):
            types = _types_of_lists(lists, layers)
            if types is None:
                problems.append(f"{' and '.join(LAYER_LISTS)} do not have each of the layers 1 to {layers} once")
            elif chosen.get("layer_types") is not None and list(chosen["layer_types"]) != types:
                problems.append("layer_types differs from the lists of linear_attn_config")
            chosen["layer_types"] = types
        if problems:
            raise c.value_error("; ".join(problems))
        if chosen.get("mlp_layer_types") is None:
            chosen["mlp_layer_types"] = [SPARSE if i >= first and i % every == 0 else DENSE for i in range(layers)]
        extra = {name: value for name, value in values.items() if name in WITHOUT_EFFECT}
        return cls(**chosen, extra=extra)

    def to_dict(self) -> dict:
        """The fields of a released ``config.json``; layer lists count from one."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("extra", "layer_types", "mlp_layer_types"):
            own.pop(name)
        linear = {name: own.pop(of) for name, of in LINEAR_ATTENTION.items()}
        for name, absent in (("gate_lower_bound", None), ("use_full_rank_gate", False)):
            if linear[name] == absent:
                linear.pop(name)
        if not self.mla_use_output_gate:
            own.pop("mla_use_output_gate")
        for name, kind in LAYER_LISTS.items():
            linear[name] = [i for i, given in enumerate(self.layer_types, 1) if given == kind]
        dense = next((i for i, kind in enumerate(self.mlp_layer_types) if kind == SPARSE), self.num_hidden_layers)
        own |= {"first_k_dense_replace": dense, "moe_layer_freq": 1, "linear_attn_config": linear}
        if DENSE in self.mlp_layer_types[dense:]:
            own["mlp_layer_types"] = list(self.mlp_layer_types)
        own |= {"num_key_value_heads": self.num_attention_heads, "use_grouped_topk": True}
        return dict(sorted({"architectures": ["KimiLinearForCausalLM"], **ONE_VALUE, **self.extra, **own}.items()))


def _types_of_lists(lists: dict[str, list[int] | None], layers: int) -> list[str] | None:
    """The type of each layer, for lists that count from one; None: they do not have each layer once."""
    numbers = [number for listed in lists.values() for number in listed or ()]
    if sorted(numbers) != list(range(1, layers + 1)):
        return None
    return [next(kind for kind, listed in lists.items() if i in (listed or ())) for i in range(1, layers + 1)]
