"""Arguments of ``kda_cuda.decode_layer``, and their truth."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import oracle
from .cases import Draw

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def arguments(device, dtype=FP32, state_dtype=FP32, dim=64, heads=2, batch=2, slots=None, lower_bound=None) -> dict:
    d = Draw(f"layer {dim} {heads} {batch}")
    slots, width = slots or batch, heads * dim

    def normal(*shape, to=dtype):
        return d.normal(*shape).to(device=device, dtype=to)

    names = ("q", "k", "v", "g", "output_gate")
    return {name: normal(batch, 1, heads, dim) for name in names} | {
        "beta": normal(batch, 1, heads),
        "conv_state": normal(slots, 3 * width, 3),
        "conv_weights": tuple(0.5 * normal(width, 1, 4) for _ in range(3)),
        "norm_weight": normal(dim),
        "state": normal(slots, heads, dim, dim, to=state_dtype),
        "A_log": normal(heads, to=FP32),
        "dt_bias": normal(heads, dim, to=FP32),
        "lower_bound": lower_bound,
    }


def doubled(x: dict) -> dict:
    def double(t):
        return t.detach().cpu().double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    return {name: tuple(map(double, t)) if isinstance(t, tuple) else double(t) for name, t in x.items()}


def truth(x: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, conv state and state in float64, from the definitions."""
    x = doubled(x)
    heads, dim = x["q"].shape[2:]
    inputs = torch.cat([x[name].flatten(2) for name in "qkv"], -1).squeeze(1)
    window = torch.cat([x["conv_state"], inputs.unsqueeze(-1)], -1)
    weight = torch.cat([w.reshape(-1, 4) for w in x["conv_weights"]])
    q, k, v = F.silu((window * weight).sum(-1)).unflatten(-1, (3, heads, dim)).unsqueeze(2).unbind(1)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    raw, amplitude = x["g"] + x["dt_bias"], x["A_log"].exp().unsqueeze(-1)
    bound = x["lower_bound"]
    g = -amplitude * F.softplus(raw, threshold=100) if bound is None else bound * torch.sigmoid(amplitude * raw)
    ((o, state),) = oracle.steps(q, k, v, g, torch.sigmoid(x["beta"]), x["state"].mT, dim**-0.5)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * x["norm_weight"]
    return (o * torch.sigmoid(x["output_gate"][:, 0])).unsqueeze(1), window[..., 1:], state.mT
