"""The gated norm: values and gradients against float64, in every layout, dtype, magnitude and length of a row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import kda_cuda

from ..ops.test_ops import LAYOUTS, relaid

TINY = 1e-37  # what is smaller may be flushed
EPS = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half an ulp at 1
SMALLEST = {torch.float32: TINY, torch.float16: 2.0**-24, torch.bfloat16: TINY}
# Rows of 8, 16 and 32 lanes; rows that end inside of them; runs of many rows; and rows that are read by loops, since
# they are long (300) or no whole pieces (20 in 16 bits, 1).
SHAPES = [(2, 5, 3, 128), (9, 64), (40, 2, 40), (3, 2, 256), (70, 20), (3, 300), (128,), (5, 1)]


def kernels_of(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool = True) -> list[str]:
    wide = "" if aligned and shape[-1] <= 256 and shape[-1] * dtype.itemsize % 16 == 0 else "_wide"
    return [f"gated_rmsnorm_fwd{wide}", f"gated_rmsnorm_bwd{wide}", "gated_rmsnorm_reduce"]


def inputs(shape: tuple[int, ...], device, dtype: torch.dtype, scale: float = 1.0) -> dict[str, Tensor]:
    """The same numbers for every device and dtype; gates far into both tails."""
    make = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=make)

    x, gate, weight = scale * normal(*shape), 6 * normal(*shape), 1 + normal(shape[-1])
    return {"x": x.to(device, dtype), "gate": gate.to(device, dtype), "weight": weight.to(device)}


def definition(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: str) -> Tensor:
    normalised = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
    opened = torch.sigmoid(gate)
    return normalised * weight * (gate * opened if activation == "silu" else opened)


def leaves_of(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().requires_grad_() for name, t in x.items()}


class Truth:
    """Values and gradients in float64, and what the roundings of fp32 may add to each of them."""

    def __init__(self, given: dict[str, Tensor], dy: Tensor, eps: float, activation: str):
        wide = leaves_of({name: t.detach().cpu().double() for name, t in given.items()})
        x, gate, weight, dy = *wide.values(), dy.cpu().double()
        y = definition(**wide, eps=eps, activation=activation)
        self.values = dict(
            zip(("y", "x", "gate", "weight"), (y, *torch.autograd.grad(y, list(wide.values()), dy)), strict=True)
        )
        self.values = {name: t.detach() for name, t in self.values.items()}
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        n, opened, other = (x * rstd).abs(), torch.sigmoid(gate), torch.sigmoid(-gate)
        f = (gate * opened).abs() if activation == "silu" else opened
        slope = opened * (1 + gate.abs() * other) if activation == "silu" else opened * other
        relative = 16 * EPS[torch.float32] * (2 + gate.abs())  # an exponential's argument is rounded: |gate| eps
        dn = (dy * weight).abs() * f
        through_row = dn * relative + n * (dn * n * relative).mean(-1, keepdim=True)
        terms = (dy.abs() * n * f * relative).flatten(0, -2).sum(0) if x.dim() > 1 else dy.abs() * n * f * relative
        self.allowed = {
            "y": self.values["y"].abs() * relative,
            "x": through_row * rstd,
            "gate": (dy * n * weight).abs() * slope * relative,
            "weight": terms,
        }
        self.allowed = {name: t.detach() for name, t in self.allowed.items()}

    def check(self, name: str, result: Tensor) -> None:
        expected = self.values[name]
        assert result.shape == expected.shape
        rounding = (1 + 2.0**-6) * EPS[result.dtype] * expected.abs() + SMALLEST[result.dtype]
        excess = (result.detach().cpu().double() - expected).abs() - self.allowed[name] - rounding
        assert (excess <= 0).all(), f"{name}: {excess.max().item():.2e} over what is allowed"


def checked(given: dict[str, Tensor], device, eps: float = 1e-5, activation: str = "sigmoid") -> list[str]:
    """Compares a call and its gradients with the truth; returns the kernels that ran."""
    x = leaves_of(given)
    dy = torch.randn(x["x"].shape, generator=torch.Generator().manual_seed(1)).to(device, x["x"].dtype)

    def call() -> list[Tensor]:
        y = kda_cuda.gated_rmsnorm(**x, eps=eps, activation=activation)
        return [y, *torch.autograd.grad(y, list(x.values()), dy)]

    results, kernels = device.run(call)
    truth = Truth(given, dy, eps, activation)
    for name, result in zip(("y", *x), results, strict=True):
        assert result.dtype == (x["x"] if name == "y" else x[name]).dtype
        truth.check(name, result)
    return kernels


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
def test_values_and_gradients(activation, dtype, shape, device):
    kernels = checked(inputs(shape, device, dtype), device, activation=activation)
    assert kernels == (kernels_of(shape, dtype) if device.runs_kernels else [])


@pytest.mark.parametrize(
    ("scale", "eps"),
    [(1e-30, 1e-5), (1e-30, 1e-36), (1e-12, 1e-5), (1e12, 1e-5), (1e30, 1e-5), (3e37, 1e-5), (1e-3, 1e3)],
)
@pytest.mark.parametrize("shape", [(5, 128), (3, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_magnitudes(dtype, shape, scale, eps, device):
    """Squares leave the range of fp32, results do not."""
    checked(inputs(shape, device, dtype, scale), device, eps=eps)


@pytest.mark.parametrize("dim", [64, 300])
def test_a_row_is_alone(dim, device):
    """Of kernels, the bits do not depend on neighbours, nor on their magnitude. Zeros stay zeros."""
    x = inputs((6, dim), device, torch.float32) | {"dy": torch.randn(6, dim).to(device)}
    x["x"][1] *= 1e30
    x["x"][2] = 0
    together = results(**x)
    assert together[0].isfinite().all() and not together[0][2].any()
    for i in range(6):
        alone = results(**{name: t if name == "weight" else t[i : i + 1] for name, t in x.items()})
        for a, b in zip(together[:3], alone[:3], strict=True):
            # Kernels sum a row in one order; torch's sums of the reference may differ with the number of rows.
            torch.testing.assert_close(a[i : i + 1], b, rtol=0 if device.runs_kernels else 1e-5, atol=0)


# ---- layouts, shapes and dtypes of the arguments ---------------------------------------------------------------------


def results(x: Tensor, gate: Tensor, weight: Tensor, dy: Tensor | None = None, **options) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in (x, gate, weight)]
    y = kda_cuda.gated_rmsnorm(*leaves, **options)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape) if dy is None else dy
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded", "slice of a projection"])
@pytest.mark.parametrize("whose", ["x", "gate", "dy"])
def test_layout_changes_no_value(whose, layout, device):
    """Bits are equal where the same kernel serves it; another one may add a row up in another order."""
    x = inputs((2, 7, 3, 64), device, torch.bfloat16) | {"dy": torch.randn(2, 7, 3, 64).to(device, torch.bfloat16)}
    if layout == "expanded":
        x[whose] = x[whose][:1, :1].expand(2, 7, 3, 64)
        moved = x[whose]
    elif layout == "slice of a projection":
        moved = torch.cat([x[whose].flatten(2), x[whose].flatten(2)[..., :64]], 2)[..., :192].unflatten(2, (3, 64))
    else:
        moved = relaid(x[whose])[layout]
    expected = results(**{**x, whose: x[whose].contiguous()})
    got, kernels = device.run(lambda: results(**{**x, whose: moved}))
    wide = any("wide" in kernel for kernel in kernels)
    assert wide == (device.runs_kernels and layout in ("padded rows", "unaligned"))
    for a, b in zip(got, expected, strict=True):  # the wide kernel adds a row in another order: a last bit of bf16
        assert torch.equal(a, b) or (wide and torch.allclose(a, b, rtol=2.0**-7, atol=1e-5))


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_dtype_and_layout_of_the_weight(dtype, device):
    x = inputs((5, 64), device, dtype)
    rounded = x["weight"].to(dtype)
    wide, narrow = results(**{**x, "weight": rounded.float()}), results(**{**x, "weight": rounded})
    assert narrow[3].dtype == dtype and torch.equal(narrow[3], wide[3].to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(wide[:3], narrow[:3], strict=True))
    strided = torch.stack([rounded, rounded + 1], 1)[:, 0]
    assert all(torch.equal(a, b) for a, b in zip(results(**{**x, "weight": strided}), narrow, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 64), (2, 0, 3, 20)], ids=str)
def test_no_rows(shape, device):
    x = leaves_of(inputs((1, shape[-1]), device, torch.float32))
    x["x"], x["gate"] = (torch.zeros(shape, device=device, requires_grad=True) for _ in range(2))
    y = kda_cuda.gated_rmsnorm(**x)
    dx, dgate, dweight = torch.autograd.grad(y.sum(), list(x.values()))
    assert y.shape == dx.shape == dgate.shape == shape and not dweight.any()


@pytest.mark.parametrize("dim", [64, 300])
def test_no_nan_comes_from_rows_that_nobody_asks_for(dim, device):
    """Padding may hold anything: without a gradient of y it has none, and the weight's is as without it."""
    x = inputs((6, dim), device, torch.bfloat16)
    dy = torch.randn(6, dim).to(device, torch.bfloat16)
    dy[4:] = 0
    clean = results(**x, dy=dy)
    x["x"][4], x["gate"][4:] = torch.nan, torch.inf
    dirty = results(**x, dy=dy)
    assert all(torch.equal(a[:4], b[:4]) for a, b in zip(dirty[:3], clean[:3], strict=True))
    assert not dirty[1][4:].any() and not dirty[2][4:].any() and torch.equal(dirty[3], clean[3])


@pytest.mark.parametrize("dim", [16, 20])
def test_gradients_of_the_weight_never_vary(dim, device):
    """Sums over rows are added in one order: no atomics."""
    x = inputs((3000, dim), device, torch.bfloat16)
    runs = [results(**x) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_only_what_is_wanted_is_given(device):
    x = leaves_of(inputs((5, 64), device, torch.float32))
    kda_cuda.gated_rmsnorm(x["x"].detach(), x["gate"], x["weight"].detach()).sum().backward()
    assert x["gate"].grad is not None and x["weight"].grad is None and x["x"].grad is None
    assert not kda_cuda.gated_rmsnorm(*(t.detach() for t in x.values())).requires_grad


@pytest.mark.parametrize("activation", ["sigmoid", "silu"])
@pytest.mark.parametrize("shape", [(3, 2, 5), (4,)], ids=str)
def test_gradcheck(shape, activation):
    x = leaves_of({name: t.double() for name, t in inputs(shape, "cpu", torch.float32).items()})
    assert torch.autograd.gradcheck(lambda *a: kda_cuda.gated_rmsnorm(*a, activation=activation), list(x.values()))
