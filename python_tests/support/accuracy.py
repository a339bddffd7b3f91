"""The error budget (docs/mathematics.md, section 6): how far a result may be from the float64 recurrence, and why.

A result passes if its relative RMS error is at most twice that of the same mathematics with the same roundings
(:func:`low_precision_reference`) plus 1e-6, and never above a cap; and if no row is off by more than ten caps. Where
the truth is not finite the result must be the same there.

The roundings are drawn several times, since those of a few numbers may cancel by luck: dA_log of two heads is two sums.
The kernel's own roundings are one more draw. The RMS of n errors scatters by its 1 / sqrt(2 n), so for fewer than 16
``1 / sqrt(n)`` is added, with the n that the errors of the draws show: few rows with large errors count as few. This
room reaches up to half of the cap.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kda_cuda import reference

from .cases import Case, Inputs

CAP = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative RMS, forward
GRADIENT_FACTOR = 3
ROW_FACTOR = 10
FLOOR = 1e-6
DRAWS = 4  # of the roundings of gradients
FEW = 16  # errors: the RMS of these scatters by more than a sixth
GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias", "dinitial_state")


@dataclass(frozen=True)
class Error:
    rms: float  # |x - truth| / |truth|, over the finite elements
    worst_row: float  # the largest |row error| over the RMS norm of the truth's rows
    same_nonfinite: bool  # inf, -inf and nan where, and only where, the truth has them

    def __str__(self) -> str:
        return f"rms {self.rms:.2e}, worst row {self.worst_row:.2e}" + ("" if self.same_nonfinite else ", non-finite")


def measure(x: Tensor, truth: Tensor) -> Error:
    """Error of ``x`` against a float64 ``truth``, which overflows where the dtype of ``x`` does."""
    assert x.shape == truth.shape, f"got shape {list(x.shape)}, expected {list(truth.shape)}"
    x, rounded, truth = x.detach().cpu(), truth.detach().cpu().to(x.dtype), truth.detach().cpu().double()
    finite = rounded.isfinite()
    same = torch.equal(x.isfinite(), finite) and torch.equal(x[~finite].nan_to_num(), rounded[~finite].nan_to_num())
    difference = torch.where(finite & x.isfinite(), x.double() - truth, 0.0)
    truth = torch.where(finite, truth, 0.0)
    if truth.dim() == 0 or truth.numel() == 0:
        difference, truth = difference.reshape(-1, 1), truth.reshape(-1, 1)
    rows, truth_rows = difference.norm(dim=-1), truth.norm(dim=-1)
    norm = truth_rows.norm()
    if norm == 0:
        wrong = float("inf") if bool(difference.any()) else 0.0
        return Error(wrong, wrong, same)
    typical_row = norm / truth_rows.numel() ** 0.5
    return Error((rows.norm() / norm).item(), (rows.max() / typical_row).item(), same)


@dataclass(frozen=True)
class Budget:
    rms: float
    worst_row: float

    def check(self, name: str, x: Tensor, truth: Tensor) -> Error:
        error = measure(x, truth)
        assert error.same_nonfinite, f"{name}: non-finite values differ from the truth's"
        assert error.rms <= self.rms, f"{name}: relative RMS error {error.rms:.3e}, budget {self.rms:.3e}"
        assert error.worst_row <= self.worst_row, f"{name}: worst row {error.worst_row:.3e}, {self}"
        return error


def cap(case: Case, dtype: torch.dtype, gradient: bool) -> float:
    if gradient:
        return CAP[dtype] * GRADIENT_FACTOR * case.gradient_allowance
    return CAP[dtype] * case.forward_allowance


def budget(case: Case, name: str, low_precision: Tensor, truth: Tensor) -> Budget:
    """Of the tensor ``name``, whose low_precision_reference is ``low_precision``."""
    limit = cap(case, low_precision_dtype(case, low_precision), name in GRADIENTS)
    count = effective_count(low_precision, truth)
    rms = 2 * rms_of_draws(low_precision, truth) + FLOOR
    if count < FEW:
        rms = max(rms, min(rms * (1 + count**-0.5), limit / 2))
    return Budget(min(rms, limit), ROW_FACTOR * limit)


def rms_of_draws(low_precision: Tensor, truth: Tensor) -> float:
    """The relative RMS error over all draws."""
    errors = [measure(draw, truth).rms for draw in low_precision.reshape(-1, *truth.shape)]
    return (sum(error * error for error in errors) / len(errors)) ** 0.5


def effective_count(low_precision: Tensor, truth: Tensor) -> float:
    """How many numbers make up the error of the draws: all, where their errors are alike; 1, where one has them all."""
    errors = low_precision.double().reshape(-1, *truth.shape) - truth
    squares = (errors / errors[errors.isfinite()].abs().max().clamp(min=1e-300)).square().nan_to_num(0, 0, 0).mean(0)
    return max(1.0, (squares.sum().square() / squares.square().sum().clamp(min=1e-300)).item())


def low_precision_dtype(case: Case, x: Tensor) -> torch.dtype:
    """The dtype whose roundings a result carries: that of the inputs, also where it is stored in fp32."""
    return x.dtype if x.dtype in (torch.float16, torch.bfloat16) else case.dtype


# which argument of a product is its first factor
FIRST_FACTOR = {torch.ops.aten.bmm: 0, torch.ops.aten.mm: 0, torch.ops.aten.baddbmm: 1, torch.ops.aten.baddbmm_: 1}


class Roundings:
    """To the nearest number of ``dtype``; each ``draw`` but the first on grids of its own: times a random number."""

    def __init__(self, dtype: torch.dtype, draw: int = 0):
        self.dtype = dtype
        self.grids = random.Random(draw) if draw else None

    def __call__(self, x: Tensor) -> Tensor:
        nearest = x.to(self.dtype).to(x.dtype)
        if self.grids is None:
            return nearest
        grid = self.grids.uniform(1, 2)
        drawn = (x * grid).to(self.dtype).to(x.dtype) / grid
        return torch.where((x == nearest) | ~drawn.isfinite(), nearest, drawn)


class RoundedProducts(TorchDispatchMode):
    """Inside, operands of matrix products are rounded as tensor cores take them; sums stay wide."""

    def __init__(self, roundings: Roundings):
        super().__init__()
        self.round = roundings

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = FIRST_FACTOR.get(func.overloadpacket)
        if first is not None:
            operands = [self.round(x) for x in args[first : first + 2]]
            args = (*args[:first], *operands, *args[first + 2 :])
        return func(*args, **(kwargs or {}))


class RoundedStates(TorchFunctionMode):
    """Inside, the states before and their gradients after a chunk are rounded where they meet in the gradient of the
    gate: the backward keeps them in the dtype of the inputs."""

    def __init__(self, roundings: Roundings):
        super().__init__()
        self.round = roundings

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.linalg.vecdot and "out" not in (kwargs or {}):
            args = (self.round(args[0]), self.round(args[1]), *args[2:])
        return func(*args, **(kwargs or {}))


def low_precision_reference(x: Inputs, backward: bool = True) -> dict[str, Tensor]:
    """Outputs and gradients by name, ``[draws, ...]``, without gradients one draw: the fp32 chunk reference with the
    operands of its products and its outputs rounded to the dtype of ``x.q``, the state in fp32. No kernel code is
    involved."""
    draws = []
    for draw in range(DRAWS if backward and x.q.dtype != torch.float32 else 1):
        roundings = Roundings(x.q.dtype, draw)
        with RoundedProducts(roundings), RoundedStates(roundings):
            results = dict(zip(("o", "final_state", "h"), reference.chunk_fwd(*x.fwd_args(True)), strict=True))
            if backward:
                results.update(zip(GRADIENTS, reference.chunk_bwd(*x.bwd_args()), strict=True))
        draws.append(results)
    return {name: torch.stack([draw[name] for draw in draws]) for name, y in draws[0].items() if y.numel()}
