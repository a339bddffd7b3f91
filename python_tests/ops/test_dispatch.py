"""Which implementation serves a call: kernels where there are some, else the reference, said aloud; and explain()."""

from __future__ import annotations

import warnings

import pytest
import torch

import kda_cuda
from kda_cuda import library, variants

from ..support.devices import forget_recipes
from .test_ops import ALL_TRANSFORMS, gate, streams

WITHOUT = "runs the PyTorch reference instead of a kernel: "


@pytest.fixture
def not_warned(monkeypatch):
    """As in a new process, whatever the variable was."""
    monkeypatch.setattr(variants, "_warned", set())
    monkeypatch.delenv("KDA_CUDA_STRICT", raising=False)


def without_kernel(monkeypatch, device, *ops: str) -> None:
    """As if the loaded library did not implement ``ops``."""
    namespace = library.NAMESPACE_EMULATED if device.name == "emulator" else library.NAMESPACE
    forget_recipes()
    left = {**variants._kernels, namespace: variants.kernels(namespace) - set(ops)}
    monkeypatch.setattr(variants, "_kernels", left)


def training_step(device, steps: int = 1) -> list[torch.Tensor]:
    x = {name: t.requires_grad_() for name, t in (streams(device, tokens=20) | gate(device)).items()}
    for _ in range(steps):
        gradients = torch.autograd.grad(kda_cuda.chunk_kda(**x, **ALL_TRANSFORMS)[0].sum(), list(x.values()))
    return list(gradients)


@pytest.mark.devices("emulator", "cuda")
def test_a_missing_backward_is_named_once(device, monkeypatch, not_warned):
    without_kernel(monkeypatch, device, "chunk_bwd", "kda_gate_bwd")
    with pytest.warns(UserWarning) as caught:
        training_step(device, steps=3)
        g = torch.zeros(2, 1, 4, device=device, requires_grad=True)
        kda_cuda.kda_gate(g, torch.zeros(1, device=device)).sum().backward()
    assert [str(w.message) for w in caught if "kda_cuda" in str(w.message)] == [
        f"kda_cuda::{op} {WITHOUT}its backward kernel is not compiled in" for op in ("chunk_bwd", "kda_gate_bwd")
    ]


@pytest.mark.devices("emulator", "cuda")
def test_strict_makes_a_missing_backward_an_error(device, monkeypatch, not_warned):
    without_kernel(monkeypatch, device, "chunk_bwd")
    monkeypatch.setenv("KDA_CUDA_STRICT", "1")
    with pytest.raises(RuntimeError) as refused:
        training_step(device)
    assert str(refused.value) == (
        f"kda_cuda::chunk_bwd {WITHOUT}its backward kernel is not compiled in (KDA_CUDA_STRICT=1)"
    )


@pytest.mark.devices("cuda")
def test_a_missing_forward_runs_the_reference_on_the_gpu(device, monkeypatch, not_warned):
    expected = training_step("cpu")
    without_kernel(monkeypatch, device, "chunk_fwd", "chunk_bwd")
    with pytest.warns(UserWarning, match=f"^kda_cuda::chunk_fwd {WITHOUT}no kernel of it is compiled in$"):
        results, kernels = device.run(lambda: training_step(device))
    assert kernels == []
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("KDA_CUDA_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"kda_cuda::chunk_fwd .*\(KDA_CUDA_STRICT=1\)$"):
        training_step(device)


def test_cuda_tensors_without_a_library_are_told_how_to_get_one(monkeypatch):
    class OnCuda:  # what choose() looks at
        device, dtype, is_cuda = torch.device("cuda"), torch.float32, True

    monkeypatch.setattr(variants, "_kernels", {library.NAMESPACE: frozenset(), library.NAMESPACE_EMULATED: frozenset()})
    monkeypatch.setattr(variants, "_WITHOUT_OPS", "this is a reference-only install (...)")
    assert variants.choose("chunk_fwd", OnCuda) == (
        library.NAMESPACE_REFERENCE, "this is a reference-only install (...)"
    )  # fmt: skip


@pytest.mark.devices("cpu", "emulator", "cuda")
def test_nothing_is_said_where_nothing_is_missing(device, monkeypatch, not_warned):
    """On the CPU the reference is what users run: STRICT does not forbid it."""
    monkeypatch.setenv("KDA_CUDA_STRICT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kda_cuda.chunk_kda(**streams(device), use_qk_l2norm_in_kernel=True)
        if device.name == "cpu":
            training_step(device)


# ---- explain ---------------------------------------------------------------------------------------------------------


def explained(device, **changes):
    return kda_cuda.explain(**streams(device), **gate(device), **ALL_TRANSFORMS, **changes)


def test_explain_names_what_serves_the_call(device):
    forward = explained(device).forward
    assert forward.op == "chunk_fwd" and forward.kernel == device.runs_kernels
    namespaces = {"cpu": "kda_cuda", "emulator": "kda_cuda_emulated", "cuda": "kda_cuda"}
    assert forward.namespace == namespaces[device.name]
    assert bool(forward.plan) == device.runs_kernels
    assert explained(device).backward is None


def test_explain_runs_nothing(device):
    x = {name: t.requires_grad_() for name, t in streams(device).items()}
    _, kernels = device.run(lambda: kda_cuda.explain(**x))
    assert kernels == []
    with torch.no_grad():
        assert kda_cuda.explain(**x).backward is None


@pytest.mark.devices("emulator", "cuda")
def test_explain_names_a_missing_backward(device, monkeypatch, not_warned):
    without_kernel(monkeypatch, device, "chunk_bwd")
    x = {name: t.requires_grad_() for name, t in streams(device).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward = kda_cuda.explain(**x).backward
    assert (backward.op, backward.namespace, backward.kernel, backward.reason) == (
        "chunk_bwd", "kda_cuda_reference", False, "its backward kernel is not compiled in",
    )  # fmt: skip


def test_explain_of_the_other_functions(device):
    g, A_log = torch.zeros(2, 1, 4, device=device, requires_grad=True), torch.zeros(1, device=device)
    of_gate = kda_cuda.explain(g, A_log, op="kda_gate")
    assert of_gate.forward.op == "kda_gate_fwd" and of_gate.backward.op == "kda_gate_bwd"
    assert of_gate.forward.kernel == of_gate.backward.kernel == device.runs_kernels
    one = kda_cuda.explain(**streams(device, tokens=1), op="fused_recurrent_kda")
    assert one.function == "fused_recurrent_kda" and one.forward.kernel == device.runs_kernels


def test_explain_checks_as_the_function_does():
    with pytest.raises(ValueError, match=r"^kda_cuda::chunk_kda: k has shape \[1, 2, 3\], expected 4 dimensions"):
        kda_cuda.explain(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3), *[torch.zeros(1, 2, 3, 4)] * 3)
    with pytest.raises(ValueError, match=r"^kda_cuda::explain: op is 'attend', expected one of \['chunk_kda', "):
        kda_cuda.explain(op="attend")
    x = streams()
    kda_cuda.explain(**x)
    assert kda_cuda.chunk_kda(**x)[0].shape == x["v"].shape  # planning is over
