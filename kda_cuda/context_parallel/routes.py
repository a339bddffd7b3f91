"""Who holds which tokens, and how the sequences of one rank hang on to those of others. No tensor is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

LAYOUTS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Part:
    """Tokens of one rank that follow one another in the whole. A rank has one part, or two in the zigzag layout."""

    slot: int  # place among the parts of all ranks, in the order of tokens
    first: int  # the local sequences of the part: first to last, both included
    last: int
    before: int  # how many parts before this one hold tokens of its first sequence; 0: that begins here
    after: int  # how many parts after this one hold tokens of its last sequence; 0: that ends here
    past: int  # tokens of the first sequence in the parts before


@dataclass(frozen=True)
class Route:
    """What one rank knows of a call."""

    rank: int
    ranks: int
    parts: tuple[Part, ...]  # of this rank, in the order of its tokens
    bounds: tuple[int, ...]  # of the local sequences
    exchanges: bool  # whether any sequence lies on several ranks; the same on all of them

    @property
    def slots(self) -> int:
        return self.ranks * len(self.parts)

    def slot_order(self) -> list[int]:
        """For each slot, where it lies among what the ranks send, rank after rank and part after part."""
        if len(self.parts) == 1:
            return list(range(self.ranks))
        return [2 * s if s < self.ranks else 2 * (2 * self.ranks - 1 - s) + 1 for s in range(2 * self.ranks)]

    def first_tokens(self, part: Part) -> tuple[int, int]:
        """Where the first sequence of a part begins and ends among this rank's tokens."""
        return self.bounds[part.first], self.bounds[part.first + 1]

    def resumed(self) -> list[Part]:
        """The parts whose first sequence began on an earlier one."""
        return [part for part in self.parts if part.before]

    def continued(self) -> list[Part]:
        """The parts whose last sequence goes on."""
        return [part for part in self.parts if part.after]


class Piece(NamedTuple):
    """The sequences of one interval of tokens."""

    bounds: list[int]  # from 0
    sequences: list[int]  # which of the whole; -1: none, an empty sequence of its own
    before: int
    after: int
    past: int


def slots_of(rank: int, ranks: int, layout: str) -> tuple[int, ...]:
    """The slots of the parts of a rank."""
    return (rank,) if layout == "contiguous" else (rank, 2 * ranks - 1 - rank)


def even_lengths(tokens: int, parts: int) -> list[int]:
    """As ``torch.tensor_split`` does it: the first ``tokens % parts`` have one token more."""
    return [tokens // parts + (i < tokens % parts) for i in range(parts)]


def piece_of(cu_seqlens: Sequence[int], starts: Sequence[int], slot: int) -> Piece:
    """What of the sequences lies in the tokens ``starts[slot]`` to ``starts[slot + 1]``.

    An empty sequence belongs to the slot that has the token after it, or to the last slot with tokens.
    """
    begin, end, total = starts[slot], starts[slot + 1], starts[-1]
    has_rest = end == total and (begin < end or (total == 0 and slot == 0))
    own = [n for n in range(len(cu_seqlens) - 1) if _overlaps(cu_seqlens[n], cu_seqlens[n + 1], begin, end, has_rest)]
    if not own:
        return Piece([0, 0], [-1], 0, 0, 0)
    bounds = [min(max(cu_seqlens[n], begin), end) - begin for n in (*own, own[-1] + 1)]
    past, rest = max(0, begin - cu_seqlens[own[0]]), cu_seqlens[own[-1] + 1] > end
    before = slot - _slot_with(starts, cu_seqlens[own[0]]) if past else 0
    after = _slot_with(starts, cu_seqlens[own[-1] + 1] - 1) - slot if rest else 0
    return Piece(bounds, own, before, after, past)


def _overlaps(first: int, last: int, begin: int, end: int, has_rest: bool) -> bool:
    """Whether a sequence of tokens ``first`` to ``last`` has a place in those from ``begin`` to ``end``."""
    if first == last:
        return begin <= first < end or (has_rest and first == end)
    if begin == end:  # a slot without tokens, inside a sequence
        return first < begin < last
    return first < end and last > begin


def _slot_with(starts: Sequence[int], token: int) -> int:
    return next(slot for slot in range(len(starts) - 1) if starts[slot] <= token < starts[slot + 1])
