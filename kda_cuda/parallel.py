"""Models on several devices: sharded parameters (FSDP2), heads divided among ranks, sequences divided among ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .checks import Checker
from .context_parallel.chunk import run_local
from .context_parallel.context import CPContext, build_cp_context, local_cp_contexts
from .context_parallel.streams import exchange_conv_tails, gather_tokens
from .nn.kda import GATE_PARAMETERS, KimiDeltaAttention
from .nn.mla import NoPEMultiLatentAttention

__all__ = [
    "CPContext",
    "build_cp_context",
    "exchange_conv_tails",
    "gather_tokens",
    "head_slice",
    "local_cp_contexts",
    "run_local",
    "shard",
]

LAYERS = (KimiDeltaAttention, NoPEMultiLatentAttention)
BY_HEADS = {  # parameters with a dimension of heads, and which one that is; ranks have the others in common
    **{f"{name}_proj.weight": 0 for name in ("q", "k", "v", "f", "f_b", "b", "g", "g_b", "q_b", "kv_b")},
    **{f"{name}_conv1d.{kind}": 0 for name in ("q", "k", "v") for kind in ("weight", "bias")},
    "A_log": 0, "dt_bias": 0, "o_proj.weight": 1,
}  # fmt: skip


def shard(model: nn.Module, blocks: Iterable[nn.Module] | None = None, **options) -> nn.Module:
    """Shards a model with KDA layers by FSDP2, in place, whatever the dtype of its weights.

    ``A_log`` and ``dt_bias`` stay in fp32, also under a policy that computes in 16 bits, and ``fully_shard`` takes one
    dtype a group. So they get groups of their own, one a layer. Names of parameters stay as they are.

    Args:
        model: what contains the layers, for instance a :class:`HybridLM`.
        blocks: the modules whose parameters are gathered at a time. Default: whatever has a layer of attention as a
            direct child, so the blocks of a :class:`HybridLM`. What is in no block is gathered with the model.
        **options: those of ``torch.distributed.fsdp.fully_shard``, such as ``mesh`` and ``mp_policy``.

    Returns:
        The model.

    Raises:
        ValueError: the model is a KDA layer itself.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if isinstance(model, KimiDeltaAttention):
        raise Checker("shard").value_error("model is a KimiDeltaAttention, expected a module that contains it")
    layers = [module for module in model.modules() if isinstance(module, KimiDeltaAttention)]
    if blocks is None:
        blocks = [m for m in model.modules() if m is not model and any(isinstance(c, LAYERS) for c in m.children())]
    ignored = set(options.pop("ignored_params", None) or ())
    gates = {p for layer in layers for name in GATE_PARAMETERS if (p := layer._parameters.get(name)) is not None}
    for module in (*blocks, model):
        fully_shard(module, ignored_params=ignored | gates, **options)
    policy = options.pop("mp_policy", MixedPrecisionPolicy())
    policy = dataclasses.replace(policy, param_dtype=None, reduce_dtype=None, cast_forward_inputs=False)
    for layer in layers:
        others = {p for p in layer.parameters() if p not in gates}
        fully_shard(layer, ignored_params=ignored | others, mp_policy=policy, **options)
    return model


def head_slice(layer: nn.Module, rank: int, ranks: int) -> nn.Module:
    """A new layer with the heads of one rank: the outputs of all ranks add up to the output of ``layer``.

    The heads of rank r are the r-th of ``ranks`` equal parts. Under training the gradients of what ranks have in common
    (the input, and the parameters without a dimension of heads) add up over the ranks too.

    Args:
        layer: a :class:`KimiDeltaAttention` or a :class:`NoPEMultiLatentAttention`.
        rank, ranks: which slice, and of how many; ``ranks`` divides the heads.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> import torch
        >>> from kda_cuda.layers import KimiDeltaAttention
        >>> from kda_cuda.parallel import head_slice
        >>> layer, x = KimiDeltaAttention(hidden_size=64, num_heads=4, head_dim=16), torch.randn(1, 10, 64)
        >>> parts = [head_slice(layer, rank, 2)(x) for rank in range(2)]
        >>> bool((sum(parts) - layer(x)).abs().max() < 1e-5)
        True
    """
    c = Checker("head_slice")
    if not isinstance(layer, LAYERS):
        names = " or ".join(kind.__name__ for kind in LAYERS)
        raise c.type_error(f"layer is a {type(layer).__name__}, expected a {names}")
    c.integer("rank", rank)
    c.integer("ranks", ranks)
    if ranks < 1 or layer.num_heads % ranks:
        raise c.value_error(f"ranks is {ranks}, expected a divisor of the {layer.num_heads} heads")
    if not 0 <= rank < ranks:
        raise c.value_error(f"rank is {rank}, expected 0 <= rank < {ranks}")
    with torch.device("meta"):
        part = _with_heads(layer, layer.num_heads // ranks)
    whole = layer.state_dict()
    slices = {name: _slice(value, BY_HEADS.get(name), rank, ranks) for name, value in whole.items()}
    part.load_state_dict(slices, assign=True)
    return part.train(layer.training)


def _slice(value: Tensor, dim: int | None, rank: int, ranks: int) -> Tensor:
    return (value if dim is None else value.chunk(ranks, dim)[rank]).clone()


def _with_heads(layer: nn.Module, heads: int) -> nn.Module:
    hidden = layer.o_proj.out_features
    if isinstance(layer, KimiDeltaAttention):
        value_heads = heads * layer.num_v_heads // layer.num_heads
        sizes = (hidden, heads, layer.head_dim, layer.conv_size, layer.o_norm.eps)
        return KimiDeltaAttention(*sizes, num_v_heads=value_heads, **layer.options)
    widths = (layer.kv_lora_rank, layer.nope_dim, layer.rope_dim, layer.v_head_dim)
    return NoPEMultiLatentAttention(hidden, heads, *widths, **layer.options)
