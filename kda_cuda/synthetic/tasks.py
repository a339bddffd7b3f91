"""Palindrome, MQAR and Stack: sequences whose answers show what a state can hold (Kimi Linear report, section 5.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import Checker

__all__ = ["IGNORED", "TASKS", "Batch", "Task"]

IGNORED = -100  # a target where nothing is asked, as torch's cross entropy has it


class Batch(NamedTuple):
    """Rows of one task."""

    tokens: Tensor  # int64 [rows, length]
    targets: Tensor  # int64 [rows, length]: the token that should follow, or IGNORED


@dataclass(frozen=True)
class Task:
    """One task at one length. Every row is drawn anew, so nothing can be learned by heart.

    Args:
        name: ``palindrome``: symbols, a separator, and the symbols backwards. Every symbol after the separator is
            asked for.
            ``mqar``: pairs of a key and its value. A row has an eighth of its length as keys, the i-th of them drawn in
            proportion to 1 / i, so some come often. The value of a key that was there before is asked for.
            ``stack``: operations on many stacks, three tokens each: push or pop, the stack, the symbol. Every symbol
            that is popped is asked for. Half of the operations are pops, if a stack has something to pop.
        length: tokens of a row at most; the last operation is whole.
        symbols: how many different symbols, or values, there are.
        keys: how many different keys ``mqar`` draws from, or how many stacks there are.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    name: str
    length: int
    symbols: int
    keys: int = 0

    def __post_init__(self):
        c = Checker("Task")
        c.choice("name", self.name, TASKS)
        for name in ("length", "symbols", "keys"):
            c.integer(name, getattr(self, name))
        least = TASKS[self.name].tokens
        if self.length < least:
            raise c.value_error(f"length is {self.length}, expected at least {least} for {self.name}")
        if self.symbols < 2:
            raise c.value_error(f"symbols is {self.symbols}, expected at least 2")
        needed = {"palindrome": 0, "mqar": own_keys(self.length), "stack": 1}[self.name]
        if self.keys < needed:
            raise c.value_error(f"keys is {self.keys}, expected at least {needed} for {self.name} of this length")

    @property
    def vocab_size(self) -> int:
        """Symbols come first, then keys or stacks, then separators."""
        return self.symbols + TASKS[self.name].other_tokens(self.keys)

    def batch(self, rows: int, generator: torch.Generator) -> Batch:
        """Rows on the device of ``generator``."""
        return TASKS[self.name].draw(self, rows, generator)


def palindrome(task: Task, rows: int, generator: torch.Generator) -> Batch:
    count = task.length // 2
    device = generator.device
    forth = torch.randint(task.symbols, (rows, count), generator=generator, device=device)
    separator = torch.full((rows, 1), task.symbols, device=device)
    back = forth.flip(1)
    tokens = torch.cat((forth, separator, back[:, :-1]), dim=1)
    return Batch(tokens, torch.cat((torch.full_like(forth, IGNORED), back), dim=1))


def own_keys(length: int) -> int:
    """How many keys a row of ``mqar`` has."""
    return max(1, length // 8)


def mqar(task: Task, rows: int, generator: torch.Generator) -> Batch:
    count, own, device = task.length // 2, own_keys(task.length), generator.device
    shuffled = torch.rand(rows, task.keys, generator=generator, device=device).argsort(dim=1)
    values = torch.randint(task.symbols, (rows, own), generator=generator, device=device)
    weights = 1 / torch.arange(1, own + 1, device=device, dtype=torch.float32)
    drawn = torch.multinomial(weights.expand(rows, own), count, replacement=True, generator=generator)
    keys, answers = task.symbols + shuffled.gather(1, drawn), values.gather(1, drawn)
    known = (drawn[:, :, None] == drawn[:, None, :]).tril(-1).any(-1)
    targets = torch.stack((torch.where(known, answers, IGNORED), torch.full_like(answers, IGNORED)), -1)
    return Batch(torch.stack((keys, answers), -1).flatten(1), targets.flatten(1))


def stack(task: Task, rows: int, generator: torch.Generator) -> Batch:
    count, device = task.length // 3, generator.device
    row = torch.arange(rows, device=device)
    held = torch.zeros(rows, task.keys, count, dtype=torch.int64, device=device)  # symbols, the oldest first
    heights = torch.zeros(rows, task.keys, dtype=torch.int64, device=device)
    draws = torch.rand(3, count, rows, task.keys, generator=generator, device=device)
    symbols = torch.randint(task.symbols, (count, rows), generator=generator, device=device)
    push, pop = task.symbols + task.keys, task.symbols + task.keys + 1
    tokens, targets = [], []
    for pushed, popped, coin, symbol in zip(*draws, symbols, strict=True):
        filled = heights > 0
        pops = filled.any(1) & (coin[:, 0] < 0.5)
        chosen = torch.where(pops, (popped * filled).argmax(1), pushed.argmax(1))
        height = heights[row, chosen]
        top = held[row, chosen, (height - 1).clamp(min=0)]
        place = height.clamp(max=count - 1)
        held[row, chosen, place] = torch.where(pops, held[row, chosen, place], symbol)
        heights[row, chosen] += torch.where(pops, -1, 1)
        tokens += [torch.where(pops, pop, push), task.symbols + chosen, torch.where(pops, top, symbol)]
        nothing = torch.full_like(top, IGNORED)
        targets += [nothing, torch.where(pops, top, nothing), nothing]
    return Batch(torch.stack(tokens, 1), torch.stack(targets, 1))


class Kind(NamedTuple):
    """What sets one task apart."""

    tokens: int  # that a row has at least
    other_tokens: Callable[[int], int]  # beside symbols, for so many keys
    draw: Callable[[Task, int, torch.Generator], Batch]


TASKS = {
    "palindrome": Kind(2, lambda keys: 1, palindrome),
    "mqar": Kind(4, lambda keys: keys, mqar),
    "stack": Kind(6, lambda keys: keys + 2, stack),
}
