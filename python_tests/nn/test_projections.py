"""Linear modules of one input, computed together: the same outputs and gradients as one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kda_cuda.nn import projections
from kda_cuda.nn.projections import linears

WIDTHS = (300, 24, 8, 270)  # two that are narrow
# The order of sums differs; in bf16 the parts of the gradient of x are rounded before they are added, one by one.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 5e-2}}


def made(dtype=torch.float32, inputs: int = 32, rows: int = 14) -> tuple[list[nn.Linear], torch.Tensor]:
    torch.manual_seed(0)
    modules = [nn.Linear(inputs, width, bias=False, dtype=dtype) for width in WIDTHS]
    return modules, torch.randn(2, rows // 2, inputs, dtype=dtype)


def one_by_one(x: torch.Tensor, *modules: nn.Module) -> list[torch.Tensor]:
    return [module(x) for module in modules]


def gradients(
    function, modules: list, x: torch.Tensor, used: tuple[int, ...] = (0, 1, 2, 3)
) -> list[torch.Tensor | None]:
    x = x.detach().requires_grad_()
    ys = function(x, *modules)
    sum((i + 1) * ys[i].float().square().sum() for i in used).backward()
    found = [*(y.detach() for y in ys), x.grad, *(p.grad for m in modules for p in m.parameters())]
    for module in modules:
        module.zero_grad(set_to_none=True)
    return found


def check(modules: list, x: torch.Tensor, **more) -> None:
    got, expected = (gradients(f, modules, x, **more) for f in (linears, one_by_one))
    for a, b in zip(got, expected, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, **CLOSE[x.dtype])


@pytest.fixture
def products(monkeypatch) -> list:
    """The number of weights of each function that is called."""
    counts, apply = [], projections._Linears.apply
    monkeypatch.setattr(
        projections._Linears, "apply", lambda x, *weights: counts.append(len(weights)) or apply(x, *weights)
    )
    return counts


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("used", [(0, 1, 2, 3), (0, 3), (1,), (1, 3)], ids=str)
@pytest.mark.parametrize("rows", [14, 90])
def test_values_and_gradients(dtype, rows, used, products):
    modules, x = made(dtype, rows=rows)
    check(modules, x, used=used)
    assert products == [4]


def test_some_need_no_gradient(products):
    modules, x = made()
    modules[0].requires_grad_(False)
    modules[1].requires_grad_(False)
    check(modules, x)
    ys = linears(x, *modules)  # the input neither
    ys[2].sum().backward()
    torch.testing.assert_close(modules[2].weight.grad, x.sum((0, 1)).expand_as(modules[2].weight))
    assert products == [4, 4]


def test_what_is_more_than_a_weight_is_called(products):
    """A hook, a bias, another class: each by itself, with the same results."""
    modules, x = made()
    modules[0].register_forward_hook(lambda module, args, y: 2 * y)
    modules[1] = nn.Linear(32, 24)
    modules[2] = nn.Sequential(nn.Linear(32, 8), nn.Tanh())
    check(modules, x)
    assert products == []  # one plain module is no more than itself
    modules.append(nn.Linear(32, 5, bias=False))
    check(modules, x)
    assert products == [2]


@pytest.mark.parametrize("rows", [7, 64])
def test_bits_are_those_without_gradients(rows, products):
    """So that a forward which is repeated for its gradients is the one that was."""
    modules, _ = made()
    x = torch.randn(1, rows, 32)
    with torch.no_grad():
        expected = linears(x, *modules)
    assert products == []
    assert all(torch.equal(a, b) for a, b in zip(linears(x, *modules), expected, strict=True))
    for a, b in zip(expected, one_by_one(x, *modules), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 7, 32), (2, 0, 32), (32,)], ids=str)
def test_few_rows(shape):
    modules, _ = made()
    check(modules, torch.randn(shape))


def test_autocast(products):
    """As torch does it: products in the autocast dtype, gradients in those of the parameters."""
    modules, x = made()

    def under(function):
        def call(*args):
            with torch.autocast("cpu", torch.bfloat16):
                return function(*args)

        return call

    got, expected = (gradients(under(f), modules, x) for f in (linears, one_by_one))
    assert products == [4]
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **CLOSE[torch.bfloat16])


def test_errors_are_those_of_the_modules():
    modules, x = made()
    with pytest.raises(RuntimeError, match="dtype"):
        linears(x.bfloat16(), *modules)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linears(x[..., :5], *modules)


def test_second_derivatives():
    modules, x = made()

    def second(function) -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        (d,) = torch.autograd.grad(function(leaf, *modules)[0].square().sum(), leaf, create_graph=True)
        return list(torch.autograd.grad(d.square().sum(), [leaf, modules[0].weight]))

    for a, b in zip(second(linears), second(one_by_one), strict=True):
        # terms in the hundreds, which may nearly cancel, are added in another order
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
