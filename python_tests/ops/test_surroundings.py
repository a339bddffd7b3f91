"""short_conv and gated_rmsnorm as torch and users meet them: who serves a call, compiled, and what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import kda_cuda

from .test_dispatch import WITHOUT, not_warned, without_kernel  # noqa: F401

Leaves = dict[str, Tensor]


def conv_leaves(device, dtype: torch.dtype = torch.float32) -> Leaves:
    make = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 6, 8), "weight": (8, 4), "bias": (8,), "initial_state": (2, 8, 3)}
    return {n: torch.randn(s, generator=make).to(device, dtype).requires_grad_() for n, s in shapes.items()}


def norm_leaves(device, dtype: torch.dtype = torch.float32) -> Leaves:
    make = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 16), "gate": (2, 3, 16), "weight": (16,)}
    return {n: torch.randn(s, generator=make).to(device, dtype).requires_grad_() for n, s in shapes.items()}


def conv(**leaves: Tensor) -> tuple[Tensor, Tensor]:
    return kda_cuda.short_conv(**leaves, output_final_state=True)


def norm(**leaves: Tensor) -> tuple[Tensor]:
    return (kda_cuda.gated_rmsnorm(**leaves, activation="silu"),)


FUNCTIONS = {"short_conv": (conv, conv_leaves), "gated_rmsnorm": (norm, norm_leaves)}


@pytest.fixture(params=FUNCTIONS)
def name(request) -> str:
    return request.param


def step(function: Callable, leaves: Leaves) -> list[Tensor]:
    outputs = function(**leaves)
    return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), list(leaves.values()))]


def test_explain_names_what_serves_the_call(name, device):
    _, leaves = FUNCTIONS[name]
    told, kernels = device.run(lambda: kda_cuda.explain(op=name, **leaves(device)))
    assert kernels == []
    assert (told.forward.op, told.backward.op) == (f"{name}_fwd", f"{name}_bwd")
    assert told.forward.kernel == told.backward.kernel == device.runs_kernels
    with torch.no_grad():
        assert kda_cuda.explain(op=name, **leaves(device)).backward is None
        assert kda_cuda.explain(op=name, backward=True, **leaves(device)).backward.op == f"{name}_bwd"


@pytest.mark.devices("emulator", "cuda")
def test_a_missing_backward_is_named_or_refused(name, device, monkeypatch, not_warned):  # noqa: F811
    function, leaves = FUNCTIONS[name]
    expected = step(function, leaves(device))
    without_kernel(monkeypatch, device, f"{name}_bwd")
    text = f"kda_cuda::{name}_bwd {WITHOUT}its backward kernel is not compiled in"
    with pytest.warns(UserWarning) as caught:
        results = step(function, leaves(device))
    assert [str(w.message) for w in caught if "kda_cuda" in str(w.message)] == [text]
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("KDA_CUDA_STRICT", "1")
    with pytest.raises(RuntimeError) as refused:
        step(function, leaves(device))
    assert str(refused.value) == f"{text} (KDA_CUDA_STRICT=1)"


@pytest.mark.devices("cuda")
def test_a_missing_forward_runs_the_reference_on_the_gpu(name, device, monkeypatch, not_warned):  # noqa: F811
    function, leaves = FUNCTIONS[name]
    without_kernel(monkeypatch, device, f"{name}_fwd", f"{name}_bwd")
    with pytest.warns(UserWarning, match=f"^kda_cuda::{name}_fwd {WITHOUT}no kernel of it is compiled in$"):
        results, kernels = device.run(lambda: step(function, leaves(device)))
    assert kernels == []
    for a, b in zip(results, step(function, leaves("cpu")), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("KDA_CUDA_STRICT", "1")
    with pytest.raises(RuntimeError, match=rf"^kda_cuda::{name}_fwd .*\(KDA_CUDA_STRICT=1\)$"):
        step(function, leaves(device))


def test_nothing_is_said_where_nothing_is_missing(name, device, monkeypatch, not_warned):  # noqa: F811
    function, leaves = FUNCTIONS[name]
    monkeypatch.setenv("KDA_CUDA_STRICT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(function, leaves(device))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(name, dynamic, device):
    """No graph break, the same results."""
    torch.compiler.reset()
    function, leaves = FUNCTIONS[name]
    compiled = torch.compile(lambda x: function(**x), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected, results = step(function, leaves(device)), step(lambda **x: compiled(x), leaves(device))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_second_derivatives_are_refused(name):
    function, leaves = FUNCTIONS[name]
    x = leaves("cpu")
    (dx,) = torch.autograd.grad(sum(y.sum() for y in function(**x)), x["x"], create_graph=True)
    assert dx.abs().sum() > 0 and dx.requires_grad
    with pytest.raises(RuntimeError, match=f"{name}_bwd.*has no derivative: second derivatives of kda_cuda's ops are"):
        dx.sum().backward()


def test_forward_mode_is_refused(name):
    function, leaves = FUNCTIONS[name]
    x = {n: t.detach() for n, t in leaves("cpu").items()}
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"^kda_cuda::{name}: an argument has a tan"):
        function(**{**x, "x": forward_ad.make_dual(x["x"], x["x"])})
    with pytest.raises(NotImplementedError, match=f"^kda_cuda::{name}: an argument is differentiated by torch.func"):
        torch.func.grad(lambda w: function(**{**x, "weight": w})[0].sum())(x["weight"])


def test_autocast_changes_no_dtype(name, device):
    """Results have the dtype of x, whatever autocast asks for; sums are in fp32 anyway."""
    function, leaves = FUNCTIONS[name]
    expected = step(function, leaves(device))
    with torch.autocast(device, torch.bfloat16):
        results = step(function, leaves(device))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_inputs_are_untouched_and_outputs_are_new(name, device):
    function, leaves = FUNCTIONS[name]
    x = leaves(device)
    before = {n: t.detach().clone() for n, t in x.items()}
    outputs = step(function, x)
    owners = {t.untyped_storage().data_ptr() for t in x.values()}
    memory = [o.untyped_storage().data_ptr() for o in outputs]
    assert owners.isdisjoint(memory) and len(set(memory)) == len(memory)
    assert all(torch.equal(x[n], t) for n, t in before.items())


@pytest.mark.devices("cuda")
def test_captured_in_a_graph(name, device):
    """Nothing is read on the host: a replay sees other contents."""
    function, leaves = FUNCTIONS[name]
    x = {n: t.detach() for n, t in leaves(device, torch.bfloat16).items()}
    function(**x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(**x)
    x["x"].mul_(-3)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(outputs, function(**x), strict=True))


@pytest.mark.devices("cuda")
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (norm, {"x": (1, 8192, 32, 128), "gate": (1, 8192, 32, 128), "weight": (128,)}),
        (conv, {"x": (2, 8192, 4096), "weight": (4096, 4), "bias": (4096,), "initial_state": (2, 4096, 3)}),
        (conv, {"x": (1, 30001, 96), "weight": (96, 4), "bias": (96,), "initial_state": (1, 96, 3)}),
    ],
)
def test_sizes_of_a_model(function, shapes, device, monkeypatch):
    """The shapes that the kernels are made for, beside the reference in fp32 on the same device."""
    make = torch.Generator(device).manual_seed(0)
    wide = {n: torch.randn(s, generator=make, device=device).bfloat16().float() for n, s in shapes.items()}
    results = step(function, {n: t.bfloat16().requires_grad_() for n, t in wide.items()})
    without_kernel(monkeypatch, device, *(f"{n}_{d}" for n in FUNCTIONS for d in ("fwd", "bwd")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = step(function, {n: t.requires_grad_() for n, t in wide.items()})
    for a, b in zip(results, expected, strict=True):
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()
