"""Where a test runs: the reference on the CPU, the kernels on the CPU (emulator), the kernels on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import kda_cuda
from kda_cuda import testing

NAMES = ("cpu", "emulator", "cuda")
_noted: dict[str, Counter] = {name: Counter() for name in NAMES}  # since they were last taken


class Device(str):
    """A torch device type, usable as ``device=``, that knows what runs there."""

    name: str  # cpu, emulator or cuda

    def __new__(cls, name: str) -> Device:
        self = super().__new__(cls, "cuda" if name == "cuda" else "cpu")
        self.name = name
        return self

    @property
    def runs_kernels(self) -> bool:
        return self.name != "cpu"

    def run(self, call: Callable[[], Any]) -> tuple[Any, list[str]]:
        """The result of ``call``, and the names of this package's kernels that ran in it, in order."""
        if self.name == "emulator":
            note_kernels(self.name, testing.take_record())
            result = call()
            kernels = testing.take_record()
        elif self.name == "cuda":
            result, kernels = _profiled(call)
        else:
            result, kernels = call(), []
        note_kernels(self.name, kernels)
        return result, kernels


def note_kernels(name: str, kernels: list[str]) -> None:
    _noted[name].update(kernels)


def take_kernels() -> dict[str, dict[str, int]]:
    """Which kernels have been noted, how often, by device; then none are."""
    taken = {name: dict(counts) for name, counts in _noted.items() if counts}
    for counts in _noted.values():
        counts.clear()
    return taken


def _profiled(call: Callable[[], Any]) -> tuple[Any, list[str]]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = call()
        torch.cuda.synchronize()
    names = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return result, [name.split("kda::")[1].split("_kernel")[0] for name in names if "kda::" in name]


def forget_recipes() -> None:
    """Calls are checked again, as in a new process: who serves them may have been changed meanwhile."""
    for name in kda_cuda.__all__:
        recipes = getattr(getattr(kda_cuda, name), "recipes", None)
        if recipes is not None:
            recipes.forget()
