"""The processes that train together, and a model on all of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..nn.decoder import CausalLM
from ..nn.kda import KimiDeltaAttention
from ..parallel import shard

__all__ = ["PARALLEL", "World", "compile_blocks", "on_first_rank", "spread"]

PARALLEL = ("fsdp", "ddp")


@dataclass(frozen=True)
class World:
    """One process among those that train together."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    @contextlib.contextmanager
    def joined(cls, device: str) -> Iterator[World]:
        """Joins the processes that ``torchrun`` started; alone without it, or in the default group where there is one.

        Args:
            device: ``"cuda"`` gives every process of a machine a GPU of its own.
        """
        starts = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
        place = torch.device(device)
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(place)
        if starts:
            dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        try:
            alone = not dist.is_initialized()
            yield cls(0 if alone else dist.get_rank(), 1 if alone else dist.get_world_size(), place)
        finally:
            if starts:
                dist.destroy_process_group()

    def total(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks; ``x`` itself holds it afterwards."""
        if self.size > 1:
            dist.all_reduce(x)
        return x


def on_first_rank(action: Callable[[], None]) -> None:
    """Runs ``action`` on rank 0. Every rank waits for it. What it raises there, rank 0 raises.

    The others raise an OSError as it was, and what else it was as a RuntimeError that says so: not every exception of a
    library can be sent.
    """
    failure, sent = None, [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            failure = error
            sent = [error if isinstance(error, OSError) else RuntimeError(f"rank 0: {type(error).__name__}: {error}")]
    if dist.is_initialized():
        dist.broadcast_object_list(sent, src=0)
    if failure is not None:
        raise failure
    if sent[0] is not None:
        raise sent[0]


def compile_blocks(model: CausalLM, backend: str) -> None:
    """Compiles, in place, the blocks of KDA whole, and of the other blocks what follows attention.

    ``NoPEMultiLatentAttention`` goes through packed documents one by one, as the host knows them. It stays eager, since
    every batch has other documents.
    """
    for block in model.model.layers:
        whole = isinstance(block.self_attn, KimiDeltaAttention)
        (block if whole else block.mlp).compile(backend=backend)


def spread(model: CausalLM, world: World, kind: str) -> nn.Module:
    """The model on the device of this rank: sharded by FSDP2, or a replica of DDP. Alone it is the model itself."""
    if world.size == 1:
        return model.to(world.device)
    if kind == "fsdp":
        return shard(model, mesh=dist.init_device_mesh(world.device.type, (world.size,)))
    devices = [world.device.index] if world.device.type == "cuda" else None
    return DistributedDataParallel(model.to(world.device), device_ids=devices)
