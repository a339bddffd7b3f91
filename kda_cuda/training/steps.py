"""The optimizer, its schedule, one step of it, and the loss on text that is not learned from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["adamw", "descend", "learning_rate", "mean_loss", "warm_up_steps"]


def adamw(model: nn.Module, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW. Matrices decay; norms, gates and other vectors do not. ``descend`` sets the learning rate."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def warm_up_steps(steps: int) -> int:
    """The default: a tenth of the run, at most 50 steps."""
    return max(1, min(50, steps // 10))


def learning_rate(step: int, steps: int, peak: float, warm_up: int, last: float = 0.1) -> float:
    """A line up to ``peak`` over ``warm_up`` steps, then a cosine down to ``last`` times ``peak``.

    Args:
        step: counted from 0, of ``steps``.
    """
    done = (step - warm_up) / max(1, steps - warm_up)
    middle, swing = (1 + last) / 2, (1 - last) / 2
    return peak * min((step + 1) / warm_up, middle + swing * math.cos(math.pi * max(0.0, done)))


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, lr: float, clip: float = 1.0) -> Tensor:
    """One step down the gradients, which are then cleared.

    Args:
        lr: the learning rate of the step.
        clip: the largest norm of all gradients together; longer ones are scaled down.

    Returns:
        The norm before clipping, 0-d. On several ranks it is that of the whole gradients.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


@torch.no_grad()
def mean_loss(model: nn.Module, batch: Tensor, rows: int) -> Tensor:
    """Cross entropy a token in nats, 0-d, of windows ``[n, tokens + 1]``; so many ``rows`` at a time."""
    total = torch.zeros((), device=batch.device)
    for part in batch.split(rows):
        total += F.cross_entropy(model(part[:, :-1]).float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
    return total / batch[:, 1:].numel()
