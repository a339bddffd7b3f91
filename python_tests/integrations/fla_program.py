"""fla's functions before, during and after registration: a program, since fla must stay out of the other tests."""

from __future__ import annotations

import json
import os

import torch
from fla.ops.kda import chunk_kda, fused_recurrent_kda
from fla.ops.kda.gate import fused_kda_gate
from fla.ops.kda.naive import naive_recurrent_kda

import kda_cuda
from kda_cuda import testing
from kda_cuda.integrations import fla as door
from kda_cuda.integrations import transformers

from . import fla_layer
from .peers import documented

NAMES = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
FLAGS = {"use_gate_in_kernel": True, "use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True}


def inputs(tokens: int = 70, dim: int = 64) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = [(1, tokens, 2, dim)] * 4 + [(1, tokens, 2), (2,), (2 * dim,)]
    return {name: torch.randn(shape) for name, shape in zip(NAMES, shapes, strict=True)}


def gradients(function, x: dict[str, torch.Tensor], **options) -> list[torch.Tensor]:
    """Output, final state and the gradients of all inputs."""
    x = {name: t.clone().requires_grad_() for name, t in x.items()}
    o, state = function(**x, output_final_state=True, **options)
    torch.manual_seed(1)
    loss = (o * torch.randn(o.shape)).sum() + (state * torch.randn(state.shape)).sum()
    return [o, state, *torch.autograd.grad(loss, list(x.values()))]


def plain(q, k, v, g, beta, A_log, dt_bias, output_final_state=True, lower_bound=None, **_):
    """fla's own token-by-token function, with the transforms in PyTorch."""
    q, k = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    g = g + dt_bias.view(g.shape[-2:])
    amplitude = A_log.exp().unsqueeze(-1)
    g = -amplitude * torch.nn.functional.softplus(g) if lower_bound is None else lower_bound * (amplitude * g).sigmoid()
    return naive_recurrent_kda(q, k, v, g, beta.sigmoid(), output_final_state=True)


def error(results: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest relative RMS error of any of them."""
    pairs = zip(results, expected, strict=True)
    return max(((a - b).double().norm() / b.double().norm()).item() for a, b in pairs)


def message(call) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def no_grad(function, x: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return function(**x, **FLAGS)[0]


def kernels(call) -> list[str]:
    """The kernels that ran on the emulator."""
    with testing.emulated():
        call()
        return testing.take_record()


def beside_transformers() -> dict[str, str]:
    """transformers calls fla where that is installed: its layer alone, and by either registration."""
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    sizes = {"hidden_size": 16, "linear_head_dim": 8, "linear_num_heads": 2, "num_hidden_layers": 1}
    config = KimiLinearConfig(**sizes, layer_types=["linear_attention"])
    layer, seen = KimiLinearDeltaAttention(config, 0), {}
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.1)

    def call() -> None:
        layer(torch.randn(1, 5, 16)).sum().backward()

    for name, module in (("alone", None), ("by fla", door), ("by transformers", transformers)):
        if module:
            module.register()
        seen[f"transformers {name}"] = message(call)
        if module:
            module.unregister()
    return seen


def main() -> None:
    x, short, step = inputs(), inputs(tokens=20), inputs(tokens=1)
    raw = {name: x[name] for name in ("g", "A_log", "dt_bias")}
    (document,) = documented("fla")
    result = {"before": message(lambda: chunk_kda(**x, **FLAGS)), "served": door.register()}
    door.register()
    for name, bound in (("softplus", None), ("bounded", -5.0)):
        options = FLAGS | {"lower_bound": bound}
        ours = gradients(chunk_kda, x, **options)
        result[f"{name} error"] = error(ours, gradients(plain, x, **options))
        result[f"{name} same"] = all(map(torch.equal, ours, gradients(kda_cuda.chunk_kda, x, **options)))
    result["recurrent error"] = error([no_grad(fused_recurrent_kda, x)], [no_grad(plain, x)])
    result["gate error"] = error([fused_kda_gate(**raw)], [kda_cuda.kda_gate(**raw)])
    result["counted"] = door.report()["served"]
    exec(document, {})
    result["training kernels"] = kernels(lambda: gradients(chunk_kda, short, **FLAGS))
    result["decoding kernels"] = kernels(lambda: no_grad(fused_recurrent_kda, step))
    result["gate kernels"] = kernels(lambda: fused_kda_gate(*(step[name] for name in ("g", "A_log", "dt_bias"))))
    result["too wide"] = message(lambda: chunk_kda(**inputs(4, 512), **FLAGS))
    result["unknown"] = message(lambda: chunk_kda(**x, **FLAGS, no_such_option=1))
    os.environ[door.ENV_VAR] = "0"
    result["switched off"] = message(lambda: chunk_kda(**x, **FLAGS))
    del os.environ[door.ENV_VAR]
    result["on again"] = message(lambda: chunk_kda(**x, **FLAGS))
    door.unregister()
    result["after"] = message(lambda: fused_recurrent_kda(**step, **FLAGS))
    print(json.dumps(result | beside_transformers() | fla_layer.checks(kernels)))


if __name__ == "__main__":
    main()
