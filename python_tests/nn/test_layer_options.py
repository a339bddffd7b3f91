"""What a layer can be beside the released one: grouped values, gates of other kinds, biases, low-rank queries."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kda_cuda.layers import KimiDeltaAttention, NoPEMultiLatentAttention
from kda_cuda.parallel import head_slice

HIDDEN, HEADS, DIM = 24, 2, 16
KDA_OPTIONS = {
    "value heads": {"num_v_heads": 4},
    "wide values": {"expand_v": 1.5},
    "bounded": {"lower_bound": -5.0},
    "full rank": {"full_rank_gate": True, "full_rank_output_gate": True},
    "negative": {"allow_neg_eigval": True},
    "bias": {"conv_bias": True},
    "all": {
        "num_v_heads": 6,
        "expand_v": 0.5,
        "lower_bound": -3.0,
        "full_rank_output_gate": True,
        "allow_neg_eigval": True,
        "conv_bias": True,
    },
}
MLA_OPTIONS = {
    "low rank": {"q_lora_rank": 12},
    "gated": {"output_gate": True},
    "both": {"q_lora_rank": 12, "output_gate": True},
}
NAMES = [("kda", name) for name in KDA_OPTIONS] + [("mla", name) for name in MLA_OPTIONS]
EACH = pytest.mark.parametrize(("kind", "name"), NAMES, ids=[f"{kind} {name}" for kind, name in NAMES])


def make(kind: str, name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "kda":
        return KimiDeltaAttention(HIDDEN, HEADS, DIM, **KDA_OPTIONS[name])
    return NoPEMultiLatentAttention(HIDDEN, HEADS, 20, 8, 4, 10, **MLA_OPTIONS[name])


def kda_by_definition(layer: KimiDeltaAttention, x: torch.Tensor) -> torch.Tensor:
    """In float64, token by token."""
    p, x = {name: t.double() for name, t in layer.state_dict().items()}, x.double()
    width, heads = layer.v_head_dim, layer.num_v_heads

    def product(name: str) -> torch.Tensor:
        if f"{name}_proj.weight" in p:
            return x @ p[f"{name}_proj.weight"].T
        return x @ p[f"{name}_a_proj.weight"].T @ p[f"{name}_b_proj.weight"].T

    def convolved(name: str, dim: int) -> torch.Tensor:
        y, taps = F.pad(product(name), (0, 0, 3, 0)), p[f"{name}_conv1d.weight"][:, 0]
        y = sum(y[:, j : j + x.shape[1]] * taps[:, j] for j in range(4)) + p.get(f"{name}_conv1d.bias", 0)
        return F.silu(y).unflatten(-1, (-1, dim))

    q, k, v = convolved("q", DIM), convolved("k", DIM), convolved("v", width)
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    q, k = (t.repeat_interleave(heads // HEADS, 2) for t in (q, k))
    raw = (product("f") + p["dt_bias"]).unflatten(-1, (heads, DIM))
    amplitude = p["A_log"].exp()[:, None]
    bound = layer.lower_bound
    decay = torch.exp(-amplitude * F.softplus(raw) if bound is None else bound * torch.sigmoid(amplitude * raw))
    beta = torch.sigmoid(product("b")) * (2 if layer.allow_neg_eigval else 1)
    state, outputs = x.new_zeros(x.shape[0], heads, DIM, width), []
    for t in range(x.shape[1]):
        state = decay[:, t, :, :, None] * state
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + beta[:, t, :, None, None] * k[:, t, :, :, None] * error[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * DIM**-0.5)
    o = torch.stack(outputs, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["o_norm.weight"]
    return (o * torch.sigmoid(product("g")).unflatten(-1, (heads, width))).flatten(-2) @ p["o_proj.weight"].T


def mla_by_definition(layer: NoPEMultiLatentAttention, x: torch.Tensor) -> torch.Tensor:
    p, x = {name: t.double() for name, t in layer.state_dict().items()}, x.double()

    def normed(y: torch.Tensor, name: str) -> torch.Tensor:
        return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p[f"{name}_layernorm.weight"]

    if "q_proj.weight" in p:
        q = x @ p["q_proj.weight"].T
    else:
        q = normed(x @ p["q_a_proj.weight"].T, "q_a") @ p["q_b_proj.weight"].T
    q = q.unflatten(-1, (HEADS, 12))
    latent, shared = (x @ p["kv_a_proj_with_mqa.weight"].T).split((20, 4), -1)
    kv = (normed(latent, "kv_a") @ p["kv_b_proj.weight"].T).unflatten(-1, (HEADS, 18))
    scores = torch.einsum("bihd,bjhd->bhij", q[..., :8], kv[..., :8])
    scores = (scores + torch.einsum("bihd,bjd->bhij", q[..., 8:], shared)) * 12**-0.5
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    o = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(future, -math.inf).softmax(-1), kv[..., 8:]).flatten(-2)
    if "g_proj.weight" in p:
        o = o * torch.sigmoid(x @ p["g_proj.weight"].T)
    return o @ p["o_proj.weight"].T


@EACH
@torch.no_grad()
def test_an_option_is_its_definition(kind, name):
    layer, x = make(kind, name), torch.randn(2, 20, HIDDEN)
    truth = kda_by_definition if kind == "kda" else mla_by_definition
    torch.testing.assert_close(layer(x).double(), truth(layer, x), rtol=1e-4, atol=1e-5)


@EACH
@torch.no_grad()
def test_pieces_equal_one_pass(kind, name):
    layer, x = make(kind, name), torch.randn(2, 12, HIDDEN)
    cache = layer.new_cache(2)
    pieces = torch.cat([layer(part, cache) for part in x.split((8, 1, 3), dim=1)], 1)
    torch.testing.assert_close(pieces, layer(x), rtol=1e-4, atol=1e-5)
    assert cache.nbytes() == 2 * layer.cache_bytes(12, torch.float32)


@EACH
@torch.no_grad()
def test_heads_divided_among_ranks_add_up(kind, name):
    layer, x = make(kind, name), torch.randn(1, 9, HIDDEN)
    parts = [head_slice(layer, rank, 2) for rank in range(2)]
    torch.testing.assert_close(sum(part(x) for part in parts), layer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.devices("emulator", "cuda")
@pytest.mark.parametrize("name", ["bounded", "negative", "value heads", "bias"])
@torch.no_grad()
def test_steps_on_the_kernels(name, device):
    """One launch a step where the kernel knows the option, the recurrence where it does not."""
    layer, x = make("kda", name), torch.randn(2, 6, HIDDEN)
    expected, moved = layer(x), make("kda", name).to(device)
    cache = moved.new_cache(2)
    got, kernels = device.run(lambda: torch.cat([moved(part.to(device), cache) for part in x.split(1, dim=1)], 1))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-4)
    assert ("decode_layer" in kernels) == (name in ("bounded", "negative"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_v_heads": 3}, ValueError, "num_v_heads is 3, expected a multiple of the 2 heads of q and k"),
        ({"expand_v": 1.3}, ValueError, "expand_v is 1.3, expected a whole number > 0 for head_dim=16 times it"),
        ({"expand_v": "1"}, TypeError, "expand_v is '1' (str), expected a number"),
        ({"lower_bound": 5}, ValueError, "lower_bound is 5, expected a finite negative number"),
        ({"conv_bias": 1}, TypeError, "conv_bias is 1 (int), expected a bool"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error) as raised:
        KimiDeltaAttention(HIDDEN, HEADS, DIM, **options)
    assert str(raised.value).startswith(f"kda_cuda::KimiDeltaAttention: {message}")


def test_one_convolution_alone_may_have_a_bias():
    layer, x = make("kda", "bias"), torch.randn(1, 6, HIDDEN)
    with torch.no_grad():
        layer.q_conv1d.bias.zero_(), layer.v_conv1d.bias.zero_()
    expected = layer(x)
    layer.q_conv1d.bias = layer.v_conv1d.bias = None
    torch.testing.assert_close(layer(x), expected)
