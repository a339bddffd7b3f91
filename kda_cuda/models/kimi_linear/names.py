"""The names and shapes of a checkpoint: what is written, and what else may be read."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["Source", "readable", "released"]

MOVED = re.compile(r"self_attn\.(f_a_proj|f_b_proj|dt_bias|A_log)\b")  # below forget_gate in modules of transformers


class Source(NamedTuple):
    """A tensor that a file may have: its shape, and the released tensors that it holds one after another."""

    shape: tuple[int, ...]
    pieces: tuple[str, ...]


def released(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors with released names and shapes; they share the model's memory."""
    found = {}
    for name, tensor in model.state_dict().items():
        prefix, is_expert, kind = name.partition(".mlp.experts.")
        if is_expert:
            experts = f"{prefix}.block_sparse_moe.experts"
            for i, weight in enumerate(tensor):
                if kind == "gate_up_proj":
                    found[f"{experts}.{i}.w1.weight"], found[f"{experts}.{i}.w3.weight"] = weight.chunk(2)
                else:
                    found[f"{experts}.{i}.w2.weight"] = weight
        elif re.search(r"\.mlp\.(gate|shared_experts)\.", name):
            found[name.replace(".mlp.", ".block_sparse_moe.")] = tensor
        else:
            found[name] = tensor.view(1, 1, -1, 1) if name.endswith(".A_log") else tensor
    return found


def readable(tensors: dict[str, Tensor]) -> dict[str, Source]:
    """Every name that a file may have, for the released ``tensors`` of a model."""
    found = {}
    for name, tensor in tensors.items():
        for alias in (name, MOVED.sub(r"self_attn.forget_gate.\1", name)):
            for spelling in _both_prefixes(alias):
                found[spelling] = Source(tuple(tensor.shape), (name,))
    for name in tensors:
        if name.endswith(".q_conv1d.weight"):
            streams = tuple(name.replace("q_conv1d", f"{stream}_conv1d") for stream in "qkv")
            rows = sum(tensors[stream].shape[0] for stream in streams)
            shape = (rows, *tensors[name].shape[1:])
            found[name.replace("q_conv1d", "conv1d")] = Source(shape, streams)
        elif name.endswith(".experts.0.w1.weight"):
            experts = name.removesuffix(".0.w1.weight")
            count = len([x for x in tensors if x.startswith(f"{experts}.") and x.endswith(".w1.weight")])
            for fused, kinds in (("gate_up_proj", ("w1", "w3")), ("down_proj", ("w2",))):
                pieces = tuple(f"{experts}.{i}.{kind}.weight" for i in range(count) for kind in kinds)
                rows, *others = tensors[pieces[0]].shape
                for spelling in _both_prefixes(f"{experts}.{fused}"):
                    found[spelling] = Source((count, len(kinds) * rows, *others), pieces)
    return found


def _both_prefixes(name: str) -> set[str]:
    """transformers writes ``block_sparse_moe`` in dense layers too, and has ``mlp`` in all its modules."""
    return {name, name.replace(".mlp.", ".block_sparse_moe."), name.replace(".block_sparse_moe.", ".mlp.")}
