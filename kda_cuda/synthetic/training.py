"""One run: a small model learns a task for a number of steps, and is asked rows that it has not seen."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..checks import Checker
from ..model import HybridConfig, HybridLM
from .models import VARIANTS
from .tasks import IGNORED, Batch, Task

__all__ = ["SOLVED", "Run", "Sizes", "accuracy", "learn", "new_model"]

SOLVED = 0.99  # share of right answers at which a run ends before its last step
HELD_OUT_SEED = 1 << 40  # of the rows that every run of a task is judged on
WEIGHT_DECAY, BETAS, WARM_UP, CLIP = 0.1, (0.9, 0.95), 0.1, 1.0


@dataclass(frozen=True)
class Sizes:
    """Of a model, and of its training: the same for all layers that are compared."""

    hidden_size: int = 256
    num_layers: int = 2
    num_heads: int = 2
    head_dim: int = 128
    batch: int = 64
    steps: int = 20000
    evaluations: int = 40
    held_out: int = 256

    def __post_init__(self):
        c = Checker("Sizes")
        for name, value in vars(self).items():
            c.integer(name, value)
            if value < 1:
                raise c.value_error(f"{name} is {value}, expected at least 1")


@dataclass(frozen=True)
class Run:
    """One cell of the grid: what is learned, by what, how fast, and from which seed."""

    task: Task
    variant: str
    lr: float
    seed: int

    def __post_init__(self):
        c = Checker("Run")
        c.choice("variant", self.variant, VARIANTS)
        c.integer("seed", self.seed)
        if not 0 < c.number("lr", self.lr) < 1:
            raise c.value_error(f"lr is {self.lr}, expected 0 < lr < 1")


def new_model(task: Task, variant: str, sizes: Sizes) -> HybridLM:
    """``sizes.num_layers`` blocks of this layer and a SwiGLU each, without full attention."""
    config = HybridConfig(
        vocab_size=task.vocab_size,
        hidden_size=sizes.hidden_size,
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        full_attention_every=sizes.num_layers + 1,
        intermediate_size=2 * sizes.hidden_size,
    )
    return HybridLM(config, VARIANTS[variant])


def loss_of(model: HybridLM, batch: Batch) -> torch.Tensor:
    """Cross entropy of the asked tokens alone; 0 where nothing is asked."""
    logits, targets = model(batch.tokens).float().flatten(0, 1), batch.targets.flatten()
    asked = (targets != IGNORED).sum().clamp(min=1)  # the mean of nothing would be no number
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / asked


@torch.no_grad()
def accuracy(model: HybridLM, batch: Batch, rows: int) -> float:
    """The share of asked tokens that the model finds, ``rows`` rows at a time."""
    asked = batch.targets != IGNORED
    found = torch.cat([model(tokens).argmax(-1) for tokens in batch.tokens.split(rows)])
    return float((found == batch.targets)[asked].double().mean())


def learn(run: Run, sizes: Sizes, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict:
    """Trains and judges; the result is a row of the report, ready for JSON.

    AdamW with a warm-up over the first tenth and a cosine to zero. Weights stay in fp32, and with another ``dtype`` the
    products run under autocast. A run ends when it finds ``SOLVED`` of the answers, at the latest after all steps.
    """
    begin = time.perf_counter()
    torch.manual_seed(run.seed)
    model = new_model(run.task, run.variant, sizes).to(device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    total = sizes.steps + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, run.lr, total_steps=total, pct_start=max(WARM_UP, 2 / total), cycle_momentum=False
    )
    generator = torch.Generator(device).manual_seed(run.seed)
    held_out = run.task.batch(sizes.held_out, torch.Generator(device).manual_seed(HELD_OUT_SEED))
    every = max(1, sizes.steps // sizes.evaluations)
    curve: list[list[float]] = []
    mixed = torch.autocast(device, dtype, enabled=dtype != torch.float32)
    for step in range(1, sizes.steps + 1):
        with mixed:
            loss = loss_of(model, run.task.batch(sizes.batch, generator))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == sizes.steps:
            with mixed:
                right = accuracy(model, held_out, sizes.batch)
            curve.append([step, round(right, 4), round(loss.item(), 4)])
            if right >= SOLVED:
                break
    solved = curve[-1][1] >= SOLVED
    row = {"task": run.task.name, "length": run.task.length, "symbols": run.task.symbols, "keys": run.task.keys}
    row |= {"variant": run.variant, "lr": run.lr, "seed": run.seed, "accuracy": curve[-1][1]}
    row |= {"solved_at": curve[-1][0] if solved else None, "seconds": round(time.perf_counter() - begin, 1)}
    return row | {"curve": curve}
