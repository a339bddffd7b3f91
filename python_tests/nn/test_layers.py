"""The layers: names of the released checkpoint, initialisation, causality, caches, dtypes."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F

from kda_cuda.layers import GatedRMSNorm, KimiDeltaAttention, NoPEMultiLatentAttention, ShortConvolution

HIDDEN, HEADS, DIM = 48, 2, 32


def kda_layer(seed: int = 0) -> KimiDeltaAttention:
    torch.manual_seed(seed)
    return KimiDeltaAttention(HIDDEN, HEADS, DIM)


def mla_layer(seed: int = 0) -> NoPEMultiLatentAttention:
    torch.manual_seed(seed)
    return NoPEMultiLatentAttention(HIDDEN, HEADS, kv_lora_rank=24, nope_dim=16, rope_dim=8, v_head_dim=20)


LAYERS = pytest.mark.parametrize("make", [kda_layer, mla_layer], ids=["kda", "mla"])


def kda_by_definition(layer: KimiDeltaAttention, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64, token by token, written from the report alone."""
    p = {name: t.double() for name, t in layer.state_dict().items()}
    x = x.double()

    def convolved(name: str) -> torch.Tensor:
        y, taps = x @ p[f"{name}_proj.weight"].T, p[f"{name}_conv1d.weight"][:, 0]
        padded = torch.cat((y.new_zeros(y.shape[0], 3, y.shape[2]), y), dim=1)
        return F.silu(sum(padded[:, j : j + y.shape[1]] * taps[:, j] for j in range(4))).unflatten(-1, (HEADS, DIM))

    q, k, v = (convolved(name) for name in "qkv")
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    low_rank = x @ p["f_a_proj.weight"].T @ p["f_b_proj.weight"].T + p["dt_bias"]
    decay = torch.exp(-p["A_log"].exp()[:, None] * F.softplus(low_rank).unflatten(-1, (HEADS, DIM)))
    beta = torch.sigmoid(x @ p["b_proj.weight"].T)
    state, outputs = x.new_zeros(x.shape[0], HEADS, DIM, DIM), []
    for t in range(x.shape[1]):
        state = decay[:, t, :, :, None] * state
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + beta[:, t, :, None, None] * k[:, t, :, :, None] * error[:, :, None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * DIM**-0.5)
    o = torch.stack(outputs, 1)
    o = o / (o.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["o_norm.weight"]
    gate = torch.sigmoid(x @ p["g_a_proj.weight"].T @ p["g_b_proj.weight"].T).unflatten(-1, (HEADS, DIM))
    return (o * gate).flatten(-2) @ p["o_proj.weight"].T


def mla_by_definition(layer: NoPEMultiLatentAttention, x: torch.Tensor) -> torch.Tensor:
    """Explicit softmax attention in float64."""
    p = {name: t.double() for name, t in layer.state_dict().items()}
    x = x.double()
    q = (x @ p["q_proj.weight"].T).unflatten(-1, (HEADS, 24))
    latent, shared = (x @ p["kv_a_proj_with_mqa.weight"].T).split((24, 8), -1)
    latent = latent / (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt() * p["kv_a_layernorm.weight"]
    kv = (latent @ p["kv_b_proj.weight"].T).unflatten(-1, (HEADS, 36))
    scores = torch.einsum("bihd,bjhd->bhij", q[..., :16], kv[..., :16])
    scores = (scores + torch.einsum("bihd,bjd->bhij", q[..., 16:], shared)) * 24**-0.5
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    o = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(future, -math.inf).softmax(-1), kv[..., 16:])
    return o.flatten(-2) @ p["o_proj.weight"].T


@pytest.mark.parametrize("make, truth", [(kda_layer, kda_by_definition), (mla_layer, mla_by_definition)])
def test_layer_is_its_definition(make, truth):
    layer, x = make(), torch.randn(2, 70, HIDDEN)
    torch.testing.assert_close(layer(x).double(), truth(layer, x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kda_layer_runs_on_the_kernels(device):
    """Parallel and, on a cache, in pieces with single steps."""
    layer, x = kda_layer(), torch.randn(1, 34, HIDDEN)
    truth, layer, x = kda_by_definition(layer, x), layer.to(device), x.to(device)
    cache = layer.new_cache(1)

    def both() -> list[torch.Tensor]:
        return [layer(x), torch.cat([layer(part, cache) for part in x.split((32, 1, 1), dim=1)], 1)]

    outputs, kernels = device.run(both)
    assert not device.runs_kernels or len(kernels) >= 4
    for y in outputs:
        torch.testing.assert_close(y.double().cpu(), truth, rtol=1e-4, atol=2e-5)


def test_parameters_have_the_names_and_shapes_of_the_checkpoint():
    with torch.device("meta"):
        kda = KimiDeltaAttention(2304, num_heads=32, head_dim=128)
        mla = NoPEMultiLatentAttention(2304, 32, kv_lora_rank=512, nope_dim=128, rope_dim=64, v_head_dim=128)
    shapes = {name: list(p.shape) for name, p in kda.named_parameters()}
    expected = {f"{x}_proj.weight": [4096, 2304] for x in "qkv"} | {f"{x}_conv1d.weight": [4096, 1, 4] for x in "qkv"}
    expected |= {"f_a_proj.weight": [128, 2304], "f_b_proj.weight": [4096, 128], "b_proj.weight": [32, 2304]}
    expected |= {"g_a_proj.weight": [128, 2304], "g_b_proj.weight": [4096, 128], "o_proj.weight": [2304, 4096]}
    assert shapes == expected | {"A_log": [32], "dt_bias": [4096], "o_norm.weight": [128]}
    assert {name: list(p.shape) for name, p in mla.named_parameters()} == {
        "q_proj.weight": [32 * 192, 2304],
        "kv_a_proj_with_mqa.weight": [576, 2304],
        "kv_a_layernorm.weight": [512],
        "kv_b_proj.weight": [32 * 256, 512],
        "o_proj.weight": [2304, 4096],
    }


def test_gate_parameters_start_as_in_the_report():
    torch.manual_seed(0)
    layer = KimiDeltaAttention(8, num_heads=256, head_dim=64)
    amplitude, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert amplitude.min() >= 1 - 1e-5 and amplitude.max() <= 16 + 1e-4
    assert 7.5 < amplitude.mean() < 9.5  # of U(1, 16): 8.5
    assert dt.min() >= 1e-3 * 0.99 and dt.max() <= 1e-1 * 1.01
    assert math.log(0.009) < dt.log().mean() < math.log(0.011)  # log-uniform: the median is 1e-2


@LAYERS
def test_a_token_sees_no_later_token(make):
    layer, x = make(), torch.randn(1, 70, HIDDEN)
    changed = x.clone()
    changed[:, 40:] += 1
    before, after = layer(x), layer(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40], rtol=1e-5, atol=1e-6)
    assert (before[:, 40:] - after[:, 40:]).abs().max() > 1e-2


@LAYERS
@pytest.mark.parametrize("parts", [[1] * 20, [7, 1, 1, 11], [2, 3, 1, 14], [19, 1]], ids=str)
@torch.no_grad()
def test_a_cache_continues_where_the_last_call_stopped(make, parts):
    layer, x = make(), torch.randn(2, 20, HIDDEN)
    cache = layer.new_cache(2)
    pieces = [layer(part, cache) for part in x.split(parts, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_cache_bytes_are_what_the_caches_hold():
    kda, mla = kda_layer(), mla_layer()
    kda_cache, mla_cache = kda.new_cache(1), mla.new_cache(1)
    held = set()
    for tokens in (5, 1, 30):
        x = torch.randn(1, tokens, HIDDEN)
        kda(x, kda_cache), mla(x, mla_cache)
        held.add(kda_cache.nbytes())
    assert held == {kda.cache_bytes(36, torch.float32)} == {3 * 64 * 3 * 4 + 2 * 32 * 32 * 4}
    assert mla_cache.nbytes() == mla.cache_bytes(36, torch.float32) == 36 * (24 + 8) * 4


@LAYERS
def test_every_parameter_gets_a_gradient(make):
    layer = make()
    layer(torch.randn(2, 9, HIDDEN)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_leaves_the_gate_parameters_in_fp32(dtype):
    layer = kda_layer()
    exact = layer.A_log.clone()
    layer(torch.randn(1, 3, HIDDEN)).sum().backward()
    layer.to(dtype)
    assert {name for name, p in layer.named_parameters() if p.dtype == torch.float32} == {"A_log", "dt_bias"}
    assert torch.equal(layer.A_log, exact) and layer.A_log.grad.dtype == torch.float32
    cache = layer.new_cache(1)
    with torch.no_grad():
        y = layer(torch.randn(1, 5, HIDDEN, dtype=dtype), cache)
    assert y.dtype == cache.conv.dtype == dtype and cache.state.dtype == torch.float32


@LAYERS
def test_survives_deepcopy_and_pickle(make):
    layer, x = make(), torch.randn(1, 6, HIDDEN)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_short_convolution_is_causal_and_depthwise():
    conv = ShortConvolution(3)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[[0.0, 0, 0, 1]], [[1.0, 0, 0, 0]], [[0.0, 0, 1, 0]]]))
    x = torch.randn(1, 6, 3)
    late = torch.stack((x[0, :, 0], F.pad(x[0, :, 1], (3, 0))[:6], F.pad(x[0, :, 2], (1, 0))[:6]), 1)
    torch.testing.assert_close(conv(x)[0], F.silu(late))


def test_gated_rms_norm_of_large_half_precision_values_does_not_overflow():
    norm = GatedRMSNorm(4)
    y = norm(torch.full((1, 4), 6e4, dtype=torch.float16), torch.zeros(1, 4, dtype=torch.float16))
    torch.testing.assert_close(y, torch.full((1, 4), 0.5, dtype=torch.float16))
