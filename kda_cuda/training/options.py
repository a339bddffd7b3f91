"""What a training run is made of, beside the model and the text."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from .ranks import PARALLEL, World
from .steps import warm_up_steps

__all__ = ["DTYPES", "Options"]

DTYPES = ("float32", "bfloat16")
LARGEST_SEED = 2**31 - 1
POSITIVE = ("steps", "batch", "tokens", "accumulate", "save_every", "evaluate_every", "keep")
DECIDING = ("steps", "batch", "tokens", "lr", "lr_last", "warm_up", "weight_decay", "clip", "dtype", "seed")


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Options:
    """Options of ``python -m kda_cuda.train``, which explains them.

    Raises:
        ValueError: one does not fit; the message names it.
    """

    text: tuple[Path, ...] = ()
    tokenizer: str | None = None
    config: Path | None = None
    out: Path = Path("train_out")
    resume: bool = False
    steps: int = 1000
    batch: int = 16
    tokens: int = 256
    accumulate: int = 1
    lr: float = 3e-3
    lr_last: float = 0.1
    warm_up: int | None = None
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    save_every: int = 100
    evaluate_every: int = 100
    keep: int = 2
    device: str = field(default_factory=_default_device)
    dtype: str | None = None
    parallel: str = "fsdp"
    recompute: bool = False
    compile: str | None = None

    def __post_init__(self):
        for name in POSITIVE:
            self._check(name, getattr(self, name) >= 1, ">= 1")
        if self.dtype is None:
            object.__setattr__(self, "dtype", "float32" if self.device == "cpu" else "bfloat16")
        if self.warm_up is None:
            object.__setattr__(self, "warm_up", warm_up_steps(self.steps))
        self._check("warm_up", 1 <= self.warm_up <= self.steps, f"1 to --steps {self.steps}")
        for name in ("lr", "clip"):
            self._check(name, 0 < getattr(self, name) < math.inf, "a finite positive number")
        self._check("lr_last", 0 <= self.lr_last <= 1, "0 to 1")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, "a finite number >= 0")
        self._check("seed", 0 <= self.seed <= LARGEST_SEED, f"0 to {LARGEST_SEED}")
        self._check("device", re.fullmatch(r"cpu|cuda(:\d+)?", self.device) is not None, "cpu or cuda")
        self._check("device", self.device == "cpu" or torch.cuda.is_available(), "cpu, since torch finds no GPU")
        self._check("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._check("parallel", self.parallel in PARALLEL, f"one of {', '.join(PARALLEL)}")
        for path in self.text:
            self._check("text", path.exists(), "a file or a folder", path)
            read = path.is_dir() and Path(os.path.realpath(self.out)).is_relative_to(os.path.realpath(path))
            self._check("out", not read, f"a folder outside of --text {path}, where every file is text")
        if self.config is not None:
            self._check("config", self.config.is_file(), "a file")

    def _check(self, name: str, fits: bool, expected: str, value: object = None) -> None:
        if not fits:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is {getattr(self, name) if value is None else value}, expected {expected}")

    def check_world(self, world: World) -> None:
        """Every rank has as many rows of a step, in as many equal parts."""
        parts = world.size * self.accumulate
        told = f"a multiple of {parts}: {world.size} processes times --accumulate {self.accumulate}"
        self._check("batch", self.batch % parts == 0, told)

    def deciding(self) -> dict:
        """What decides the result of a run, up to rounding. A run that is resumed agrees on it."""
        return {name: getattr(self, name) for name in DECIDING}
