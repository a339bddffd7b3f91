"""Checks of state pools, the slots of sequences in them, and draft records, on behalf of decode, commit and prefill."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import INDEX_DTYPES, Checker
from .reference.gates import compute_dtype


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
        self.check_pool(name, pool, (torch.float32, torch.bfloat16), self.sequences if indices is None else None)
        if indices is not None:
            self.check_indices(indices_name, indices, ranks)

    def check_pool(self, name: str, pool: Tensor, dtypes: tuple[torch.dtype, ...], slots: int | None = None) -> None:
        """``dtypes``: of the states, unless q is float64; ``slots``: how many, if that is fixed."""
        c = self.c
        c.tensor(name, pool)
        c.device(name, pool, self.owner.device, "q")
        c.rank(name, pool, ", ".join(("slots", *self.sizes)))
        c.dtype(name, pool, (torch.float64,) if self.owner.dtype == torch.float64 else dtypes)
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

    def check_contents(
        self, state, slot_of, accepted, written, written_name: str, written_indices, per_token: bool,
        zero_is_null: bool,
    ) -> None:  # fmt: skip
        """Reads the indices: in range, and no state written by one sequence and touched by another."""
        if accepted is not None:
            check_range(self.c, "num_accepted_tokens", accepted, 1, slot_of.shape[1])
        read = None if state is None else self._table("slot_of", state, slot_of)
        if written is None:
            return
        table = self._table(written_name, written, written_indices)
        columns = range(len(table[0]) if table and per_token else 1)
        null_until = 1 if zero_is_null else 0
        owner: dict[int, int] = {}
        if read is not None and state.untyped_storage().data_ptr() == written.untyped_storage().data_ptr():
            first = [0] * self.sequences if accepted is None else [a - 1 for a in accepted.tolist()]
            owner = {row[i]: n for n, (row, i) in enumerate(zip(read, first, strict=True))}
        for n, row in enumerate(table):
            for slot in (row[i] for i in columns if row[i] >= null_until):
                other = owner.setdefault(slot, n)
                if other != n:
                    pair = " and ".join(map(str, sorted((n, other))))
                    raise self.c.value_error(f"{written_name} has slot {slot} for sequences {pair}, expected one each")

    def _table(self, name: str, pool: Tensor, indices: Tensor | None) -> list[list[int]]:
        if indices is None:
            return [[n] for n in range(self.sequences)]
        slots = pool.shape[0]
        rows = indices.reshape(self.sequences, -1).tolist()
        for n, row in enumerate(rows):
            if max(row) >= slots:
                raise self.c.value_error(f"{name} has {max(row)} for sequence {n}, expected less than slots={slots}")
        return rows


def check_range(c: Checker, name: str, x: Tensor, low: int, high: int) -> None:
    for n, value in enumerate(x.tolist()):
        if not low <= value <= high:
            raise c.value_error(f"{name}[{n}] is {value}, expected {low} to {high}")


def check_accepted(c: Checker, accepted: Tensor, tokens: int, cu_seqlens: Tensor | None) -> None:
    """No sequence accepts more tokens than it has."""
    if cu_seqlens is None:
        return check_range(c, "num_accepted_tokens", accepted, 0, tokens)
    for n, (value, length) in enumerate(zip(accepted.tolist(), cu_seqlens.diff().tolist(), strict=True)):
        if not 0 <= value <= length:
            raise c.value_error(f"num_accepted_tokens[{n}] is {value}, expected 0 to {length}")
    return None


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
