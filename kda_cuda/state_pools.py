"""Checks of state pools, the slots of sequences in them, and draft records, on behalf of decode, commit and prefill."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import INDEX_DTYPES, Checker
from .reference.gates import compute_dtype

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of every pool, unless q is float64


@dataclass(frozen=True)
class StatePools:
    """Checks pools and indices of one call."""

    c: Checker
    owner: Tensor  # whose device they must share
    sequences: int
    sizes: dict[str, int]  # of a slot: HV, V, K in the order of the layout

    def check(self, name: str, pool: Tensor | None, indices_name: str, indices: Tensor | None, ranks=(1, 2)) -> None:
        c = self.c
        if pool is None:
            if indices is not None:
                raise c.value_error(f"{indices_name} is given and {name} is None, expected both")
            return
        self.check_pool(name, pool, self.sequences if indices is None else None)
        if indices is not None:
            self.check_indices(indices_name, indices, ranks)

    def check_pool(self, name: str, pool: Tensor, slots: int | None = None) -> None:
        """``slots``: how many, if that is fixed."""
        c = self.c
        c.tensor(name, pool)
        c.device(name, pool, self.owner.device, "q")
        c.rank(name, pool, ", ".join(("slots", *self.sizes)))
        c.dtype(name, pool, (torch.float64,) if self.owner.dtype == torch.float64 else STATE_DTYPES)
        c.shape(name, pool, slots=pool.shape[0] if slots is None else slots, **self.sizes)
        if pool.numel() and not pool[0].is_contiguous():
            raise c.value_error(f"{name} has strides {list(pool.stride())}, expected every slot contiguous")
        if pool.shape[0] > 1 and pool.stride(0) < (size := math.prod(pool.shape[1:])):
            raise c.value_error(
                f"{name} has strides {list(pool.stride())}, expected slots {size} elements apart or more"
            )

    def check_indices(self, name: str, indices: Tensor, ranks=(1, 2)) -> None:
        c, n = self.c, self.sequences
        c.tensor(name, indices)
        c.device(name, indices, self.owner.device, "q")
        forms = " or ".join("[N]" if rank == 1 else "[N, columns]" for rank in ranks)
        if indices.dim() not in ranks:
            raise c.value_error(f"{name} has shape {list(indices.shape)}, expected {forms}")
        c.dtype(name, indices, INDEX_DTYPES)
        if indices.shape[0] != n:
            raise c.value_error(f"{name} has shape {list(indices.shape)}, expected {forms} with N={n}")
        if indices.dim() == 2 and (indices.shape[1] == 0 or (indices.shape[1] > 1 and indices.stride(1) != 1)):
            raise c.value_error(
                f"{name} has shape {list(indices.shape)} and strides {list(indices.stride())}, "
                "expected at least one column, and columns side by side"
            )


@dataclass(frozen=True)
class PoolContents:
    """Reads indices into pools that :class:`StatePools` has checked."""

    c: Checker
    sequences: int

    def check(
        self,
        state,
        slot_of,
        accepted,
        written,
        names: tuple[str, str],
        written_indices,
        per_token: bool,
        zero_is_null: bool,
        tree: bool = False,
    ) -> tuple[list[bool], list[bool]]:
        """The indices are in range, and no state is written by one sequence and touched by another.

        ``names``: of the indices of ``state`` and of ``written``. A sequence that starts from a null slot is padding:
        nothing else of it is looked at. ``tree``: every path starts from the state anew, so it must not be written.
        Returns which sequences are none of these, and which write a state.
        """
        null_until = 1 if zero_is_null else 0
        starts: list[int | None] = [None] * self.sequences  # a slot of ``state``; -1: null
        if state is not None:
            starts = self._starts(names[0], state, slot_of, accepted, null_until)
        live, writes = [start != -1 for start in starts], [False] * self.sequences
        if written is None:
            return live, writes
        owner: dict[int, int] = {}
        if state is not None and state.untyped_storage().data_ptr() == written.untyped_storage().data_ptr():
            owner = {slot: n for n, slot in enumerate(starts) if slot >= 0}
        kept = frozenset(owner if tree else ())
        for n, row in enumerate(self._table(written_indices)):
            if starts[n] == -1:
                continue
            self._check_slots(names[1], written, n, row)
            for slot in (slot for slot in (row if per_token else row[:1]) if slot >= null_until):
                writes[n] = True
                if slot in kept:
                    raise self.c.value_error(
                        f"{names[1]} has slot {slot} for sequence {n}, expected no slot that a tree starts from"
                    )
                other = owner.setdefault(slot, n)
                if other != n:
                    pair = " and ".join(map(str, sorted((n, other))))
                    raise self.c.value_error(f"{names[1]} has slot {slot} for sequences {pair}, expected one each")
        return live, writes

    def _starts(self, name: str, state: Tensor, slot_of, accepted, null_until: int) -> list[int]:
        """The slot that each sequence starts from, -1 where it is null; the others' indices are in range."""
        rows = self._table(slot_of)
        counts = [1] * self.sequences if accepted is None else accepted.tolist()
        starts = [-1] * self.sequences
        for n, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if max(row) < null_until:
                continue
            if accepted is not None and not 1 <= count <= len(row):
                raise self.c.value_error(f"num_accepted_tokens[{n}] is {count}, expected 1 to {len(row)}")
            if row[count - 1] >= null_until:
                self._check_slots(name, state, n, row)
                starts[n] = row[count - 1]
        return starts

    def _table(self, indices: Tensor | None) -> list[list[int]]:
        return [[n] for n in range(self.sequences)] if indices is None else indices.reshape(self.sequences, -1).tolist()

    def _check_slots(self, name: str, pool: Tensor, n: int, row: list[int]) -> None:
        if max(row) >= pool.shape[0]:
            expected = f"less than slots={pool.shape[0]}"
            raise self.c.value_error(f"{name} has {max(row)} for sequence {n}, expected {expected}")


