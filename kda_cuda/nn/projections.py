"""Linear modules that share an input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .modules import is_plain

__all__ = ["linears"]

NARROW = 256  # outputs; products with fewer leave most of a GPU idle, so they are computed together
FEW_ROWS = 64  # for fewer, putting weights together costs more than it saves


def linears(x: Tensor, *modules: nn.Module) -> list[Tensor]:
    """``module(x)`` of each module.

    Linear modules that are no more than their weight are computed together: narrow ones share a product, and the
    gradient of ``x`` is added up within the products instead of by an addition for each module. Bits are the same
    with gradients and without, so that a forward may be repeated.
    """
    grads = torch.is_grad_enabled()
    if torch.compiler.is_compiling() or not (grads or x.numel() >= FEW_ROWS * x.shape[-1]):
        return [module(x) for module in modules]
    plain = [is_plain(module, nn.Linear) for module in modules]
    given, weights = x, [module.weight for module, own in zip(modules, plain, strict=True) if own]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        given, *weights = (t if t.dtype == torch.float64 else t.to(dtype) for t in (x, *weights))
    fits = all((w.dtype, w.device, w.shape[1]) == (given.dtype, given.device, given.shape[-1]) for w in weights)
    if len(weights) < 2 or x.dim() < 2 or not fits:  # an error is that of the module
        return [module(x) for module in modules]
    products = iter(_Linears.apply(given, *weights) if grads else _products(given, weights))
    return [next(products) if own else module(x) for module, own in zip(modules, plain, strict=True)]


def _products(x: Tensor, weights: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    """``x @ weight.T`` of each weight ``[outputs, inputs]``."""
    rows, ys = x.flatten(0, -2), [x] * len(weights)
    for group in _groups(rows, weights):
        product = rows @ _beside([weights[i] for i in group]).T
        for i, y in zip(group, product.split([len(weights[i]) for i in group], dim=1), strict=True):
            ys[i] = y.unflatten(0, x.shape[:-1])
    return tuple(ys)


class _Linears(torch.autograd.Function):
    """:func:`_products` with gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return _products(x, weights)

    @staticmethod
    def backward(ctx, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        rows, dx, dweights = x.flatten(0, -2), None, [None] * len(weights)
        for group in _groups(rows, weights):
            if all(gradients[i] is None for i in group):
                continue
            dy = _beside([_rows_of(gradients[i], rows, weights[i]) for i in group], dim=1)
            if ctx.needs_input_grad[0]:
                weight = _beside([weights[i] for i in group])
                dx = dy @ weight if dx is None else torch.addmm(dx, dy, weight)
            if any(ctx.needs_input_grad[1 + i] for i in group):
                dweight = dy.T @ rows
                for i, own in zip(group, dweight.split([len(weights[i]) for i in group]), strict=True):
                    dweights[i] = own
        return (None if dx is None else dx.view(x.shape), *dweights)


def _groups(rows: Tensor, weights: tuple[Tensor, ...] | list[Tensor]) -> list[list[int]]:
    """The weights of each product."""
    narrow = [i for i, weight in enumerate(weights) if len(weight) <= NARROW and len(rows) >= FEW_ROWS]
    return [[i] for i in range(len(weights)) if i not in narrow] + ([narrow] if narrow else [])


def _beside(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _rows_of(dy: Tensor | None, rows: Tensor, weight: Tensor) -> Tensor:
    """A gradient ``[rows, outputs]``."""
    return rows.new_zeros(len(rows), len(weight)) if dy is None else dy.flatten(0, -2)
