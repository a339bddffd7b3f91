"""The gate by itself: values and gradients against float64, in every layout, dtype and form of its parameters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kda_cuda

from ..ops.test_ops import LAYOUTS, relaid

KERNELS = ["kda_gate_fwd", "kda_gate_bwd", "kda_gate_reduce"]
TINY = 1e-37  # what is smaller may be flushed
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half an ulp at 1
FORMS = {
    "softplus": {"A_log": True, "dt_bias": True, "lower_bound": None},
    "softplus without bias": {"A_log": True, "dt_bias": False, "lower_bound": None},
    "bounded": {"A_log": True, "dt_bias": True, "lower_bound": -5.0},
    "bounded without parameters": {"A_log": False, "dt_bias": False, "lower_bound": -0.5},
}
SHAPES = [(3, 40), (5, 2, 100), (2, 70, 3, 64), (2, 1, 3, 2, 300), (1, 5000, 1, 4)]  # 300: more than a block's threads


def inputs(form: str, shape: tuple[int, ...], device, dtype: torch.dtype) -> tuple[dict[str, Tensor], float | None]:
    """Every magnitude from 1e-3 to 1e3, both signs; the same numbers for every device and dtype."""
    make = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=make)

    values = {"g": (normal(*shape) * 10 ** (3 * normal(*shape).clamp(-1, 1))).to(dtype)}
    if FORMS[form]["A_log"]:
        values["A_log"] = 2 * normal(shape[-2])
    if FORMS[form]["dt_bias"]:
        values["dt_bias"] = 3 * normal(*shape[-2:])
    return {name: x.to(device).requires_grad_() for name, x in values.items()}, FORMS[form]["lower_bound"]


def definition(x: Tensor, A_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """docs/mathematics.md, section 1, in float64; the parameters broadcast over x."""
    x = x if dt_bias is None else x + dt_bias
    amplitude = torch.ones((), dtype=torch.float64) if A_log is None else A_log.exp()
    if lower_bound is None:
        return -amplitude * torch.logaddexp(x, torch.zeros_like(x))
    return lower_bound * F.logsigmoid(amplitude * x).exp()  # autograd of a sigmoid would cancel in 1 - sigmoid


class Truth:
    """Values, gradients, and how large their terms are: what an error has to be compared with."""

    def __init__(self, inputs: dict[str, Tensor], lower_bound: float | None, dy: Tensor):
        wide = {name: t.detach().cpu().double() for name, t in inputs.items()}
        x = wide["g"]
        if "A_log" in wide:
            wide["A_log"] = wide["A_log"][:, None]
        # a parameter of its own for every element: each token's and channel's term of the sums
        leaves = {name: t.expand(x.shape).clone().requires_grad_() for name, t in wide.items()}
        y = definition(leaves["g"], leaves.get("A_log"), leaves.get("dt_bias"), lower_bound)
        terms = torch.autograd.grad(y, list(leaves.values()), dy.cpu().double())
        self.y = y.detach()
        self.terms = dict(zip(leaves, terms, strict=True))
        # an error of the argument of an exponential, |amplitude x| eps, is a relative error of its result
        argument = x.abs() + wide.get("dt_bias", torch.zeros(())).abs()
        if lower_bound is not None and "A_log" in wide:
            argument = argument * wide["A_log"].exp()
        self.relative = 8 * EPS[torch.float32] * (2 + argument).clamp(max=200)

    def over_tokens(self, name: str, x: Tensor) -> Tensor:
        """The sum that the gradient of a parameter is; g has one gradient per element."""
        if name == "g":
            return x
        x = x.reshape(-1, *x.shape[-2:]).sum(0)
        return x.sum(-1) if name == "A_log" else x


def assert_close(name: str, result: Tensor, expected: Tensor, allowed: Tensor) -> None:
    """Element by element; ``allowed`` is absolute. Half-precision results may overflow where the truth does."""
    expected = expected.to(result.dtype).double()
    result = result.detach().cpu().double()
    finite = expected.isfinite()
    assert torch.equal(result[~finite], expected[~finite]), name
    excess = ((result - expected).abs() - allowed)[finite]
    assert (excess <= 0).all(), f"{name}: {excess.max().item():.2e} over what is allowed"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients(form, dtype, shape, device):
    x, lower_bound = inputs(form, shape, device, dtype)
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)

    def call() -> tuple[Tensor, ...]:
        y = kda_cuda.kda_gate(**x, lower_bound=lower_bound)
        return y, *torch.autograd.grad(y, list(x.values()), dy)

    (y, *gradients), kernels = device.run(call)
    assert kernels == (KERNELS if device.runs_kernels else [])
    assert y.dtype == torch.float32 and y.shape == shape
    truth = Truth(x, lower_bound, dy)
    assert_close("y", y, truth.y, truth.relative * truth.y.abs() + TINY)
    for name, d in zip(x, gradients, strict=True):
        assert d.dtype == x[name].dtype and d.shape == x[name].shape
        term = truth.terms[name]
        rounding = 2 * EPS[dtype] if name == "g" else 32 * EPS[torch.float32]
        smallest = 2.0**-24 if d.dtype == torch.float16 else TINY
        allowed = truth.over_tokens(name, (truth.relative + rounding) * term.abs()) + smallest
        assert_close(f"d{name}", d, truth.over_tokens(name, term), allowed)


def test_steep_values_stay_finite(device):
    """Where exponentials overflow the gate is linear, constant or zero."""
    g = torch.tensor([-3e38, -1e4, -100.0, -0.0, 0.0, 100.0, 1e4, 1e38]).to(device).reshape(8, 1, 1).requires_grad_()
    y = kda_cuda.kda_gate(g, torch.zeros(1).to(device))
    (dg,) = torch.autograd.grad(y.sum(), g)
    log2 = torch.tensor(2.0).log()
    expected = -torch.tensor([0, 0, 3.8e-44, log2, log2, 100, 1e4, 1e38])
    torch.testing.assert_close(y.cpu().flatten(), expected, rtol=1e-6, atol=1e-43)
    torch.testing.assert_close(dg.cpu().flatten(), -torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1]), rtol=1e-6, atol=1e-43)
    y = kda_cuda.kda_gate(g, torch.full((1,), 3.0).to(device), lower_bound=-5.0)
    (dg,) = torch.autograd.grad(y.sum(), g)
    torch.testing.assert_close(y.cpu().flatten(), -5 * torch.tensor([0, 0, 0, 0.5, 0.5, 1, 1, 1]))
    assert dg.isfinite().all()


# ---- layouts, shapes and dtypes of the arguments ---------------------------------------------------------------------


def results(g: Tensor, dy: Tensor, A_log: Tensor, dt_bias: Tensor, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (g, A_log, dt_bias)]
    y = kda_cuda.kda_gate(*leaves, **options)
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("whose", ["g", "dy"])
def test_layout_changes_no_bit(whose, layout, device):
    x, _ = inputs("softplus", (2, 70, 3, 20), device, torch.bfloat16)
    x = {name: t.detach() for name, t in x.items()} | {"dy": torch.randn(2, 70, 3, 20).to(device)}
    if layout == "expanded":
        x[whose] = x[whose][:1, :1].expand(2, 70, 3, 20)
        moved = x[whose]
    else:
        moved = relaid(x[whose])[layout]
    expected = results(**{**x, whose: x[whose].contiguous()})
    got, kernels = device.run(lambda: results(**{**x, whose: moved}))
    assert kernels == (KERNELS if device.runs_kernels else [])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("shape", [(2, 15, 3, 20), (30, 3, 20), (2, 3, 5, 3, 20), (30, 60), (2, 15, 60)], ids=str)
def test_shape_of_g_changes_no_bit(shape, device):
    """Leading dimensions are tokens, whatever they are called; heads may be flattened."""
    x, _ = inputs("softplus", (30, 3, 20), device, torch.float32)
    dy = torch.randn(30, 3, 20).to(device)
    expected = results(dy=dy, **x)
    head_dim, y_shape = (20, (*shape[:-1], 3, 20)) if shape[-1] == 60 else (None, shape)
    got = results(**{**x, "g": x["g"].reshape(shape)}, dy=dy.reshape(y_shape), head_dim=head_dim)
    assert got[0].shape == y_shape and got[1].shape == shape
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(got, expected, strict=True))


def test_head_of_a_strided_projection(device):
    """g is often a slice of a packed projection: its rows are apart, and no view makes them [rows, HV, K]."""
    packed = torch.randn(2, 3, 5, 100).to(device)
    g = packed[:, :, 1:4, 7:67]
    A_log, dt_bias = torch.randn(3).to(device), torch.randn(60).to(device)
    y = kda_cuda.kda_gate(g, A_log, dt_bias, head_dim=20)
    assert torch.equal(y, kda_cuda.kda_gate(g.contiguous(), A_log, dt_bias, head_dim=20))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("g_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtype_of_the_result_only_rounds(g_dtype, dtype, device):
    x, _ = inputs("bounded", (40, 3, 20), device, g_dtype)
    wide, rounded = (kda_cuda.kda_gate(**x, lower_bound=-5.0, dtype=d) for d in (torch.float32, dtype))
    assert rounded.dtype == dtype and torch.equal(rounded, wide.to(dtype))
    (dg,) = torch.autograd.grad(rounded, x["g"], torch.ones_like(rounded))
    assert dg.dtype == g_dtype and dg.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", [((3,), (60,)), ((1, 1, 3, 1), (3, 20)), ((3, 1), (1, 1, 3, 20))], ids=str)
def test_parameters_keep_their_shape_and_dtype(shapes, dtype, device):
    """A_log [1, 1, HV, 1] is that of the released checkpoint."""
    x, _ = inputs("softplus", (40, 3, 20), device, torch.float32)
    A_log, dt_bias = (
        x[name].detach().to(dtype).reshape(shape).requires_grad_()
        for name, shape in zip(("A_log", "dt_bias"), shapes, strict=True)
    )
    y = kda_cuda.kda_gate(x["g"], A_log, dt_bias)
    gradients = torch.autograd.grad(y.sum(), [A_log, dt_bias])
    assert [(d.shape, d.dtype) for d in gradients] == [(A_log.shape, dtype), (dt_bias.shape, dtype)]
    wide = [t.detach().float().requires_grad_() for t in (A_log, dt_bias)]
    expected = torch.autograd.grad(kda_cuda.kda_gate(x["g"], *wide).sum(), wide)
    for d, wanted in zip(gradients, expected, strict=True):
        assert torch.equal(d, wanted.to(dtype))


@pytest.mark.parametrize("shape", [(0, 3, 20), (2, 0, 3, 20)], ids=str)
def test_no_tokens(shape, device):
    x, _ = inputs("softplus", (1, 3, 20), device, torch.float32)
    g = torch.zeros(shape).to(device).requires_grad_()
    y = kda_cuda.kda_gate(g, x["A_log"], x["dt_bias"])
    dg, dA_log, ddt_bias = torch.autograd.grad(y.sum(), [g, x["A_log"], x["dt_bias"]])
    assert y.shape == dg.shape == shape and not dA_log.any() and not ddt_bias.any()


def test_gradients_of_parameters_never_vary(device):
    """Sums over tokens are added in one order: no atomics."""
    x, _ = inputs("softplus", (3000, 2, 64), device, torch.bfloat16)
    dy = torch.randn(3000, 2, 64).to(device)
    runs = [results(dy=dy, **x) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_only_what_is_wanted_is_given(device):
    """An argument without requires_grad gets no gradient, and without any there is no graph."""
    x, _ = inputs("softplus", (5, 3, 20), device, torch.float32)
    y = kda_cuda.kda_gate(x["g"].detach(), x["A_log"], x["dt_bias"].detach())
    y.sum().backward()
    assert x["A_log"].grad is not None and x["dt_bias"].grad is None and x["g"].grad is None
    assert not kda_cuda.kda_gate(*(t.detach() for t in x.values())).requires_grad


@pytest.mark.devices("emulator", "cuda")
def test_float64_has_no_kernel(device):
    """Refused by name, not silently narrowed."""
    with pytest.raises((ValueError, TypeError), match=r"^kda_cuda::kda_gate(_fwd)?: dtype "):
        kda_cuda.kda_gate(torch.zeros(2, 1, 4).to(device), torch.zeros(1).to(device), dtype=torch.float64)
