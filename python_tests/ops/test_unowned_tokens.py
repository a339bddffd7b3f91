"""Tokens after the last sequence of cu_seqlens, as captured buckets have them: ignored, zero outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kda_cuda

from ..chunk_fwd.test_chunk_fwd import INVARIANT, MODEL, assert_ran
from ..support.bwd_calls import TOKEN_GRADIENTS, raw_gradients
from ..support.bwd_calls import gradients as gradients_of
from ..support.cases import CASES, Case, Inputs, longer

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LENGTHS = (70, 0, 65, 1, 13)
PACKED = [
    Case(
        f"unowned {name}",
        sum(LENGTHS),
        lengths=LENGTHS,
        heads=1,
        value_heads=2,
        value_dim=40,
        initial_state=True,
        dtype=dtype,
        gate=gate,
        **more,
    )
    for name, dtype, gate, more in (
        ("fp32", FP32, "long", {"beta_sigmoid": True}),
        ("bf16", BF16, "long", {"beta_sigmoid": True}),
        ("bounded fp16", FP16, "fast", {"index_dtype": torch.int64}),
        ("plain fp32", FP32, "mild", {"key_dim": 100}),
        ("bf16 wide gate", BF16, "long", {"wide_gate": True, "beta_sigmoid": True, "neg_eigval": True}),
    )
] + [CASES["varlen_v_first"]]
TAILS = [1, 75]


def assert_same(got: Tensor, wanted: Tensor, device, name: str) -> None:
    """No bit differs between kernels; the reference's sums over tokens come in other lengths."""
    tolerance = {"rtol": 0, "atol": 0} if device.runs_kernels else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(got, wanted, **tolerance, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("options", [{}, INVARIANT], ids=["", "batch_invariant"])
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_chunk_kda(case, options, tail, device):
    x = case.inputs(device)
    owned, padded = x.q.shape[1], longer(x, tail)
    with torch.inference_mode():
        call = {**padded.public(), "return_intermediate_states": True, **options}
        (o, final, h), kernels = device.run(lambda: kda_cuda.chunk_kda(**call))
        wanted, *states = kda_cuda.chunk_kda(**x.public(), return_intermediate_states=True, **options)
    assert_ran(kernels, device)
    assert not o[:, owned:].any()
    if options or not device.runs_kernels:
        assert torch.equal(o[:, :owned], wanted) and torch.equal(final, states[0]) and torch.equal(h, states[1])
    else:  # another number of tokens may be split at another one
        close = {"rtol": 3e-2, "atol": 3e-2} if case.dtype != FP32 else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(o[:, :owned], wanted, **close)
        torch.testing.assert_close(final, states[0], **close)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("case", PACKED, ids=str)
def test_gradients(case, tail, device):
    """NaN behind the last sequence, in the gradient of the output too, reaches no gradient of anything else."""
    x = case.inputs(device)
    owned = x.q.shape[1]
    found, wanted = gradients_of(longer(x, tail), **INVARIANT), gradients_of(x, **INVARIANT)
    for name in TOKEN_GRADIENTS:
        assert not found[name][:, owned:].any(), name
        assert_same(found[name][:, :owned], wanted[name], device, name)
    for name in found.keys() - set(TOKEN_GRADIENTS):
        assert found[name].isfinite().all(), name
        assert_same(found[name], wanted[name], device, name)


@pytest.mark.parametrize("wanted", [("dA_log",), ("ddt_bias", "dbeta"), ("dq", "dv"), ("dk", "dg")], ids=" ".join)
def test_some_gradients(wanted, device):
    x = longer(PACKED[1].inputs(device), 75)
    every, some = raw_gradients(x, device), raw_gradients(x, device, wanted)
    for name in wanted:
        assert some[name].isfinite().all() and torch.equal(some[name], every[name]), name


@pytest.mark.parametrize("op", [kda_cuda.chunk_kda, kda_cuda.fused_recurrent_kda], ids=lambda op: op.__name__)
def test_no_sequence_has_a_token(op, device):
    """An idle rank's dummy token."""
    x = longer(Case("idle", 0, lengths=(0, 0), initial_state=True, dtype=BF16, **MODEL).inputs(device), 3)
    leaves = {name: y.detach().requires_grad_() for name, y in x.differentiable().items()}
    call = x.replace(**leaves).public()
    call.pop("chunk_size")
    o, final = op(**call)
    assert o.shape == x.v.shape and not o.any() and torch.equal(final, x.initial_state)
    found = torch.autograd.grad([o, final], list(leaves.values()), [x.do, x.dfinal_state])
    for name, d in zip(leaves, found, strict=True):
        assert torch.equal(d, x.dfinal_state) if name == "initial_state" else not d.any(), name


def test_cu_seqlens_of_the_host(device):
    x = PACKED[0].inputs(device)
    bounds = x.cu_seqlens.cpu()
    with torch.inference_mode():
        o, _ = kda_cuda.chunk_kda(**longer(x, 9).public(), cu_seqlens_cpu=bounds)
    assert o[:, : x.q.shape[1]].isfinite().all() and not o[:, x.q.shape[1] :].any()


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_gate_by_itself(dtype, lower_bound, device):
    """kda_gate before chunk_kda: what no sequence has gets a gradient of zero, and no NaN reaches the parameters."""
    case = Case("gate first", sum(LENGTHS), lengths=LENGTHS, gate="long", dtype=dtype, wide_gate=True)
    x = case.inputs(device)
    owned = x.q.shape[1]

    def gradients(x: Inputs) -> tuple[Tensor, ...]:
        leaves = [y.to(FP32 if y is x.g else y.dtype).detach().requires_grad_() for y in (x.g, x.A_log, x.dt_bias)]
        g = kda_cuda.kda_gate(*leaves, lower_bound=lower_bound)
        o, _ = kda_cuda.chunk_kda(
            x.q, x.k, x.v, g, x.beta, cu_seqlens=x.cu_seqlens, use_qk_l2norm_in_kernel=True, **INVARIANT
        )
        return torch.autograd.grad(o, leaves, x.do)

    dg, *found = gradients(longer(x, 75))
    wanted_dg, *wanted = gradients(x)
    assert not dg[:, owned:].any()
    assert_same(dg[:, :owned], wanted_dg, device, "dg")
    for name, got, want in zip(("dA_log", "ddt_bias"), found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
