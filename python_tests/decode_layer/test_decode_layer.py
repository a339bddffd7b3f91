"""The fused decoding step of a KDA layer: against float64 definitions, and against the layer that is not fused."""

from __future__ import annotations

import math

import pytest
import torch

import kda_cuda
from kda_cuda import decoding_layer, variants
from kda_cuda.layers import KimiDeltaAttention
from kda_cuda.schemas import DecodeLayer

from ..ops.test_errors import check as check_error
from ..support import accuracy
from ..support.decode_layer_calls import BF16, FP16, FP32, arguments, truth


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("state_dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_matches_definition(dtype, state_dtype, lower_bound, device):
    x = arguments(device, dtype, state_dtype, lower_bound=lower_bound)
    o, conv_state, state = truth(x)
    out = torch.full_like(x["v"], math.nan)
    y, kernels = device.run(lambda: kda_cuda.decode_layer(**x, out=out))
    assert y is out and kernels == (["decode_layer"] if device.runs_kernels else [])
    limit = accuracy.CAP[dtype]
    accuracy.Budget(limit, 10 * limit).check("o", y, o)
    limit = max(accuracy.CAP[state_dtype], 1e-5)
    accuracy.Budget(limit, 10 * limit).check("state", x["state"], state)
    assert torch.equal(x["conv_state"].cpu(), conv_state.to(dtype))


@pytest.mark.parametrize("dim", [1, 3, 60, 100, 128, 200, 256])
def test_every_dimension(dim, device):
    x = arguments(device, BF16, dim=dim, heads=1, batch=1)
    o, _, state = truth(x)
    accuracy.Budget(1e-2, 1e-1).check("o", kda_cuda.decode_layer(**x), o)
    accuracy.Budget(1e-5, 1e-4).check("state", x["state"], state)


def test_pool_and_strides(device):
    """Slots of both states by one index; projections as views of one packed row; a conv state with taps outermost."""
    x = arguments(device, BF16, batch=3, slots=6)
    packed = torch.cat([x[name].flatten(2) for name in "qkv"], -1)
    slots = torch.tensor([4, -1, 2], device=device)
    alone = x | {"conv_state": x["conv_state"][[4, 0, 2]], "state": x["state"][[4, 0, 2]]}
    expected = kda_cuda.decode_layer(**alone)
    conv_before, state_before = x["conv_state"].clone(), x["state"].clone()
    q, k, v = packed.unflatten(-1, (3, 2, 64)).unbind(2)
    conv_state = torch.empty(6, 3, 3 * 128, dtype=BF16, device=device).mT.copy_(x["conv_state"])
    o = kda_cuda.decode_layer(**x | {"q": q, "k": k, "v": v, "conv_state": conv_state, "slot_of": slots})
    assert torch.equal(o[[0, 2]], expected[[0, 2]]) and not o[1].any()
    assert torch.equal(conv_state[[4, 2]], alone["conv_state"][[0, 2]])
    assert torch.equal(x["state"][[4, 2]], alone["state"][[0, 2]])
    rest = [0, 1, 3, 5]
    assert torch.equal(conv_state[rest], conv_before[rest]) and torch.equal(x["state"][rest], state_before[rest])


@pytest.mark.devices("emulator", "cuda")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 128])
def test_layer_fuses_its_steps(head_dim, dtype, device, monkeypatch):
    """Five single steps of the layer, fused and not: the same outputs and the same cache, within the budget."""
    torch.manual_seed(0)
    layer = KimiDeltaAttention(hidden_size=48, num_heads=1, head_dim=head_dim).to(device, dtype).requires_grad_(False)
    x = torch.randn(2, 5, 48, device=device, dtype=dtype)
    fused, unfused = layer.new_cache(2), layer.new_cache(2)
    with torch.no_grad():
        one = slice(0, 1)
        _, kernels = device.run(lambda: layer(x[:, one], fused))
        assert kernels == ["decode_layer"]
        ys = [layer(x[:, t : t + 1], fused) for t in range(1, 5)]
        monkeypatch.setattr(decoding_layer, "serves", lambda *_: False)
        _, kernels = device.run(lambda: layer(x[:, one], unfused))
        assert kernels == ["short_conv_fwd", "decode", "gated_rmsnorm_fwd"]
        want = [layer(x[:, t : t + 1], unfused) for t in range(1, 5)]
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == FP32 else {"rtol": 5e-2, "atol": 2e-2}
    torch.testing.assert_close(torch.cat(ys, 1), torch.cat(want, 1), **tolerance)
    torch.testing.assert_close(fused.state, unfused.state, **tolerance)
    assert torch.equal(fused.conv, unfused.conv)


