"""The steps of a training run, from where it stands."""

from __future__ import annotations

import json
import math
import os
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ..nn.decoder import CausalLM
from . import checkpoints, metrics
from .options import Options
from .progress import Progress
from .ranks import World, compile_blocks, on_first_rank, spread
from .steps import adamw, descend, learning_rate, mean_loss
from .text import NO_TARGET, Corpus, PackedRows, validation_windows

__all__ = ["Run", "settings_of_run"]

EVALUATED_ROWS = 8  # windows of the validation text that go through the model at a time, at most


def settings_of_run(config: dict, corpus: Corpus, o: Options) -> dict:
    """What decides the result of a run, as JSON: its options, its model and its text."""
    sums = [zlib.crc32(part.numpy()) for part in (corpus.train, corpus.begins, corpus.validation)]
    settings = {**o.deciding(), "config": config, "text": f"{len(corpus.train)} tokens with check sums {sums}"}
    return json.loads(json.dumps(settings))


class Run:
    """A model in training, on all ranks.

    Args:
        model: on the CPU, with equal weights on every rank. It is trained in place.
        config: of the model, as JSON.
        corpus: of every rank alike.
        o: the options.
        world: this rank's place.

    Raises:
        ValueError: there are checkpoints and ``resume`` is not asked for, or theirs is another run.
    """

    def __init__(self, model: CausalLM, config: dict, corpus: Corpus, o: Options, world: World):
        o.check_world(world)
        self.o, self.world, self.corpus = o, world, corpus
        self.settings = settings_of_run(config, corpus, o)
        self.rows = PackedRows(corpus, o.tokens, o.seed)
        model.recompute_blocks(o.recompute)
        if o.compile:
            compile_blocks(model, o.compile)
        self.held_out = validation_windows(corpus.validation, o.tokens, world.device)
        found = self._checkpoint()
        self.model = spread(model, world, o.parallel)
        self.optimizer = adamw(self.model, o.weight_decay)
        self.done = 0 if found is None else checkpoints.load(found, self.model, self.optimizer, world)

    @property
    def folder(self) -> Path:
        """Of the checkpoints."""
        return self.o.out / "checkpoints"

    def _checkpoint(self) -> Path | None:
        """From which the run goes on; None: it begins."""
        found = checkpoints.latest(self.folder)
        if found is None:
            return None
        if not self.o.resume:
            raise ValueError(
                f"kda_cuda.train: --out {self.o.out} has {found.name}, expected --resume or another folder"
            )
        for name, value in checkpoints.settings_of(found).items():
            if self.settings.get(name) != value:
                option = "--" + name.replace("_", "-")
                raise ValueError(
                    f"kda_cuda.train: {option} is {self.settings.get(name)}, expected {value} as in {self.folder}"
                )
        return found

    def train(self) -> list[dict]:
        """Does the steps that are left; returns the lines of all steps (on rank 0, elsewhere those of this process).

        Raises:
            OSError: a file cannot be written. The checkpoints that were there are left.
            FloatingPointError: the loss or the norm of its gradients is not finite. No checkpoint has that step.
        """
        o, first = self.o, self.world.rank == 0
        log: list[metrics.Metrics] = []
        on_first_rank(lambda: self._open(log))
        rows = log[0].rows if first else []
        progress = Progress(o.steps, self.done)
        try:
            for step in range(self.done, o.steps):
                row = self._step(step)
                if first:
                    log[0].write(row)
                    validation = f", validation {row['validation_loss']:.3f}" if "validation_loss" in row else ""
                    progress.show(step + 1, f"loss {row['loss']:.3f}{validation} nats/token")
                else:
                    rows.append(row)
                self.done = step + 1
                if self._is_due(o.save_every):
                    where = (self.folder, self.done, self.model, self.optimizer)
                    checkpoints.save(*where, self.settings, self.world, o.keep)
        finally:
            if log:
                log[0].close()
        return rows

    def _open(self, log: list[metrics.Metrics]) -> None:
        self.o.out.mkdir(parents=True, exist_ok=True)
        log.append(metrics.Metrics(self.o.out / "metrics.jsonl", self.done))

    def _is_due(self, every: int) -> bool:
        return self.done % every == 0 or self.done == self.o.steps

    def _step(self, step: int) -> dict:
        """One step; returns its line. On every rank alike, up to the time."""
        o, begin = self.o, time.perf_counter()
        lr = learning_rate(step, o.steps, o.lr, o.warm_up, o.lr_last)
        loss = _finite("loss", float(self._backward(step)), step)
        norm = _finite("gradient norm", float(descend(self.model, self.optimizer, lr, o.clip)), step)
        seconds, tokens = time.perf_counter() - begin, o.batch * o.tokens
        row = {"step": step + 1, "tokens": (step + 1) * tokens, "loss": loss, "lr": lr, "gradient_norm": norm}
        row["tokens_per_second"] = round(tokens / seconds, 1)
        if (step + 1) % o.evaluate_every == 0 or step + 1 == o.steps:
            with self._autocast():
                rows = min(EVALUATED_ROWS, o.batch // self.world.size // o.accumulate)
                row["validation_loss"] = float(mean_loss(self.model, self.held_out, rows))
        return row

    def _backward(self, step: int) -> Tensor:
        """The mean loss of the targets of all ranks, 0-d; its gradients are then there."""
        o, world = self.o, self.world
        numbers = range(step * o.batch, (step + 1) * o.batch)
        targets = max(1, self.rows.targets_in(numbers))
        own, share = len(numbers) // world.size, len(numbers) // world.size // o.accumulate
        loss = torch.zeros((), device=world.device)
        for first in range(world.rank * own, (world.rank + 1) * own, share):
            batch = self.rows.batch(numbers[first : first + share]).to(world.device)
            with self._autocast():
                logits = self.model(batch.inputs, cu_seqlens=batch.cu_seqlens).float().flatten(0, 1)
                total = F.cross_entropy(logits, batch.targets, ignore_index=NO_TARGET, reduction="sum")
            (total * (world.size / targets)).backward()  # FSDP2 and DDP average over ranks
            loss += total.detach() / targets
        return world.total(loss)

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.o.dtype)
        return torch.autocast(self.world.device.type, dtype, enabled=dtype != torch.float32)

    def finish(self, whole: CausalLM, rows: list[dict]) -> None:
        """Writes the picture of the lines, and the weights of all ranks as one model.

        Args:
            whole: the model on ``meta``. With ``save_pretrained`` it is saved by that, otherwise as ``model.pt``.
        """
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = get_model_state_dict(self.model, options=options)
        on_first_rank(lambda: _write(self.o.out, whole, weights, rows))


def _finite(name: str, value: float, step: int) -> float:
    if not math.isfinite(value):
        raise FloatingPointError(f"kda_cuda.train: the {name} of step {step + 1} is {value}, expected a finite number")
    return value


def _write(out: Path, whole: CausalLM, weights: dict[str, Tensor], rows: list[dict]) -> None:
    written = "model.pt"
    if hasattr(whole, "save_pretrained"):
        written = "model"
        whole.load_state_dict(weights, assign=True)
        whole.save_pretrained(out / written)
    else:
        torch.save({"config": vars(whole.config), "weights": weights}, out / "model.new")
        os.replace(out / "model.new", out / written)
    drawn = "curves.png" if metrics.draw(out / "curves.png", rows) else "no picture: matplotlib is not installed"
    print(f"wrote {out / written}, metrics.jsonl; {drawn}")
