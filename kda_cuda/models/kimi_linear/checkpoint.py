"""Checkpoints of Kimi Linear in safetensors: checked by their headers, read a tensor at a time, written atomically."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ...checks import Checker
from .names import Source, readable, released

__all__ = ["load", "plan", "save"]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
Plan = dict[Path, dict[str, Source]]  # the tensors that are read from each file


def _safetensors(op: str):
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            f"kda_cuda::{op}: safetensors is not installed, expected it: pip install safetensors"
        ) from None
    return safetensors


@contextlib.contextmanager
def _opened(path: Path) -> Iterator:
    """A file of safetensors; whatever is wrong with it names the file."""
    library = _safetensors("from_pretrained")
    if not path.is_file():
        raise FileNotFoundError(f"kda_cuda::from_pretrained: {path} is missing")
    try:
        with library.safe_open(str(path), framework="pt") as file:
            yield file
    except library.SafetensorError as error:
        raise Checker("from_pretrained").value_error(f"{path} is damaged: {error}") from None


def plan(model: nn.Module, folder: Path) -> Plan:
    """What is read from which file, after every name and shape was compared with those of the model.

    The model may be on ``meta``: nothing but headers of files is read.

    Raises:
        FileNotFoundError, ValueError: as :meth:`KimiLinearForCausalLM.from_pretrained` says.
    """
    tensors = released(model)
    sources, found, seen = readable(tensors), {}, {}
    unexpected, misshapen, twice = [], [], []
    for path, listed in _files(folder).items():
        found[path] = {}
        with _opened(path) as file:
            for name in file.keys() if listed is None else sorted(listed & set(file.keys())):
                source, shape = sources.get(name), list(file.get_slice(name).get_shape())
                if source is None:
                    unexpected.append(name)
                    continue
                if not _fits(shape, source.shape):
                    misshapen.append(f"{name} has shape {shape}, expected {list(source.shape)}")
                for piece in source.pieces:
                    if piece in seen:
                        twice.append(f"{piece} is in {seen[piece]} and {name}")
                    seen[piece] = name
                found[path][name] = source
    missing = [name for name in tensors if name not in seen]
    problems = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "twice": twice}
    if any(problems.values()):
        lines = [f"{len(names)} {kind}: {', '.join(names)}" for kind, names in problems.items() if names]
        text = f"the tensors in {folder} are not those of its config.json\n  " + "\n  ".join(lines)
        raise Checker("from_pretrained").value_error(text)
    return found


def _fits(shape: list[int], expected: tuple[int, ...]) -> bool:
    """Dimensions of one do not matter: A_log is met as ``[heads]`` too."""
    return [n for n in shape if n != 1] == [n for n in expected if n != 1]


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint, and the names that the index says are in each; None: all that are there."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise FileNotFoundError(f"kda_cuda::from_pretrained: {folder} has neither {INDEX} nor {SINGLE}")
        return {folder / SINGLE: None}
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise Checker("from_pretrained").value_error(f"{index} is damaged: {error!r}") from None
    files = sorted(set(weight_map.values()))
    return {folder / file: {name for name, place in weight_map.items() if place == file} for file in files}


@torch.no_grad()
def load(model: nn.Module, files: Plan) -> None:
    """Copies the tensors of a :func:`plan` into the model, whatever device and dtype it has."""
    tensors = released(model)
    for path, sources in files.items():
        with _opened(path) as file:
            for name, source in sources.items():
                value = file.get_tensor(name)
                pieces = [tensors[piece] for piece in source.pieces]
                rows = value.reshape(sum(len(p) for p in pieces), *pieces[0].shape[1:])
                for piece, part in zip(pieces, rows.split([len(p) for p in pieces]), strict=True):
                    piece.copy_(part)


@torch.no_grad()
def save(model: nn.Module, folder: Path, config: dict, max_shard_bytes: int) -> None:
    """Writes ``config`` and the model: everything into a folder of its own first, then the files into place."""
    c = Checker("save_pretrained")
    c.integer("max_shard_bytes", max_shard_bytes)
    if max_shard_bytes < 1:
        raise c.value_error(f"max_shard_bytes is {max_shard_bytes}, expected >= 1")
    library = _safetensors("save_pretrained")
    tensors = released(model)
    shards = _shards(tensors, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    old = set(folder.glob("model*.safetensors"))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if old & {folder / name for name in names}:  # the old files stay until the index no longer names them
        tag = secrets.token_hex(4)
        names = [name.replace("model-", f"model-{tag}-") for name in names]
    place = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        for name, shard in zip(names, shards, strict=True):
            values = {key: tensors[key].detach().to("cpu", copy=True).contiguous() for key in shard}
            library.torch.save_file(values, str(place / name), metadata={"format": "pt"})
        total = sum(t.nbytes for t in tensors.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        for name, content in (("config.json", config), (INDEX, index)):
            (place / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        _into_place(place, folder, (*names, "config.json", INDEX))
    except (OSError, library.SafetensorError) as error:
        number = getattr(error, "errno", None)
        text = f"kda_cuda::save_pretrained: {folder} cannot be written, the checkpoint in it stays: {error}"
        raise (OSError(text) if number is None else OSError(number, text)) from error
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for path in old:
        path.unlink(missing_ok=True)


def _shards(tensors: dict[str, Tensor], limit: int) -> list[list[str]]:
    """Names in their order, in as many lists as it takes for each to stay below ``limit`` bytes."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _into_place(place: Path, folder: Path, names: tuple[str, ...]) -> None:
    """Every file reaches the disk before the first one moves."""
    for name in names:
        with open(place / name, "rb") as file:
            os.fsync(file.fileno())
    for name in names:
        os.replace(place / name, folder / name)
