"""The layers beside KDA: each against its own recurrence in float64, and against KDA where they must be equal."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kda_cuda.layers import KimiDeltaAttention
from kda_cuda.synthetic.models import VARIANTS, NoDeltaRule, ScalarGate
from python_tests.support import oracle

HIDDEN, HEADS, DIM, TOKENS = 24, 2, 8, 70  # two chunks


def layers(*kinds: type[KimiDeltaAttention], dtype: torch.dtype = torch.float64) -> list[KimiDeltaAttention]:
    """One layer of each kind, all with the same weights."""
    torch.manual_seed(0)
    first = kinds[0](HIDDEN, HEADS, DIM)
    found = [first, *(kind(HIDDEN, HEADS, DIM) for kind in kinds[1:])]
    for layer in found:
        layer.load_state_dict(first.state_dict())
    return [layer.to(dtype) for layer in found]


def hidden(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, TOKENS, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1))


def streams(layer: KimiDeltaAttention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k, v, log-decay and beta of a layer, written from the report's equations."""

    def convolved(name: str) -> torch.Tensor:
        y = getattr(layer, f"{name}_proj")(x).transpose(1, 2)
        weight = getattr(layer, f"{name}_conv1d").weight
        y = F.conv1d(F.pad(y, (3, 0)), weight, groups=len(weight))
        return F.silu(y).transpose(1, 2).unflatten(-1, (HEADS, DIM))

    q, k = (y * torch.rsqrt(y.square().sum(-1, keepdim=True) + 1e-6) for y in (convolved("q"), convolved("k")))
    raw = layer.f_b_proj(layer.f_a_proj(x)) + layer.dt_bias
    decay = -layer.A_log.double().exp()[:, None] * F.softplus(raw.unflatten(-1, (HEADS, DIM)))
    return q, k, convolved("v"), decay, torch.sigmoid(layer.b_proj(x))


def gated(layer: KimiDeltaAttention, o: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What a layer makes of the output of its recurrence."""
    gate = layer.g_b_proj(layer.g_a_proj(x)).unflatten(-1, (HEADS, DIM))
    y = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * layer.o_norm.weight * torch.sigmoid(gate)
    return layer.o_proj(y.flatten(-2))


def linear_attention(q, k, v, g, beta) -> torch.Tensor:
    """S_t = Diag(exp g) S + beta k v^T, token by token."""
    state, outputs = v.new_zeros(len(q), HEADS, DIM, DIM), []
    for t in range(q.shape[1]):
        state = g[:, t].exp().unsqueeze(-1) * state
        state = state + torch.einsum("bhk,bhv->bhkv", beta[:, t, :, None] * k[:, t], v[:, t])
        outputs.append(DIM**-0.5 * torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1)


def test_without_the_delta_rule_it_is_gated_linear_attention():
    """Outputs and all gradients: nothing is left of the delta rule but rounding."""
    (layer,) = layers(NoDeltaRule)
    x = hidden().requires_grad_()
    own, truth = layer(x), gated(layer, linear_attention(*streams(layer, x)), x)
    torch.testing.assert_close(own, truth, rtol=1e-10, atol=1e-12)
    weights, dy = [x, *layer.parameters()], torch.randn_like(own)
    gradients = (torch.autograd.grad(y, weights, dy) for y in (own, truth))
    for found, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8 * float(wanted.abs().max()))


def test_without_the_delta_rule_in_fp32():
    """To the rounding of fp32: the scaling itself has none."""
    (layer,) = layers(NoDeltaRule, dtype=torch.float32)
    x = hidden(torch.float32)
    own = layer(x).double()
    exact = layer.double()
    truth = gated(exact, linear_attention(*streams(exact, x.double())), x.double())
    assert ((own - truth).norm() / truth.norm()).item() < 1e-5


def test_the_delta_rule_is_something_else():
    kda, without, scalar = layers(KimiDeltaAttention, NoDeltaRule, ScalarGate)
    outputs = [layer(hidden()) for layer in (kda, without, scalar)]
    for i in range(3):
        other = outputs[(i + 1) % 3]
        assert ((outputs[i] - other).norm() / other.norm()).item() > 0.01


def test_the_scalar_gate_is_gated_delta_net():
    """Against the oracle of KDA with one decay for all channels of a head."""
    (layer,) = layers(ScalarGate)
    x = hidden()
    q, k, v, _, beta = streams(layer, x)
    raw = (layer.f_b_proj(layer.f_a_proj(x)) + layer.dt_bias).unflatten(-1, (HEADS, DIM)).mean(-1)
    decay = (-layer.A_log.double().exp() * F.softplus(raw)).unsqueeze(-1).expand_as(q)
    steps = oracle.steps(q, k, v, decay, beta, v.new_zeros(2, HEADS, DIM, DIM), DIM**-0.5)
    truth = gated(layer, torch.stack([o for o, _ in steps], 1), x)
    torch.testing.assert_close(layer(x), truth, rtol=1e-10, atol=1e-12)


def test_the_scalar_gate_equals_kda_with_equal_channels():
    scalar, kda = layers(ScalarGate, KimiDeltaAttention)
    with torch.no_grad():
        for layer in (scalar, kda):
            rows = layer.f_b_proj.weight.unflatten(0, (HEADS, DIM))
            rows.copy_(rows.mean(1, keepdim=True).expand_as(rows))
            bias = layer.dt_bias.view(HEADS, DIM)
            bias.copy_(bias.mean(1, keepdim=True).expand_as(bias))
    torch.testing.assert_close(scalar(hidden()), kda(hidden()), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [ScalarGate, NoDeltaRule])
def test_steps_on_a_cache_equal_the_parallel_pass(kind):
    (layer,) = layers(kind)
    x = hidden()
    with torch.no_grad():
        cache = layer.new_cache(2)
        pieces = [layer(x[:, :60], cache), *(layer(x[:, t : t + 1], cache) for t in range(60, TOKENS))]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x).detach(), rtol=1e-8, atol=1e-10)


def test_variants_have_the_parameters_of_kda():
    """So equal seeds give equal first weights."""
    found = []
    for kind in VARIANTS.values():
        torch.manual_seed(5)
        found.append(kind(HIDDEN, HEADS, DIM).state_dict())
    for other in found[1:]:
        assert other.keys() == found[0].keys() and all(torch.equal(other[name], x) for name, x in found[0].items())


def test_no_delta_rule_refuses_fp16():
    (layer,) = layers(NoDeltaRule, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"NoDeltaRule: k has dtype torch.float16, expected fp32, bf16 or float64"):
        layer(hidden(torch.float16))
