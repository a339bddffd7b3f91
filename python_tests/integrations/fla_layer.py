"""fla's layer, patched, against its own definition in PyTorch: part of the program that imports fla.

fla's layer has no CPU path, so what it computes is written down here, around fla's own token-by-token function.
"""

from __future__ import annotations

import inspect
import itertools

import torch
import torch.nn.functional as F
from fla.layers.kda import KimiDeltaAttention
from fla.models.utils import Cache
from fla.ops.kda.naive import naive_recurrent_kda

from kda_cuda.integrations import transformers as door

OPTIONS = {
    "plain": {},
    "bounded": {"lower_bound": -5.0, "safe_gate": True},
    "negative": {"allow_neg_eigval": True},
    "grouped": {"num_v_heads": 4, "expand_v": 0.5},
    "no convolution": {"use_short_conv": False},
}


def new_layer(**options) -> KimiDeltaAttention:
    torch.manual_seed(0)
    layer = KimiDeltaAttention(hidden_size=24, head_dim=16, num_heads=2, layer_idx=0, **options).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return layer


def defined(layer: KimiDeltaAttention, x: torch.Tensor) -> torch.Tensor:
    """What fla's layer is: each row of x is a sequence of its own."""

    def stream(name: str, dim: int) -> torch.Tensor:
        y = getattr(layer, f"{name}_proj")(x)
        if layer.use_short_conv:
            conv = getattr(layer, f"{name}_conv1d")
            y = F.conv1d(F.pad(y.transpose(1, 2), (3, 0)), conv.weight, groups=y.shape[-1]).transpose(1, 2)
        return F.silu(y).unflatten(-1, (-1, dim))

    keys, values = layer.head_k_dim, layer.head_v_dim
    q, k, v = stream("q", keys), stream("k", keys), stream("v", values)
    q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    group = layer.num_v_heads // layer.num_heads
    q, k = (y.repeat_interleave(group, dim=2) for y in (q, k))
    g = layer.f_proj(x).unflatten(-1, (-1, keys)) + layer.dt_bias.view(-1, keys)
    amplitude = layer.A_log.exp().unsqueeze(-1)
    bound = layer.lower_bound
    g = -amplitude * F.softplus(g) if bound is None else bound * torch.sigmoid(amplitude * g)
    beta = layer.b_proj(x).sigmoid() * (2 if layer.allow_neg_eigval else 1)
    o = naive_recurrent_kda(q, k, v, g, beta)[0]
    gate = layer.g_proj(x).unflatten(-1, (-1, values)).sigmoid()
    y = F.rms_norm(o, (values,), layer.o_norm.weight, layer.o_norm.eps) * gate
    return layer.o_proj(y.flatten(-2))


def with_gradients(layer, call) -> dict[str, torch.Tensor]:
    layer.zero_grad()
    y = call()
    torch.manual_seed(1)
    (y * torch.randn(y.shape)).sum().backward()
    return {"output": y.detach()} | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


def error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert got.keys() == expected.keys()
    return max(((got[n] - x).double().norm() / x.double().norm()).item() for n, x in expected.items())


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return error({"y": a}, {"y": b})


def in_pieces(layer, x: torch.Tensor, sizes: tuple[int, ...], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Through fla's own cache."""
    cache, begin, pieces = Cache(), 0, []
    for size in sizes:
        part = None if mask is None else mask[:, : begin + size]
        y, _, cache = layer(x[:, begin : begin + size], attention_mask=part, past_key_values=cache, use_cache=True)
        pieces, begin = [*pieces, y], begin + size
    return torch.cat(pieces, dim=1)


def checks(kernels) -> dict:
    """Errors of every form of the layer, and the kernels of a training step and of a decoding step."""
    result, x = {}, torch.randn(2, 37, 24)
    known = inspect.signature(KimiDeltaAttention.__init__).parameters
    for name, options in OPTIONS.items():
        if not options.keys() <= known.keys():
            continue
        layer = new_layer(**options)
        expected = with_gradients(layer, lambda layer=layer: defined(layer, x))
        door.patch(layer)
        result[f"layer {name}"] = error(with_gradients(layer, lambda layer=layer: layer(x)[0]), expected)
    layer = new_layer()
    names = door.patch(layer)
    with torch.no_grad():
        whole = defined(layer, x)
        result["pieces"] = difference(in_pieces(layer, x, (30, 1, 1, 5)), whole)
        row, bounds = x.flatten(0, 1)[None], torch.tensor([0, 20, 37, 74])
        apart = torch.cat([defined(layer, row[:, a:b]) for a, b in itertools.pairwise(bounds)], dim=1)
        result["packed"] = difference(layer(row, cu_seqlens=bounds)[0], apart)
        mask = torch.ones(2, 37, dtype=torch.long)
        mask[0, :2] = 0
        padded = torch.cat([F.pad(defined(layer, x[:1, 2:]), (0, 0, 2, 0)), whole[1:]])
        result["padded"] = difference(layer(x, attention_mask=mask)[0], padded)
        result["padded pieces"] = difference(in_pieces(layer, x, (3, 30, 1, 3), mask), padded)
    result["layer kernels"] = kernels(lambda: with_gradients(layer, lambda: layer(x[:1, :5])[0]))
    with torch.no_grad():
        result["step kernels"] = kernels(lambda: in_pieces(layer, x[:1], (5, 1)))
    result["names"], result["undone"] = names, door.unpatch(layer)
    return result
