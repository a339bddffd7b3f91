"""The chunkwise forward on pools of states: where it starts from, what it leaves behind, and what counts as null."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .chunk_fwd import key_first, run_chunks
from .inputs import Transforms

CHUNK = 64  # checkpoints are multiples of this apart


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    state_pool: Tensor,
    slot_of: Tensor | None,
    initial_slot_of: Tensor | None,
    has_initial_state: Tensor | None,
    checkpoint_pool: Tensor | None,
    checkpoint_slots: Tensor | None,
    cu_seqlens: Tensor | None,
    workspace: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    use_gate: bool,
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    state_v_first: bool,
    zero_is_null: bool,
    checkpoint_interval: int,
    batch_invariant: bool,
) -> Tensor:
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    sequences = q.shape[0] if bounds is None else len(bounds) - 1
    lengths = [q.shape[1]] * sequences if bounds is None else [e - b for b, e in itertools.pairwise(bounds)]
    pool = key_first(state_pool, state_v_first)
    final_slots = _slots(slot_of, sequences, pool, zero_is_null)
    null = [slot_of is not None and slot < 0 for slot in final_slots]
    initial_slots = final_slots if initial_slot_of is None else _slots(initial_slot_of, sequences, pool, zero_is_null)
    has_initial = [True] * sequences if has_initial_state is None else has_initial_state.tolist()

    initial = q.new_zeros(sequences, *pool.shape[1:], dtype=torch.promote_types(pool.dtype, torch.float32))
    for n, slot in enumerate(initial_slots):
        if slot >= 0 and has_initial[n]:
            initial[n] = pool[slot]
    transforms = Transforms(use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval, lower_bound)
    streams, keep = (q, k, v, g, beta, A_log, dt_bias), checkpoint_slots is not None
    o, final, states = run_chunks(streams, transforms, initial, cu_seqlens, scale, CHUNK, keep, batch_invariant)
    for n in itertools.compress(range(sequences), null):
        (o[n] if bounds is None else o[0, bounds[n] : bounds[n + 1]]).zero_()

    if checkpoint_slots is not None:
        to = pool if checkpoint_pool is None else key_first(checkpoint_pool, state_v_first)
        boundary = _Boundaries(states.flatten(0, 1), final, lengths)
        for n in itertools.filterfalse(null.__getitem__, range(sequences)):
            for j, slot in enumerate(_slots(checkpoint_slots[n], checkpoint_slots.shape[1], to, zero_is_null)):
                tokens = (j + 1) * checkpoint_interval
                if slot >= 0 and tokens <= lengths[n]:
                    to[slot] = boundary.state(n, tokens).to(to.dtype)
    for n, slot in enumerate(final_slots):
        if slot >= 0:
            pool[slot] = final[n].to(pool.dtype)
    return o


def _slots(indices: Tensor | None, count: int, pool: Tensor, zero_is_null: bool) -> list[int]:
    """-1 for the null slot: below zero, zero by option, or beyond the pool."""
    if indices is None:
        return list(range(count))
    return [slot if zero_is_null <= slot < pool.shape[0] else -1 for slot in indices.tolist()]


class _Boundaries:
    """The states at multiples of a chunk: those before a chunk, and the final one where the sequence ends there."""

    def __init__(self, before_chunks: Tensor, final: Tensor, lengths: list[int]):
        self._before_chunks, self._final, self._lengths = before_chunks, final, lengths
        self._first = list(itertools.accumulate((-(-n // CHUNK) for n in lengths), initial=0))

    def state(self, n: int, tokens: int) -> Tensor:
        return self._final[n] if tokens == self._lengths[n] else self._before_chunks[self._first[n] + tokens // CHUNK]
