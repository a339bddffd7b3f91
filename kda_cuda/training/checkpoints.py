"""Checkpoints of a run: complete or not there at all, whatever ends the process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from .ranks import World, on_first_rank

__all__ = ["latest", "load", "save", "settings_of"]

ABOUT = "about.json"


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict, world: World, keep: int
) -> None:
    """Writes ``folder/step-N`` with model, optimizer and generators of random numbers. All ranks call it.

    Everything goes to a folder of its own, reaches the disk, and then gets its name. Older checkpoints go last.

    Args:
        step: how many steps are done.
        settings: what a run that continues from here must agree on, as JSON.
        keep: how many checkpoints stay, this one included.

    Raises:
        OSError: a file cannot be written, for instance because the disk is full. Earlier checkpoints are left.
    """
    place, name = folder / ".saving", f"step-{step:08}"

    def begin() -> None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)

    def finish() -> None:
        with open(place / ABOUT, "w") as file:
            about = {"step": step, "ranks": world.size, "device": world.device.type, "settings": settings}
            json.dump(about, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(place, folder / name)
        _to_disk(folder)
        for old in _all(folder)[:-keep]:
            shutil.rmtree(old)

    try:
        on_first_rank(begin)
        with _quiet():
            dcp.save(_state(model, optimizer, world), checkpoint_id=place)
        on_first_rank(finish)
    except (OSError, CheckpointException) as error:
        if world.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
        _raise_named(error, folder, name)


def _raise_named(error: OSError | CheckpointException, folder: Path, name: str) -> None:
    cause = _cause(error)
    kept = latest(folder)
    stays = "there is no earlier one" if kept is None else f"{kept.name} stays"
    text = f"kda_cuda.train: checkpoint {folder / name} cannot be written, {stays}: {cause}"
    number = getattr(cause, "errno", None)
    raise (OSError(text) if number is None else OSError(number, text)) from error


def _cause(error: Exception | CheckpointException) -> Exception:
    """What torch.distributed.checkpoint wrapped, of all ranks; Ctrl-C goes on as itself."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    for cause in causes:
        if not isinstance(cause, Exception):
            raise cause
    return next((cause for cause in causes if isinstance(cause, OSError)), causes[0])


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a folder."""
    found = _all(folder)
    return found[-1] if found else None


def settings_of(checkpoint: Path) -> dict:
    """What :func:`save` was given.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    return _about(checkpoint)["settings"]


def _about(checkpoint: Path) -> dict:
    with _reading(checkpoint):
        about = json.loads((checkpoint / ABOUT).read_text())
        return {name: about[name] for name in ("step", "ranks", "device", "settings")}


@contextlib.contextmanager
def _reading(checkpoint: Path) -> Iterator[None]:
    """What fails inside becomes a ValueError that names the checkpoint: something damaged it after it was complete."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, CheckpointException) as error:
        cause, told = _cause(error), "expected a complete one; when it is removed, --resume takes the one before"
        raise ValueError(
            f"kda_cuda.train: checkpoint {checkpoint} cannot be read, {told}: {type(cause).__name__}: {cause}"
        ) from error


def load(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> int:
    """Fills model, optimizer and generators of random numbers; returns how many steps are done. All ranks call it.

    The number of ranks or their kind of device may be another one than at the time of saving. The generators then stay
    as they are.

    Raises:
        ValueError: the checkpoint cannot be read.
    """
    about = _about(checkpoint)
    state = _state(model, optimizer, world)
    generators = state["random"]
    if (about["ranks"], about["device"]) != (world.size, world.device.type):
        del state["random"]
    with _quiet(), _reading(checkpoint):
        dcp.load(state, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if "random" in state:
        _set_generators(generators, world)
    return about["step"]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "random": _generators(world)}


def _generators(world: World) -> dict[str, Tensor]:
    """The states of the generators of this rank."""
    found = {f"cpu.{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        found[f"cuda.{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return found


def _set_generators(states: dict[str, Tensor], world: World) -> None:
    torch.set_rng_state(states[f"cpu.{world.rank}"])
    if world.device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda.{world.rank}"], world.device)


def _all(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def _to_disk(folder: Path) -> None:
    """The names in a folder, too, are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning of torch.distributed.checkpoint that one process is alone, where that is meant."""
    with warnings.catch_warnings():
        if not dist.is_initialized():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