def test_layer_decodes_what_it_prefilled(device):
    """A prompt in chunks, then single steps: as all tokens at once."""
    torch.manual_seed(0)
    layer = KimiDeltaAttention(hidden_size=32, num_heads=2, head_dim=32).to(device).requires_grad_(False)
    x = torch.randn(1, 40, 32, device=device)
    with torch.no_grad():
        whole, cache = layer(x), layer.new_cache(1)
        parts = [layer(x[:, :36], cache), *(layer(x[:, t : t + 1], cache) for t in range(36, 40))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)


def test_gradients_take_the_layer_apart(device):
    layer = KimiDeltaAttention(hidden_size=16, num_heads=1, head_dim=16).to(device)
    cache = layer.new_cache(1)
    layer(torch.randn(1, 1, 16, device=device), cache).sum().backward()
    assert layer.q_conv1d.weight.grad is not None


def test_opcheck(device):
    x = arguments(device, dim=16)
    namespace = getattr(torch.ops, "kda_cuda_emulated" if device.name == "emulator" else "kda_cuda")
    weights = zip(("q_conv_weight", "k_conv_weight", "v_conv_weight"), x.pop("conv_weights"), strict=True)
    call = DecodeLayer(
        **x, **{name: weight.reshape(-1, 4) for name, weight in weights}, slot_of=torch.tensor([1, 0], device=device),
        out=torch.empty_like(x["v"]), scale=0.25, allow_neg_eigval=True, norm_eps=1e-5,
        zero_is_null=False,
    )  # fmt: skip
    torch.library.opcheck(namespace.decode_layer.default, call)
    assert "decode_layer" in variants.SCHEMAS


ERRORS = [
    ({"q": torch.zeros(2, 2, 2, 64)}, ValueError, "k has shape [2, 1, 2, 64], expected [B=2, T=2, H=2, K=64]"),
    ({"v": torch.zeros(2, 1, 4, 64), "g": torch.zeros(2, 1, 4, 64), "beta": torch.zeros(2, 1, 4)}, ValueError,
     "v has shape [2, 1, 4, 64], expected [B=2, T=1, H=2, D=64]"),
    ({"output_gate": torch.zeros(2, 1, 2, 64).half()}, TypeError, "output_gate has dtype float16, expected float32"),
    ({"A_log": None}, ValueError, "A_log is None, expected a Tensor [HV] (it may be absent only with a lower_bound)"),
    ({"state": torch.zeros(3, 2, 64, 64)}, ValueError,
     "state has shape [3, 2, 64, 64], expected [slots=2, HV=2, V=64, K=64]"),
    ({"slot_of": torch.tensor([1, 1])}, ValueError,
     "slot_of has slot 1 for sequences 0 and 1, expected one each"),
    ({"conv_state": torch.zeros(2, 384, 4)}, ValueError,
     "conv_state has shape [2, 384, 4], expected [slots=2, 3*H*D=384, taps-1=3]"),
    ({"conv_weights": torch.zeros(3)}, TypeError, "conv_weights is a Tensor, expected three Tensors, of q, k and v"),
    ({"conv_weights": (torch.zeros(128, 4),) * 2 + (torch.zeros(64, 4),)}, ValueError,
     "conv_weights of v has shape [64, 4], expected [H*D=128, taps=4]"),
    ({"norm_weight": torch.zeros(128)}, ValueError, "norm_weight has shape [128], expected [D=64]"),
    ({"norm_eps": "tiny"}, TypeError, "norm_eps is 'tiny' (str), expected a number"),
    ({"state": torch.zeros(2, 2, 64, 64, requires_grad=True)}, ValueError,
     "an argument requires a gradient, expected none: decode_layer has no gradients"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), ERRORS, ids=[m[:70] for _, _, m in ERRORS])
def test_errors(change, error, message):
    check_error(kda_cuda.decode_layer, arguments("cpu") | change, error, f"kda_cuda::decode_layer: {message}")
