"""The short convolution: values, states and gradients against float64, in every layout, dtype and cut of its tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kda_cuda

from ..gated_rmsnorm.test_gated_rmsnorm import EPS, SMALLEST, leaves_of
from ..ops.test_ops import LAYOUTS, relaid

KERNELS = ["short_conv_fwd", "short_conv_bwd", "short_conv_reduce"]
# (batch, tokens, channels, taps): one token, fewer than taps, several runs of a row, several blocks of channels; single
# channels where no pieces of 16 bytes fit.
SIZES = [
    (2, 1, 40, 4),
    (1, 2, 8, 4),
    (2, 21, 136, 4),
    (1, 45, 24, 3),
    (2, 19, 16, 2),
    (1, 30, 40, 8),
    (1, 18, 8, 5),
    (1, 26, 37, 4),
    (2, 9, 3, 7),
    (1, 12, 1, 2),
]
LENGTHS = [(0, 1, 2, 3, 5, 17, 0, 40), (37,), (8, 8, 8), (0, 0)]


def inputs(
    sizes: tuple[int, int, int, int], device, dtype: torch.dtype, sequences: int | None = None, scale: float = 1.0
) -> dict[str, Tensor]:
    """Everything that has a gradient; the same numbers for every device and dtype."""
    batch, tokens, channels, taps = sizes
    make = torch.Generator().manual_seed(sum(sizes))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=make)

    x, weight, bias = scale * normal(batch, tokens, channels), normal(channels, taps), normal(channels)
    state = scale * normal(batch if sequences is None else sequences, channels, taps - 1)
    given = {"x": x.to(dtype), "weight": weight, "bias": bias, "initial_state": state.to(dtype)}
    return {name: t.to(device) for name, t in given.items()}


def definition(x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor, bounds: list[int] | None, silu: bool):
    """Token by token, from the equation: the outputs, the final state, and the sums before the activation."""
    taps, sums, finals = weight.shape[1], torch.zeros_like(x), []
    rows = range(x.shape[0]) if bounds is None else range(len(bounds) - 1)
    ys = 0 * x  # of the graph, also without tokens
    for n in rows:
        row, begin, end = (n, 0, x.shape[1]) if bounds is None else (0, bounds[n], bounds[n + 1])
        seen = torch.cat([initial_state[n].T, x[row, begin:end]])
        for t in range(end - begin):
            sums[row, begin + t] = bias + (weight.T * seen[t : t + taps]).sum(0)
        finals.append(seen[end - begin :].T)
        ys[row, begin:end] = F.silu(sums[row, begin:end].clone()) if silu else sums[row, begin:end]
    return ys, torch.stack(finals), sums


class Truth:
    """Values and gradients in float64, and what the roundings of fp32 may add: sums of the sizes of their terms."""

    def __init__(self, given: dict[str, Tensor], dy: Tensor, dfinal: Tensor, bounds: list[int] | None, silu: bool):
        wide = {name: t.detach().cpu().double() for name, t in given.items()}
        dy, dfinal = dy.cpu().double(), dfinal.cpu().double()
        leaves = leaves_of(wide)
        y, final, sums = definition(**leaves, bounds=bounds, silu=silu)

        def pulled_back(outputs: tuple[Tensor, Tensor], of: dict[str, Tensor], *d: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, list(of.values()), d, materialize_grads=True)

        gradients = pulled_back((y, final), leaves, dy, dfinal)
        names = ("y", "final_state", *leaves)
        self.values = {n: t.detach() for n, t in zip(names, (y, final, *gradients), strict=True)}
        # the same with sizes: |sums| of sizes times the slope, and the sizes of dz through both linear maps
        sizes = leaves_of({name: t.abs() for name, t in wide.items()})
        size_of_sums = definition(**sizes, bounds=bounds, silu=False)[0]
        z = sums.detach()
        relative = 16 * EPS[torch.float32] * (2 + z.abs()).clamp(max=200) if silu else 16 * EPS[torch.float32]
        moved = 16 * EPS[torch.float32] * size_of_sums.detach()
        opened, other = torch.sigmoid(z), torch.sigmoid(-z)
        slope = opened * (1 + z.abs() * other) if silu else torch.ones_like(z)
        bend = opened * other * (2 + z.abs()) if silu else torch.zeros_like(z)  # bounds the second derivative
        dz_error = dy.abs() * (slope * relative + bend * moved)
        dz_error = dz_error + 16 * EPS[torch.float32] * dy.abs() * slope
        linear = definition(**sizes, bounds=bounds, silu=False)[:2]
        terms = pulled_back(linear, sizes, dz_error, EPS[torch.float32] * dfinal.abs())
        self.allowed = {"y": self.values["y"].abs() * relative + slope * moved, "final_state": torch.zeros_like(final)}
        self.allowed |= dict(zip(leaves, terms, strict=True))
        self.allowed = {name: t.detach() for name, t in self.allowed.items()}

    def check(self, name: str, result: Tensor) -> None:
        expected = self.values[name]
        assert result.shape == expected.shape
        rounding = (1 + 2.0**-6) * EPS[result.dtype] * expected.abs() + SMALLEST[result.dtype]
        if name == "final_state":
            rounding = torch.zeros(())  # inputs are copied
        excess = (result.detach().cpu().double() - expected).abs() - self.allowed[name] - rounding
        assert (excess <= 0).all(), f"{name}: {excess.max().item():.2e} over what is allowed"


def checked(given: dict[str, Tensor], device, lengths: tuple[int, ...] | None = None, silu: bool = True) -> list[str]:
    """Compares a call, its final state and all gradients with the truth; returns the kernels that ran."""
    x = leaves_of(given)
    make = torch.Generator().manual_seed(1)
    dy = torch.randn(x["x"].shape, generator=make).to(device, x["x"].dtype)
    dfinal = torch.randn(x["initial_state"].shape, generator=make).to(device, x["initial_state"].dtype)
    bounds = None if lengths is None else [0, *itertools.accumulate(lengths)]
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device=device)

    def call() -> list[Tensor]:
        y, final = kda_cuda.short_conv(
            **x, cu_seqlens=cu_seqlens, activation="silu" if silu else None, output_final_state=True
        )
        return [y, final, *torch.autograd.grad([y, final], list(x.values()), [dy, dfinal])]

    results, kernels = device.run(call)
    truth = Truth(given, dy, dfinal, bounds, silu)
    for name, result in zip(("y", "final_state", *x), results, strict=True):
        assert result.dtype == x[{"y": "x", "final_state": "initial_state"}.get(name, name)].dtype
        truth.check(name, result)
    return kernels


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_values_and_gradients(dtype, sizes, device):
    kernels = checked(inputs(sizes, device, dtype), device)
    assert kernels == (KERNELS if device.runs_kernels else [])


@pytest.mark.parametrize("taps", range(2, 9))
@pytest.mark.parametrize("channels", [8, 5])
def test_every_number_of_taps(channels, taps, device):
    checked(inputs((1, 2 * taps, channels, taps), device, torch.float32), device, silu=taps % 2 == 0)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("channels", "taps"), [(40, 4), (9, 4), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences(dtype, channels, taps, lengths, device):
    """Empty ones, those shorter than the taps, and tokens that nobody has."""
    sizes = (1, sum(lengths) + 11, channels, taps)
    checked(inputs(sizes, device, dtype, sequences=len(lengths)), device, lengths)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_magnitudes(dtype, scale, device):
    checked(inputs((1, 13, 8, 4), device, dtype, scale=scale), device)


def test_infinite_inputs_reach_no_further_than_the_taps(device):
    """Also where a kernel for four taps serves two."""
    for channels in (8, 3):
        x = torch.ones(1, 6, channels, device=device)
        x[0, 1] = torch.inf
        y, _ = kda_cuda.short_conv(x, torch.ones(channels, 2, device=device), activation=None)
        assert y[0, :, 0].tolist() == [1, torch.inf, torch.inf, 2, 2, 2]


# ---- sequences, one after another and in pieces ----------------------------------------------------------------------


def plain(x: Tensor | list[Tensor], weight: Tensor, bias: Tensor, initial_state: Tensor, **options) -> tuple:
    return kda_cuda.short_conv(x, weight, bias, initial_state=initial_state, output_final_state=True, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pieces", [(1,) * 9, (2, 5, 2), (0, 8, 1)], ids=str)
def test_pieces_and_single_steps(pieces, dtype, device):
    """A state takes up where the last piece ended, with the same bits."""
    x = inputs((2, 9, 16, 4), device, dtype)
    y, final = plain(**x)
    state, got = x["initial_state"], []
    for piece in x["x"].split(list(pieces), dim=1):
        part, state = plain(**{**x, "x": piece, "initial_state": state})
        got.append(part)
    same = torch.equal if device.runs_kernels else torch.allclose
    assert same(torch.cat(got, 1), y) and torch.equal(state, final)


def test_a_packed_sequence_is_alone(device):
    """Whatever surrounds it, also after the last one; its bits are those that it gets by itself."""
    lengths = (5, 0, 12, 2)
    x = inputs((1, 30, 16, 4), device, torch.bfloat16, sequences=4)
    bounds = [0, *itertools.accumulate(lengths)]
    x["x"][0, bounds[-1] :] = torch.nan
    y, final = plain(**x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device))
    assert not y[0, bounds[-1] :].any()
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        alone = {**x, "x": x["x"][:, begin:end], "initial_state": x["initial_state"][n : n + 1]}
        own, own_final = plain(**alone)
        assert torch.equal(y[:, begin:end], own) and torch.equal(final[n : n + 1], own_final)


def test_streams_side_by_side(device):
    """q | k | v in one call: each has the bits that it gets alone."""
    streams = [inputs((2, 20, 24, 4), device, torch.bfloat16) for _ in range(3)]
    for i, x in enumerate(streams):
        x["weight"] = x["weight"] + i
    dims = {"x": 2, "weight": 0, "bias": 0, "initial_state": 1}
    together = plain(**{name: torch.cat([x[name] for x in streams], dim) for name, dim in dims.items()})
    for i, x in enumerate(streams):
        y, final = plain(**x)
        assert torch.equal(together[0].chunk(3, 2)[i], y) and torch.equal(together[1].chunk(3, 1)[i], final)


WIDTHS = [(16,), (8, 24), (40, 8, 16), (136, 136, 264), (3, 1, 5)]


def streams_and_whole(widths: tuple[int, ...], device, dtype: torch.dtype) -> tuple[list[Tensor], dict[str, Tensor]]:
    given = inputs((2, 21, sum(widths), 4), device, dtype)
    return [x.contiguous() for x in given["x"].split(list(widths), dim=-1)], given


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_streams(dtype, widths, device):
    """Values, states and gradients of tensors of their own are those of one tensor with all channels."""
    streams, given = streams_and_whole(widths, device, dtype)
    make = torch.Generator().manual_seed(2)
    dy, dfinal = (torch.randn(given[n].shape, generator=make).to(device, dtype) for n in ("x", "initial_state"))
    whole = leaves_of(given)
    y, final = plain(**whole)
    expected = [y, final, *torch.autograd.grad([y, final], list(whole.values()), [dy, dfinal])]
    parameters = leaves_of({name: given[name] for name in ("weight", "bias", "initial_state")})
    for count in (len(widths), 1):  # 1: a list of one stream is several streams too
        xs = [x.detach().requires_grad_() for x in (streams if count > 1 else [given["x"]])]
        ys, own_final = plain(xs, **parameters)
        assert isinstance(ys, tuple) and [y.shape for y in ys] == [x.shape for x in xs]
        dys = dy.split([x.shape[-1] for x in xs], dim=-1)
        d = torch.autograd.grad([*ys, own_final], [*xs, *parameters.values()], [*dys, dfinal])
        got = [torch.cat(ys, -1), own_final, torch.cat(d[: len(xs)], -1), *d[len(xs) :]]
        for a, b in zip(got, expected, strict=True):
            # kernels add in an order of their own; conv1d, behind the reference, in one that depends on the channels
            assert torch.equal(a, b) if device.runs_kernels else torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_streams_that_nobody_asks_about(device):
    """One output alone has a gradient; one input alone needs one."""
    streams, given = streams_and_whole((40, 8, 16), device, torch.float32)
    weight = given["weight"].requires_grad_()
    ys, final = kda_cuda.short_conv((streams[0], streams[1].requires_grad_(), streams[2]), weight)
    assert final is None
    ys[1].sum().backward()
    alone = streams[1].detach().requires_grad_()
    own_weight = weight.detach()[40:48].clone().requires_grad_()
    kda_cuda.short_conv(alone, own_weight)[0].sum().backward()
    torch.testing.assert_close(streams[1].grad, alone.grad)
    torch.testing.assert_close(weight.grad[40:48], own_weight.grad)
    assert not weight.grad[:40].any() and not weight.grad[48:].any()


def test_streams_packed_and_padded(device):
    streams, given = streams_and_whole((8, 24), device, torch.bfloat16)
    cu_seqlens = torch.tensor([0, 4, 4, 17], device=device)
    options = {"cu_seqlens": cu_seqlens}
    expected, _ = kda_cuda.short_conv(given["x"][:1], given["weight"], **options)
    ys, _ = kda_cuda.short_conv([x[:1] for x in streams], given["weight"], **options)
    assert torch.equal(torch.cat(ys, -1), expected) and not ys[1][0, 17:].any()


def test_without_what_may_be_left_out(device):
    """No bias and no initial state are zeros; a weight [D, 1, taps] is one [D, taps]."""
    x = inputs((2, 11, 16, 4), device, torch.float32)
    zeros = {name: torch.zeros_like(x[name]) for name in ("bias", "initial_state")}
    y, final = plain(**{**x, **zeros})
    same, none = kda_cuda.short_conv(x["x"], x["weight"].unsqueeze(1))
    assert torch.equal(same, y) and none is None
    assert torch.equal(kda_cuda.short_conv(x["x"], x["weight"], output_final_state=True)[1], final)


# ---- layouts and dtypes of the arguments -----------------------------------------------------------------------------


def results(x: Tensor, dy: Tensor, **more: Tensor) -> list[Tensor]:
    leaves = leaves_of({"x": x, **more})
    y, final = kda_cuda.short_conv(**leaves, output_final_state=True)
    return [y, final, *torch.autograd.grad([y, final], list(leaves.values()), [dy, torch.ones_like(final)])]


@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("whose", ["x", "dy", "initial_state", "weight", "bias"])
def test_layout_changes_no_value(whose, layout, device):
    x = inputs((2, 20, 24, 4), device, torch.bfloat16) | {"dy": torch.randn(2, 20, 24).to(device, torch.bfloat16)}
    if layout == "expanded":
        x[whose] = x[whose][:1].expand(x[whose].shape)
        moved = x[whose]
    else:
        missing = 3 - x[whose].dim()
        moved = relaid(x[whose][(None,) * missing])[layout][(0,) * missing]
    expected = results(**{**x, whose: x[whose].contiguous()})
    got = results(**{**x, whose: moved})
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)  # the gradients of the weights: in other runs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes_of_parameters_and_states(dtype, device):
    """fp32 or the dtype of x; the final state is of the dtype of the initial one."""
    x = inputs((2, 9, 16, 4), device, dtype) | {"dy": torch.randn(2, 9, 16).to(device, dtype)}
    x |= {name: x[name].to(dtype) for name in ("weight", "bias")}
    narrow = results(**x)
    wide = results(**{name: t if name in ("x", "dy") else t.float() for name, t in x.items()})
    assert [t.dtype for t in wide] == [dtype, torch.float32, dtype, *[torch.float32] * 3]
    assert all(t.dtype == dtype for t in narrow)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("batch", [0, 2])
def test_no_tokens(batch, device):
    x = leaves_of(inputs((batch, 0, 8, 4), device, torch.float32))
    y, final = plain(**x)
    assert y.shape == (batch, 0, 8) and torch.equal(final, x["initial_state"])
    dx, dweight, dbias, dstate = torch.autograd.grad(final.square().sum() + y.sum(), list(x.values()))
    assert dx.shape == y.shape and not dweight.any() and not dbias.any()
    assert torch.equal(dstate, 2 * x["initial_state"])
    assert not kda_cuda.short_conv(x["x"], x["weight"], output_final_state=True)[1].any()


def test_no_nan_comes_from_tokens_that_no_sequence_has(device):
    x = inputs((1, 20, 16, 4), device, torch.bfloat16, sequences=1) | {
        "dy": torch.randn(1, 20, 16).to(device).bfloat16()
    }
    cu_seqlens = torch.tensor([0, 13], device=device)
    leaves = leaves_of({name: t for name, t in x.items() if name != "dy"})
    with torch.no_grad():
        leaves["x"][0, 13:], x["dy"][0, 13:] = torch.nan, torch.nan
    y, _ = kda_cuda.short_conv(**leaves, cu_seqlens=cu_seqlens)
    gradients = torch.autograd.grad(y, list(leaves.values()), x["dy"])
    assert all(d.isfinite().all() for d in (y, *gradients)) and not gradients[0][0, 13:].any()


def test_gradients_of_parameters_never_vary(device):
    """Sums over tokens are added in one order: no atomics."""
    x = inputs((2, 150, 40, 4), device, torch.bfloat16) | {"dy": torch.randn(2, 150, 40).to(device, torch.bfloat16)}
    runs = [results(**x) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_only_what_is_wanted_is_given(device):
    x = leaves_of(inputs((1, 5, 8, 4), device, torch.float32))
    kda_cuda.short_conv(x["x"].detach(), x["weight"], x["bias"].detach())[0].sum().backward()
    assert x["weight"].grad is not None and x["bias"].grad is None
    assert not kda_cuda.short_conv(*(x[n].detach() for n in ("x", "weight", "bias")))[0].requires_grad


def test_only_the_final_state_is_differentiated(device):
    x = leaves_of(inputs((1, 2, 8, 4), device, torch.float32))
    _, final = plain(**x)
    gradients = torch.autograd.grad(final.sum(), list(x.values()))
    assert torch.equal(gradients[0], torch.ones_like(gradients[0])) and not gradients[1].any()
    assert gradients[3][0, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("lengths", [None, (0, 1, 4, 0, 3)], ids=str)
@pytest.mark.parametrize("silu", [True, False])
def test_gradcheck(silu, lengths):
    """Through both outputs, to every input."""
    x = inputs((1, 9, 2, 3), "cpu", torch.float32, sequences=None if lengths is None else len(lengths))
    leaves = leaves_of({name: t.double() for name, t in x.items()})
    cu_seqlens = None if lengths is None else torch.tensor([0, *itertools.accumulate(lengths)])

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        return plain(*given, activation="silu" if silu else None, cu_seqlens=cu_seqlens)

    assert torch.autograd.gradcheck(call, list(leaves.values()))