def check_slots(c: Checker, sequences: int, *given) -> tuple[list[bool], list[bool]]:
    """:meth:`PoolContents.check`, for :meth:`Checker.look`."""
    return PoolContents(c, sequences).check(*given)


def check_drafts(
    c: Checker,
    sequences: int,
    state,
    slot_of,
    accepted,
    written,
    names,
    indices,
    per_token: bool,
    zero_is_null: bool,
    parents: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """What ``decode`` reads: slots, and the parents of a tree of drafts."""
    tree = parents is not None
    live, _ = check_slots(
        c, sequences, state, slot_of, accepted, written, names, indices, per_token, zero_is_null, tree
    )
    if tree:
        check_parent_contents(c, parents, cu_seqlens, live)


def check_slots_and_accepted(
    c: Checker,
    sequences: int,
    state,
    slot_of,
    written,
    names,
    indices,
    zero_is_null: bool,
    accepted: Tensor,
    tokens: int,
    cu_seqlens: Tensor | None,
    parents: Tensor | None,
) -> None:
    """What ``commit`` reads: slots, how much is accepted, and the parents of a tree of drafts."""
    tree = parents is not None
    _, commits = check_slots(c, sequences, state, slot_of, None, written, names, indices, False, zero_is_null)
    check_accepted(c, accepted, tokens, cu_seqlens, commits, tree)
    if tree:
        check_parent_contents(c, parents, cu_seqlens, commits)


def check_accepted(
    c: Checker, accepted: Tensor, tokens: int, cu_seqlens: Tensor | None, commits: list[bool], tree: bool = False
) -> None:  # fmt: skip
    """No sequence that writes a state, as ``commits`` says, accepts more tokens than it has. ``tree``: ``accepted`` are
    their last ones."""
    name, least = ("accepted_token", -1) if tree else ("num_accepted_tokens", 0)
    rows = _rows(len(commits), tokens, cu_seqlens)
    for n, (value, (_, _, length)) in enumerate(zip(accepted.tolist(), rows, strict=True)):
        if commits[n] and not least <= value <= length + least:
            raise c.value_error(f"{name}[{n}] is {value}, expected {least} to {length + least}")


def check_parents(c: Checker, parents: Tensor, k: Tensor) -> None:
    """One index for each token of ``k`` ``[B, T, H, K]``."""
    c.tensor("parent_token", parents)
    c.device("parent_token", parents, k.device, "q")
    c.rank("parent_token", parents, "B, T")
    c.dtype("parent_token", parents, INDEX_DTYPES)
    c.shape("parent_token", parents, B=k.shape[0], T=k.shape[1])
    if parents.shape[1] > 1 and parents.stride(1) != 1:
        raise c.value_error(
            f"parent_token has strides {list(parents.stride())}, expected the last dimension contiguous"
        )


def check_parent_contents(c: Checker, parents: Tensor, cu_seqlens: Tensor | None, live: list[bool]) -> None:
    """In sequences that are ``live``, every token comes after its parent."""
    rows = parents.tolist()
    for n, (row, begin, length) in enumerate(_rows(len(live), parents.shape[1], cu_seqlens)):
        for t, parent in enumerate(rows[row][begin : begin + length] if live[n] else ()):
            if not -1 <= parent < t:
                expected = "-1" if t == 0 else f"-1 to {t - 1}"
                raise c.value_error(f"parent_token is {parent} for token {t} of sequence {n}, expected {expected}")


def _rows(sequences: int, tokens: int, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """Batch row, first token and number of tokens of every sequence."""
    if cu_seqlens is None:
        return [(n, 0, tokens) for n in range(sequences)]
    return [(0, begin, end - begin) for begin, end in itertools.pairwise(cu_seqlens.tolist())]


def check_like(c: Checker, name: str, x: Tensor, owner: Tensor, dtype: torch.dtype, sizes: dict[str, int]) -> None:
    """A buffer to write to, whose rows are contiguous."""
    c.tensor(name, x)
    c.device(name, x, owner.device, "q")
    c.rank(name, x, ", ".join(sizes))
    c.dtype(name, x, (dtype,))
    c.shape(name, x, **sizes)
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise c.value_error(f"{name} has strides {list(x.stride())}, expected the last dimension contiguous")


def check_records(c: Checker, records, q: Tensor | None = None, v: Tensor | None = None) -> None:
    """Contiguous buffers of one width; those of drafts like ``q`` and ``v`` where these are given."""
    if not isinstance(records, tuple) or len(records) != 3:
        raise c.type_error(f"records is a {type(records).__name__}, expected DraftRecords")
    k, u, _ = records
    for name, x in zip(("records.k", "records.u"), (k, u), strict=True):
        c.tensor(name, x)
        c.rank(name, x, "B, T, H, K" if name == "records.k" else "B, T, HV, V")
    q, v = (k, u) if q is None else (q, v)
    batch, tokens, heads, key_dim = q.shape
    shapes = {
        "records.k": {"B": batch, "T": tokens, "H": heads, "K": key_dim},
        "records.u": {"B": batch, "T": tokens, "HV": v.shape[2], "V": v.shape[3]},
        "records.g": {"B": batch, "T": tokens, "HV": v.shape[2], "K": key_dim},
    }
    for (name, sizes), x in zip(shapes.items(), records, strict=True):
        check_like(c, name, x, q, compute_dtype(q.dtype), sizes)
        if not x.is_contiguous():
            raise c.value_error(f"{name} has strides {list(x.stride())}, expected it contiguous")
