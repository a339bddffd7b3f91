"""What ranks send each other: tensors gathered in the order of slots, and descriptions that must agree."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import Checker
from .routes import Route

Exchange = Generator[Tensor, Tensor, Any]  # yields what its rank sends, is sent what all ranks sent
_all_to_all = getattr(dist, "all_to_all_single", None)
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def gather(x: Tensor, group: Any) -> Tensor:
    """``[ranks * n, ...]``: the ``[n, ...]`` of all ranks, one after another."""
    ranks = dist.get_world_size(group)
    everywhere = x.new_empty(ranks * x.shape[0], *x.shape[1:])
    _all_gather(everywhere, x.contiguous(), group=group)
    return everywhere


def exchange(x: Tensor, group: Any) -> Tensor:
    """``[ranks * n, ...]``: the rank's own n of the ``[ranks * n, ...]`` of every rank, one rank after another."""
    received = torch.empty_like(x)
    _all_to_all(received, x.contiguous(), group=group)
    return received


def by_slot(everywhere: Tensor, route: Route) -> Tensor:
    """What all ranks sent, ``[slots, ...]`` in the order of tokens."""
    order = route.slot_order()
    return everywhere if order == list(range(len(order))) else torch.stack([everywhere[i] for i in order])


def run_alone(steps: Exchange, route: Route, group: Any) -> Any:
    """The result of ``steps`` on this rank of ``group``."""
    return run_with(steps, lambda x: by_slot(gather(x, group), route))


def run_with(steps: Exchange, meet: Callable[[Tensor], Tensor]) -> Any:
    try:
        sent = next(steps)
        while True:
            sent = steps.send(meet(sent))
    except StopIteration as end:
        return end.value


def run_together(all_steps: Sequence[Exchange], route: Route) -> list[Any]:
    """The results of all ranks, which are simulated in this process. ``route``: that of any of them."""
    received: list[Tensor | None] = [None] * len(all_steps)
    while True:
        sent, results = [], []
        for steps, x in zip(all_steps, received, strict=True):
            try:
                sent.append(next(steps) if x is None else steps.send(x))
            except StopIteration as end:
                results.append(end.value)
        if results:
            assert len(results) == len(all_steps), "ranks differ in how often they exchange"
            return results
        received = [by_slot(torch.cat(sent), route)] * len(all_steps)


def agree(
    c: Checker, group: Any, device: torch.device, own: dict[str, int], failure: Exception | None = None
) -> list[list[int]]:
    """Exchanges a description: names and their values, the same names on every rank.

    Returns:
        The values of all ranks, a list for each.

    Raises:
        ValueError: on every rank, if some rank has a failure or one of the names whose value must be equal differs.
        Exception: ``failure`` itself, on its rank.
    """
    values = [int(failure is not None), *own.values()]
    x = torch.tensor([values], dtype=torch.int64, device=_device_of(group, device))
    everywhere = gather(x, group).tolist()
    if failure is not None:
        raise failure
    if failed := [rank for rank, theirs in enumerate(everywhere) if theirs[0]]:
        raise c.value_error(f"rank {failed[0]} refused its arguments, expected the same valid ones on every rank")
    for i, name in enumerate(own, start=1):
        if name != "tokens" and (wrong := [r for r, theirs in enumerate(everywhere) if theirs[i] != everywhere[0][i]]):
            there, here = everywhere[wrong[0]][i], everywhere[0][i]
            raise c.value_error(f"{name} is {there} on rank {wrong[0]}, expected {here} as on rank 0")
    return [theirs[1:] for theirs in everywhere]


def _device_of(group: Any, device: torch.device) -> torch.device:
    """Where the backend takes tensors, ``device`` if it can."""
    if str(dist.get_backend(group)) != "nccl" or device.type == "cuda":
        return device
    return torch.device("cuda", torch.cuda.current_device())
