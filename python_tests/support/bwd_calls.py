"""How tests call the chunkwise backward, through autograd and as the raw op, and what they may expect to have run."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

import kda_cuda
from kda_cuda import library, variants

from . import accuracy, oracle
from .accuracy import GRADIENTS
from .cases import Case, Inputs
from .devices import Device

# Every kernel of the backward, in the order of their launches; a call runs those that its gradients need.
# The first one of all, chunk_prepare, is the forward's.
KERNELS = (
    "chunk_bwd_clear", "chunk_bwd_scan", "chunk_bwd_values", "chunk_bwd_keys", "chunk_bwd_sum_heads", "chunk_bwd_reduce"
)  # fmt: skip
# What must not run where only these gradients are asked for.
UNNEEDED = {
    (): set(KERNELS),
    ("dinitial_state",): set(KERNELS) - {"chunk_bwd_scan"},
    ("dv",): {"chunk_bwd_keys", "chunk_bwd_sum_heads", "chunk_bwd_reduce"},
    ("dq", "dk", "dv", "dbeta"): {"chunk_bwd_reduce"},
}
TOKEN_GRADIENTS = ("dq", "dk", "dv", "dg", "dbeta")
NAMESPACES = {
    "cpu": library.NAMESPACE, "emulator": library.NAMESPACE_EMULATED, "cuda": library.NAMESPACE,
}  # fmt: skip
TAKES_MASK = "wanted" in library.SCHEMAS["chunk_bwd"]


def has_kernel(device: Device) -> bool:
    """Whether a backward kernel is compiled in, on a device that runs kernels."""
    return device.runs_kernels and "chunk_bwd" in variants.kernels(NAMESPACES[device.name])


def assert_ran(kernels: list[str], device: Device) -> None:
    """The backward ran as kernels on devices that run kernels, and nowhere else."""
    own = [kernel for kernel in kernels if kernel.startswith("chunk_bwd")]
    assert set(own) <= set(KERNELS), own
    assert bool(own) == device.runs_kernels


def gradients(x: Inputs, wanted: Iterable[str] = GRADIENTS, **options) -> dict[str, Tensor]:
    """Gradients by name, through ``chunk_kda`` and autograd, of those inputs of ``wanted`` that ``x`` has."""
    own = {name: y for name, y in x.differentiable().items() if f"d{name}" in set(wanted)}
    leaves = {name: y.detach().requires_grad_() for name, y in own.items()}
    o, final_state = kda_cuda.chunk_kda(**x.replace(**leaves).public(), **options)
    outputs, upstream = ([o], [x.do]) if x.dfinal_state is None else ([o, final_state], [x.do, x.dfinal_state])
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return {f"d{name}": d for name, d in zip(leaves, found, strict=True)}


def mask(wanted: Iterable[str]) -> int:
    return sum(1 << GRADIENTS.index(name) for name in wanted)


def raw_gradients(x: Inputs, device: Device, wanted: Iterable[str] | None = None) -> dict[str, Tensor]:
    """What ``chunk_bwd`` itself returns, by name; ``wanted``: as a mask."""
    op = variants.op_in(NAMESPACES[device.name], "chunk_bwd")
    return dict(zip(GRADIENTS, op(*x.bwd_args(), *(() if wanted is None else (mask(wanted),))), strict=True))


@functools.cache
def expected(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients by name: of the recurrence in float64, and of the same mathematics with the roundings of the dtype."""
    x = case.inputs()
    truth, rounded = oracle.named(*oracle.gradients(x.double())), accuracy.low_precision_reference(x)
    names = [name for name in truth if name in GRADIENTS]
    return {name: truth[name] for name in names}, {name: rounded[name] for name in names}


def check(case: Case, results: dict[str, Tensor]) -> None:
    """Each gradient of ``results`` is within its budget."""
    truth, rounded = expected(case)
    for name, d in results.items():
        accuracy.budget(case, name, rounded[name], truth[name]).check(name, d, truth[name])


def check_by_sequence(case: Case, results: dict[str, Tensor]) -> None:
    """The gradients of tokens, of each sequence by itself: no long one hides a short one."""
    truth, rounded = expected(case)
    bounds = case.inputs().sequence_bounds()
    for begin, end in itertools.pairwise(bounds):
        for name in TOKEN_GRADIENTS if end > begin else ():
            own, own_truth = results[name][:, begin:end], truth[name][:, begin:end]
            allowed = accuracy.budget(case, name, rounded[name][:, :, begin:end], own_truth)
            allowed.check(f"{name} of tokens {begin} to {end}", own, own_truth)
