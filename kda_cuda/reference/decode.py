"""A few tokens on top of a pool of states, token by token, and the bookkeeping of the pool.

The recurrence itself (docs/mathematics.md, section 1):

S'_t = Diag(exp g_t) S_{t-1},   u_t = beta_t (v_t - S'_t^T k_t),   S_t = S'_t + k_t u_t^T,   o_t = scale S_t^T q_t
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .chunk_fwd import key_first
from .gates import compute_dtype
from .inputs import Inputs, Transforms
from .layout import ChunkLayout


@dataclass(frozen=True)
class Slots:
    """Where the states of the sequences lie in a pool, ``[slots, HV, K, V]`` or ``[slots, HV, V, K]``."""

    pool: Tensor
    indices: Tensor | None  # [N] or [N, columns]; None: sequence n has slot n
    value_first: bool
    zero_is_null: bool
    sequences: int

    def at(self, column: int | Tensor) -> Tensor:
        """Slots of all sequences, -1 where null."""
        if self.indices is None:
            return torch.arange(self.sequences, device=self.pool.device)
        table = self.indices.reshape(self.sequences, -1).long()
        if isinstance(column, int):
            if column >= table.shape[1]:
                return table.new_full((self.sequences,), -1)
            slots = table[:, column]
        else:
            slots = table.gather(1, column.long().clamp(0, table.shape[1] - 1).unsqueeze(1)).squeeze(1)
        null = (slots < 0) | (slots >= self.pool.shape[0])
        if self.zero_is_null:
            null |= slots == 0
        return slots.masked_fill(null, -1)

    def read(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """``[N, HV, K, V]``; zero where null."""
        present = slots >= 0
        states = key_first(self.pool, self.value_first)[slots[present]].to(dtype)
        if bool(present.all()):
            return states
        everything = states.new_zeros(self.sequences, *states.shape[1:])
        everything[present] = states
        return everything

    def write(self, slots: Tensor, states: Tensor) -> None:
        present = slots >= 0
        key_first(self.pool, self.value_first)[slots[present]] = states[present].to(self.pool.dtype)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    out: Tensor,
    state: Tensor | None,
    slot_of: Tensor | None,
    new_state: Tensor | None,
    new_slot_of: Tensor | None,
    num_accepted_tokens: Tensor | None,
    cu_seqlens: Tensor | None,
    parent_token: Tensor | None,
    record_k: Tensor | None,
    record_u: Tensor | None,
    record_g: Tensor | None,
    scale: float,
    use_qk_l2norm: bool,
    use_gate: bool,
    use_beta_sigmoid: bool,
    allow_neg_eigval: bool,
    lower_bound: float | None,
    state_v_first: bool,
    in_place: bool,
    state_per_token: bool,
    zero_is_null: bool,
) -> None:
    layout = _one_chunk_per_sequence(q, cu_seqlens)
    transforms = Transforms(use_qk_l2norm, use_gate, use_beta_sigmoid, allow_neg_eigval, lower_bound)
    x = transforms.apply(layout, q, k, v, g, beta, A_log, dt_bias)
    sequences = layout.sequences
    live = torch.ones(sequences, dtype=torch.bool, device=q.device)
    if state is None:
        s = x.v.new_zeros(sequences, v.shape[2], q.shape[-1], v.shape[-1])
    else:
        pool = Slots(state, slot_of, state_v_first, zero_is_null, sequences)
        slots = pool.at(0 if num_accepted_tokens is None else num_accepted_tokens - 1)
        live, s = slots >= 0, pool.read(slots, x.v.dtype)
    target = None
    if in_place:
        target = Slots(state, slot_of, state_v_first, zero_is_null, sequences)
    elif new_state is not None:
        target = Slots(new_state, new_slot_of, state_v_first, zero_is_null, sequences)

    lengths = _lengths(q, cu_seqlens)
    live_chunks = layout.sorted_states(live)[: layout.chunks]
    s = layout.sorted_states(s)
    o, u = torch.empty_like(x.v), torch.empty_like(x.v)
    parents = None if parent_token is None else _parents(layout, parent_token)
    for t in _steps(x, s[: layout.chunks], parents, scale, o, u):  # empty sequences come last and keep their state
        if target is not None and state_per_token:
            target.write(target.at(t).masked_fill(~live | (t >= lengths), -1), layout.natural_states(s))
    o[~live_chunks] = 0
    out.copy_(layout.to_tokens(o, out.dtype))
    if target is not None and not state_per_token:
        target.write(target.at(0).masked_fill(~live, -1), layout.natural_states(s))
    if record_k is not None:
        rows = layout.to_tokens(live_chunks.reshape(-1, 1, 1).expand(-1, 1, layout.chunk), torch.bool)[..., 0]
        group = v.shape[2] // q.shape[2]
        for record, value in ((record_k, x.k[:, ::group]), (record_u, u), (record_g, x.g)):
            record[rows] = layout.to_tokens(value, record.dtype)[rows]


def decode_commit(
    state: Tensor,
    slot_of: Tensor | None,
    new_state: Tensor | None,
    new_slot_of: Tensor | None,
    record_k: Tensor,
    record_u: Tensor,
    record_g: Tensor,
    num_accepted_tokens: Tensor | None,
    cu_seqlens: Tensor | None,
    parent_token: Tensor | None,
    accepted_token: Tensor | None,
    state_v_first: bool,
    zero_is_null: bool,
) -> None:
    layout = _one_chunk_per_sequence(record_k, cu_seqlens)
    sequences, dtype = layout.sequences, compute_dtype(record_k.dtype)
    source = Slots(state, slot_of, state_v_first, zero_is_null, sequences)
    target = source
    if new_state is not None:
        target = Slots(new_state, new_slot_of, state_v_first, zero_is_null, sequences)
    slots = source.at(0)
    s = layout.sorted_states(source.read(slots, dtype))
    lengths = layout.sorted_states(_lengths(record_k, cu_seqlens))[: layout.chunks]
    if parent_token is None:
        accepted = torch.minimum(layout.sorted_states(num_accepted_tokens.long())[: layout.chunks], lengths)
        path = torch.arange(layout.chunk, device=state.device).expand(layout.chunks, -1)
    else:
        last = torch.minimum(layout.sorted_states(accepted_token.long())[: layout.chunks], lengths - 1)
        path, accepted = _paths(_parents(layout, parent_token), last)
    group = record_u.shape[2] // record_k.shape[2]
    k, u, g = (layout.to_chunks(layout.owned(record), dtype) for record in (record_k, record_u, record_g))
    k, decay = k.repeat_interleave(group, dim=1), g.exp()
    active, rows = s[: layout.chunks], torch.arange(layout.chunks, device=state.device)
    for i in range(path.shape[1] if layout.chunks else 0):
        k_t, u_t, decay_t = (y[rows, :, path[:, i]] for y in (k, u, decay))
        after = active * decay_t.unsqueeze(-1) + k_t.unsqueeze(-1) * u_t.unsqueeze(-2)
        taken = (i < accepted).reshape(-1, 1, 1, 1)
        active.copy_(torch.where(taken, after, active))
    target.write(target.at(0).masked_fill(slots < 0, -1), layout.natural_states(s))


def _steps(x: Inputs, s: Tensor, parents: Tensor | None, scale: float, o: Tensor, u: Tensor) -> Iterator[int]:
    """Brings the states ``s [chunks, HV, K, V]`` forward in place and fills ``o`` and ``u``; after every token, t.

    With ``parents [chunks, C]``, ``s`` becomes the state after token t from that after its parent.
    """
    if not len(s):
        return
    kept, rows = [] if parents is None else [s.clone()], range(len(s))  # the states after tokens -1, 0, ...
    decay = x.g.exp().unsqueeze(-1)
    q, k, v, beta = (scale * x.q).unsqueeze(-2), x.k.unsqueeze(-2), x.v.unsqueeze(-2), x.beta.unsqueeze(-1)
    for t in range(x.v.shape[2]):
        if parents is not None:
            s.copy_(torch.stack([kept[i + 1][n] for n, i in zip(rows, parents[:, t].tolist(), strict=True)]))
        s *= decay[:, :, t]
        u_t = beta[:, :, t] * (v[:, :, t] - k[:, :, t] @ s)
        s += k[:, :, t].transpose(-1, -2) * u_t
        o[:, :, t], u[:, :, t] = (q[:, :, t] @ s).squeeze(-2), u_t.squeeze(-2)
        if parents is not None:
            kept.append(s.clone())
        yield t


def _parents(layout: ChunkLayout, parent_token: Tensor) -> Tensor:
    """``[chunks, C]``: of every token the one before it, or -1; inside the sequence, whatever ``parent_token`` has."""
    parents = layout.to_chunks(layout.owned(parent_token).unsqueeze(-1), torch.int64)[:, 0]
    return torch.minimum(parents, torch.arange(layout.chunk, device=parents.device) - 1).clamp(min=-1)


def _paths(parents: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens on the way from the root of every tree to ``last [chunks]``, and how many they are."""
    paths = []
    for row, t in zip(parents.tolist(), last.tolist(), strict=True):
        path = []
        while t >= 0:
            path.append(t)
            t = row[t]
        paths.append(torch.tensor(path[::-1], dtype=torch.int64, device=parents.device))
    counts = torch.tensor([len(path) for path in paths], device=parents.device)
    return torch.nn.utils.rnn.pad_sequence(paths, batch_first=True) if paths else parents, counts


def _one_chunk_per_sequence(x: Tensor, cu_seqlens: Tensor | None) -> ChunkLayout:
    """All sequences step together: those that end early see padding, which leaves their state alone."""
    batch, tokens = x.shape[:2]
    longest = tokens if cu_seqlens is None else int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    return ChunkLayout(batch, tokens, max(longest, 1), cu_seqlens, x.device)


def _lengths(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    if cu_seqlens is None:
        return torch.full((x.shape[0],), x.shape[1], device=x.device)
    return (cu_seqlens[1:] - cu_seqlens[:-1]).long()
