"""SwiGLU and mixtures of experts: routing by definition, both products of groups, gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kda_cuda.layers import MixtureOfExperts
from kda_cuda.nn import feed_forward

ROUTINGS = {
    "plain": {},
    "groups": {"num_groups": 4, "topk_group": 2},
    "scaled": {"renormalize": False, "scaling": 2.5},
    "groups of one": {"num_groups": 8, "topk_group": 4},
}


def moe(hidden: int = 16, width: int = 12, shared: int = 1, dtype=torch.float64, **routing) -> MixtureOfExperts:
    torch.manual_seed(0)
    layer = MixtureOfExperts(hidden, width, num_experts=8, top_k=3, num_shared_experts=shared, **routing).to(dtype)
    layer.gate.e_score_correction_bias.normal_(std=0.3)
    return layer


def by_definition(layer: MixtureOfExperts, token: torch.Tensor) -> torch.Tensor:
    """One token, expert by expert."""
    gate = layer.gate
    scores = torch.sigmoid(gate.weight @ token)
    biased = (scores + gate.e_score_correction_bias).tolist()
    size = 8 // gate.num_groups
    groups = [sorted(biased[i : i + size], reverse=True) for i in range(0, 8, size)]
    worth = [sum(group[:2]) for group in groups]
    usable = sorted(range(gate.num_groups), key=lambda i: -worth[i])[: gate.topk_group]
    allowed = [i for i in range(8) if i // size in usable]
    chosen = sorted(allowed, key=lambda i: -biased[i])[:3]
    total = scores[chosen].sum() if gate.renormalize else 1.0

    def swiglu(gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        g, u = (gate_up @ token).chunk(2)
        return down @ (F.silu(g) * u)

    experts, shared = layer.experts, layer.shared_experts
    y = sum(scores[i] / total * gate.scaling * swiglu(experts.gate_up_proj[i], experts.down_proj[i]) for i in chosen)
    return y + swiglu(torch.cat((shared.gate_proj.weight, shared.up_proj.weight)), shared.down_proj.weight)


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_a_mixture_is_its_definition(routing):
    """Outputs and all gradients, in float64."""
    layer, x = moe(**routing), torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    leaves, weights = [x, *layer.parameters()], torch.randn(2, 5, 16, dtype=torch.float64)
    y, expected = layer(x), torch.stack([by_definition(layer, token) for token in x.flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(y, expected)
    got, wanted = (torch.autograd.grad((z * weights).sum(), leaves) for z in (y, expected))
    torch.testing.assert_close(got, wanted)


def test_the_correction_bias_chooses_and_weighs_nothing():
    layer, x = moe(shared=0), torch.randn(7, 16, dtype=torch.float64)
    before = layer(x)
    layer.gate.e_score_correction_bias.add_(5)  # the order of experts stays
    torch.testing.assert_close(layer(x), before)
    layer.gate.e_score_correction_bias.copy_(torch.arange(8) * 10.0)
    experts, weights = layer.gate(x)
    assert torch.equal(experts.sort(1).values, torch.tensor([[5, 6, 7]]).expand(7, 3))
    torch.testing.assert_close(weights.sum(1), torch.ones(7, dtype=torch.float64))


@pytest.mark.devices("cpu", "cuda")
def test_torchs_product_equals_the_loop(device, monkeypatch):
    """Where torch has a grouped product it is used: for bf16, and on the CPU for fp32; some groups are empty."""
    calls = []
    product = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *a, **options: calls.append(a) or product(*a, **options))
    ends = torch.tensor([3, 3, 7, 10], dtype=torch.int32, device=device)
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        x = torch.randn(10, 32, device=device, dtype=dtype, requires_grad=True)
        weights = torch.randn(4, 24, 32, device=device, dtype=dtype, requires_grad=True)
        results = []
        for served in (True, False):
            if not served:
                monkeypatch.setattr(feed_forward, "_is_served", lambda *_: False)
            y = feed_forward.grouped_product(x, weights, ends)
            results.append([y, *torch.autograd.grad((y * y).sum(), [x, weights])])
        monkeypatch.undo()
        monkeypatch.setattr(F, "grouped_mm", lambda *a, **options: calls.append(a) or product(*a, **options))
        for got, expected in zip(*results, strict=True):
            assert (got - expected).abs().max() <= tolerance * expected.abs().max()
    assert len(calls) == (1 if str(device) == "cuda" else 2)


@pytest.mark.parametrize("width", [12, 10], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype, width):
    exact, x = moe(width=width), torch.randn(9, 16).to(dtype)
    low = moe(width=width).to(dtype)
    low.load_state_dict(exact.state_dict())
    assert low.gate.e_score_correction_bias.dtype == torch.float32
    expected, y = moe(width=width)(x.double()), low(x)
    same = (low.gate(x)[0].sort(1).values == exact.gate(x.double())[0].sort(1).values).all(1)
    assert y.dtype == dtype and same.sum() > 6
    error = (y - expected)[same].abs().max() / expected.abs().max()
    assert error <= {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]


def test_autocast():
    layer, x = moe(dtype=torch.float32), torch.randn(9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert (y - layer(x)).abs().max() <= 5e-2 * layer(x).abs().max()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_no_tokens(shape):
    layer = moe(dtype=torch.float32)
    y = layer(torch.zeros(shape))
    assert y.shape == shape
    y.sum().backward()


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({"num_groups": 3}, "num_groups is 3, expected a divisor of the 8 experts"),
        ({"num_groups": 2, "topk_group": 3}, "topk_group is 3, expected 1 <= topk_group <= 2, the groups"),
        ({"num_groups": 4}, "top_k is 3, expected 1 <= top_k <= 2, the experts of topk_group=1 groups"),
    ],
)
def test_errors(routing, message):
    with pytest.raises(ValueError) as raised:
        moe(**routing)
    assert str(raised.value) == f"kda_cuda::Router: {message}"
