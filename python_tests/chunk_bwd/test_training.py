"""Gradients of ``chunk_kda`` behind a forward kernel: right whoever serves the backward, and announced."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

import kda_cuda
from kda_cuda import library, variants

from ..support import accuracy, bwd_calls, oracle
from ..support.cases import CASES, Inputs


def train(x: Inputs, **options) -> dict[str, Tensor]:
    """Outputs, and gradients of ``sum(o do) + sum(final_state dfinal_state)``."""
    leaves = {name: y.clone().requires_grad_() for name, y in x.differentiable().items()}
    o, final_state = kda_cuda.chunk_kda(**x.replace(**leaves).public(), **options)
    loss = (o.float() * x.do.float()).sum() + (final_state * x.dfinal_state).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d{name}": d for name, d in zip(leaves, gradients, strict=True)}
    return {"o": o.detach(), "final_state": final_state.detach()} | named


@pytest.fixture
def unwarned(monkeypatch):
    """As in a new process: nothing has been announced yet."""
    monkeypatch.setattr(variants, "_warned", set())


@pytest.mark.devices("emulator", "cuda")
@pytest.mark.filterwarnings("ignore:kda_cuda::chunk_bwd runs the PyTorch reference")
@pytest.mark.parametrize("name", ["long_memory", "varlen", "violent", "v_first"])
def test_gradients_behind_a_forward_kernel(name, device):
    case = CASES[name]
    x = case.inputs(device)
    results, kernels = device.run(lambda: train(x))
    assert {"chunk_prepare", "chunk_fwd_scan"} <= set(kernels)
    inputs = case.inputs()
    truth, rounded = oracle.named(*oracle.gradients(inputs.double())), accuracy.low_precision_reference(inputs)
    assert set(truth) - {"h"} == set(results)
    for key, result in results.items():
        accuracy.budget(case, key, rounded[key], truth[key]).check(key, result, truth[key])


@pytest.mark.devices("emulator", "cuda")
def test_one_warning_names_the_missing_kernel(device, unwarned):
    x = CASES["one_chunk"].inputs(device)
    has_kernel = bwd_calls.has_kernel(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            train(x)
    told = [str(w.message) for w in caught if "kda_cuda" in str(w.message)]
    reason = (
        "kda_cuda::chunk_bwd runs the PyTorch reference instead of a kernel: its backward kernel is not compiled in"
    )
    assert told == ([] if has_kernel else [reason])
    leaves = x.replace(q=x.q.clone().requires_grad_())
    backward = kda_cuda.explain(**leaves.public()).backward
    assert backward.kernel == has_kernel and (has_kernel or backward.namespace == library.NAMESPACE_REFERENCE)


@pytest.mark.devices("emulator", "cuda")
def test_strictly_no_reference(device, unwarned, monkeypatch):
    if bwd_calls.has_kernel(device):
        return
    monkeypatch.setenv("KDA_CUDA_STRICT", "1")
    with pytest.raises(
        RuntimeError, match=r"^kda_cuda::chunk_bwd runs the PyTorch reference .* \(KDA_CUDA_STRICT=1\)$"
    ):
        train(CASES["one_chunk"].inputs(device))


@pytest.mark.filterwarnings("ignore:kda_cuda::chunk_bwd runs the PyTorch reference")
def test_what_is_kept_for_the_backward_is_the_inputs(device):
    """No workspace, no states, no copies: the saved tensors are the arguments themselves."""
    x = CASES["gva"].inputs(device)
    leaves = {name: y.clone().requires_grad_() for name, y in x.differentiable().items()}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: saved.append(y) or y, lambda y: y):
        o, _ = kda_cuda.chunk_kda(**x.replace(**leaves).public())
    assert o.requires_grad
    own = {y.data_ptr() for y in leaves.values()}
    assert {y.data_ptr() for y in saved if y.numel()} <= own
