"""Decoding: a few tokens per sequence on top of a pool of states, speculative drafts, and their acceptance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import calls, variants
from .calls import Call
from .checks import Checker, check_cu_seqlens, empty_like
from .reference.gates import compute_dtype
from .schemas import Commit, Decode, Inputs
from .state_pools import (
    StatePools,
    check_drafts,
    check_like,
    check_parents,
    check_records,
    check_slots_and_accepted,
)

FEW_TOKENS = 16  # a sequence; up to here the recurrence is faster than a chunk
__all__ = ["DraftRecords", "commit", "decode"]


class DraftRecords(NamedTuple):
    """What :func:`commit` needs of draft tokens: ``S_t = Diag(e^g) S_{t-1} + k u^T``. fp32, float64 for float64.

    Source: Kimi Linear report, section 3, with the correction ``u`` of the delta rule named.

    Example:
        >>> import torch, kda_cuda
        >>> records = kda_cuda.DraftRecords.empty(torch.empty(2, 4, 1, 64), torch.empty(2, 4, 1, 64))
        >>> records.u.shape
        torch.Size([2, 4, 1, 64])
    """

    k: Tensor  # [B, T, H, K], normalised
    u: Tensor  # [B, T, HV, V], what was written to the state beside k
    g: Tensor  # [B, T, HV, K], log-decay

    @classmethod
    def empty(cls, k: Tensor, v: Tensor) -> DraftRecords:
        """Buffers for drafts like ``k`` ``[B, T, H, K]`` and ``v`` ``[B, T, HV, V]``."""
        dtype = compute_dtype(k.dtype)
        return cls(
            k.new_empty(k.shape, dtype=dtype),
            v.new_empty(v.shape, dtype=dtype),
            v.new_empty((*v.shape[:3], k.shape[3]), dtype=dtype),
        )


@calls.public
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    slot_of: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    new_state: Tensor | None = None,
    new_slot_of: Tensor | None = None,
    state_per_token: bool = False,
    zero_is_null: bool = False,
    cu_seqlens: Tensor | None = None,
    parent_token: Tensor | None = None,
    records: DraftRecords | None = None,
    out: Tensor | None = None,
):
    r"""One or a few tokens per sequence on top of its state, which is updated in place. Without gradients.

    .. math:: S_t = (I - \beta_t k_t k_t^T) Diag(e^{g_t}) S_{t-1} + \beta_t k_t v_t^T, \quad o_t = scale \, S_t^T q_t

    (Kimi Linear report, arXiv 2510.26692, section 3.) Made for up to 16 tokens; any number is served. Where ``out`` is
    given nothing is allocated, nothing synchronises, and the call can be captured in a CUDA graph and replayed with
    other contents of every tensor.

    Args:
        q, k: ``[B, T, H, K]``, K <= 256; fp32, fp16 or bf16 (float64 on the CPU); rows may be strided, such as views of
            one packed projection.
        v: ``[B, T, HV, V]``, HV a multiple of H; dtype of q.
        g: ``[B, T, HV, K]``, log-decay <= 0, or its pre-activation with ``use_gate_in_kernel``; dtype of q or fp32.
        beta: ``[B, T, HV]``, write strength, or its logit with ``use_beta_sigmoid_in_kernel``; dtype of q or fp32.
        state: ``[slots, HV, K, V]`` (``[slots, HV, V, K]`` with ``state_v_first``), fp32, bf16 or fp16 whatever q is
            (float64 with a float64 q), contiguous inside a slot. Read, and written unless ``new_state`` or ``records``
            is given; a 16-bit one is rounded when it is written. None: start from zero.
        A_log, dt_bias, scale, lower_bound: as in :func:`chunk_kda`.
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval: likewise.
        slot_of: int32 or int64 ``[N]`` or ``[N, columns]``: the slot of each of the N sequences; a negative
            index, or one beyond the pool, is a null slot: zero output, nothing written. Default: sequence n has slot n.
            A sequence that starts from a null slot is padding. Its ``num_accepted_tokens``, ``new_slot_of`` and tokens
            may be anything; none of them is looked at.
        num_accepted_tokens: ``[N]``, with ``slot_of [N, columns]``: start from the slot in column
            ``num_accepted_tokens - 1``, where the state after that many drafts was written (of a tree: after the token
            ``num_accepted_tokens - 1``). Default: column 0.
        new_state: a pool like ``state``, of its dtype, that is written in its place; ``state`` is then only read.
        new_slot_of: the slots in ``new_state``, as ``slot_of`` are those in ``state``.
        state_per_token: write the state after token t to column t of the written pool's indices (``[N, columns]``);
            otherwise the last one to column 0.
        zero_is_null: slot 0 is a null slot too.
        cu_seqlens: ``[N + 1]`` int32 or int64: B = 1 and sequence n is tokens ``cu_seqlens[n]`` to ``cu_seqlens[n+1]``.
            Tokens after the last sequence are padding: whatever they hold, their outputs are zero.
            Default: every batch row is a sequence.
        parent_token: int32 or int64 ``[B, T]``, draft trees: the token after which a token comes, counted from the
            first one of its sequence and before the token itself; -1: the first after ``state``. Every path from there
            gets, bit for bit, what it would get alone. With ``records``, or ``state_per_token`` and ``new_state``,
            or nothing to write; the slots that sequences start from must not be written then.
            Default: every token comes after the one before.
        records: filled for a later :func:`commit`; ``state`` is then only read.
        out: ``[B, T, HV, V]`` in the dtype of q; returned. Default: a new tensor.

    Returns:
        o, ``[B, T, HV, V]`` in the dtype of q.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Nothing has run then. The contents of
            index tensors (range, and two sequences that write one slot) are checked on the CPU, and on a GPU with
            KDA_CUDA_CHECK=1; a kernel never leaves the tensors, whatever they contain.

    Example:
        >>> import torch, kda_cuda
        >>> pool = torch.zeros(8, 2, 64, 64)  # eight slots, two heads
        >>> q, k, v = (torch.randn(3, 1, 2, 64) for _ in range(3))
        >>> g, beta = -torch.rand(3, 1, 2, 64), torch.rand(3, 1, 2)
        >>> slots = torch.tensor([5, 0, -1])  # the third sequence is padding
        >>> o = kda_cuda.decode(q, k, v, g, beta, pool, slot_of=slots, use_qk_l2norm_in_kernel=True)
        >>> o.shape, bool(o[2].any()), pool.flatten(1).any(1).tolist()
        (torch.Size([3, 1, 2, 64]), False, [True, False, False, False, False, True, False, False])
    """
    c = Checker("decode")
    transforms = calls.Transforms(
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    x = calls.common_arguments(
        c, q, k, v, g, beta, A_log, dt_bias, scale, transforms, lower_bound, state_v_first, cu_seqlens,
        state_per_token=state_per_token, zero_is_null=zero_is_null,
    )  # fmt: skip
    if calls.needs_grad(c, *x, state):
        raise c.value_error("an argument requires a gradient, expected none: decode has no gradients (use chunk_kda)")
    return decode_call(
        c, x, state=state, slot_of=slot_of, num_accepted_tokens=num_accepted_tokens, new_state=new_state,
        new_slot_of=new_slot_of, in_place=new_state is None and records is None, state_per_token=state_per_token,
        zero_is_null=zero_is_null, parent_token=parent_token, records=records, out=out,
    )  # fmt: skip


def decode_call(
    c: Checker, x: Inputs, *, state=None, slot_of=None, num_accepted_tokens=None, new_state=None, new_slot_of=None,
    in_place=False, state_per_token=False, zero_is_null=False, parent_token=None, records=None, out=None,
    names=("state", "slot_of"),
) -> Call:  # fmt: skip
    """Checks what :func:`calls.common_arguments` did not. The call returns ``out``."""
    q, v, cu_seqlens = x.q, x.v, x.cu_seqlens
    in_place = in_place and state is not None
    pools = StatePools(c, q, calls.sequences_of(q, cu_seqlens), calls.state_sizes(q, v, x.state_v_first))
    pools.check(names[0], state, names[1], slot_of)
    pools.check("new_state", new_state, "new_slot_of", new_slot_of)
    if state is not None and new_state is not None:
        c.dtype("new_state", new_state, (state.dtype,))
    if num_accepted_tokens is not None:
        pools.check_indices("num_accepted_tokens", num_accepted_tokens, ranks=(1,))
        if state is None or slot_of is None or slot_of.dim() != 2:
            raise c.value_error(f"num_accepted_tokens is given, expected {names[1]} [N, columns] with it")
    written, slots_name, slots = (state, names[1], slot_of) if in_place else (
        new_state, "new_slot_of", new_slot_of)  # fmt: skip
    if state_per_token:
        if written is None or slots is None or slots.dim() != 2:
            raise c.value_error(f"state_per_token is True, expected {slots_name} [N, columns] of a pool to write to")
        if cu_seqlens is None and slots.shape[1] < q.shape[1]:
            raise c.value_error(
                f"{slots_name} has shape {list(slots.shape)}, expected a column for each of the T={q.shape[1]} tokens"
            )
    if parent_token is not None:
        check_parents(c, parent_token, q)
        if written is not None and (in_place or not state_per_token):
            raise c.value_error(
                "parent_token is given and a last state would be written, "
                "expected records, or state_per_token with new_state"
            )
    if records is not None:
        check_records(c, records, q, v)
    if out is None:
        out = c.make(v, empty_like)
    else:
        check_like(c, "out", out, q, q.dtype, {"B": v.shape[0], "T": v.shape[1], "HV": v.shape[2], "V": v.shape[3]})
    c.look(
        q,
        check_drafts,
        pools.sequences,
        state,
        slot_of,
        num_accepted_tokens,
        written,
        (names[1], slots_name),
        slots,
        state_per_token,
        zero_is_null,
        parent_token,
        cu_seqlens,
    )
    record_k, record_u, record_g = records or (None, None, None)
    arguments = Decode(
        **x._asdict(), out=out, state=state, slot_of=slot_of, new_state=new_state, new_slot_of=new_slot_of,
        num_accepted_tokens=num_accepted_tokens, parent_token=parent_token, record_k=record_k, record_u=record_u,
        record_g=record_g, in_place=in_place, state_per_token=state_per_token, zero_is_null=zero_is_null,
    )  # fmt: skip
    return Call("decode", arguments, q, calls.out, c)


@calls.public
def commit(
    records: DraftRecords,
    num_accepted_tokens: Tensor | None,
    state: Tensor,
    *,
    slot_of: Tensor | None = None,
    new_state: Tensor | None = None,
    new_slot_of: Tensor | None = None,
    state_v_first: bool = False,
    zero_is_null: bool = False,
    cu_seqlens: Tensor | None = None,
    parent_token: Tensor | None = None,
    accepted_token: Tensor | None = None,
):
    """Brings states forward past the accepted tokens of a draft that :func:`decode` only read them for.

    ``S <- Diag(e^g) S + k u^T`` for the first ``num_accepted_tokens`` of each sequence (Kimi Linear report, section 3):
    after it the state is, bit for bit, what one :func:`decode` of those tokens alone would have left. Of a draft tree
    the tokens are those on the path to ``accepted_token``.

    Args:
        records: what ``decode(..., records=records)`` filled.
        num_accepted_tokens: int32 or int64 ``[N]``, from 0 to the tokens of the sequence; anything where the slot to
            read or to write is null. None for draft trees.
        state: the pool that the drafts started from; written unless ``new_state`` is given.
        slot_of, new_state, new_slot_of, state_v_first, zero_is_null, cu_seqlens: as in
            :func:`decode`; indices ``[N]``.
        parent_token: what :func:`decode` got.
        accepted_token: int32 or int64 ``[N]``, with ``parent_token``: the last accepted token, counted from the first
            one of its sequence; -1: none was accepted. Anything where the slot to read or to write is null.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Contents of index tensors are checked
            where :func:`decode` checks them.

    Example:
        >>> import torch, kda_cuda
        >>> q, k, v = (torch.randn(2, 4, 1, 64) for _ in range(3))
        >>> g, beta, state = -torch.rand(2, 4, 1, 64), torch.rand(2, 4, 1), torch.zeros(2, 1, 64, 64)
        >>> records = kda_cuda.DraftRecords.empty(k, v)
        >>> o = kda_cuda.decode(q, k, v, g, beta, state, records=records)  # four drafts; the state stays
        >>> kda_cuda.commit(records, torch.tensor([1, 3]), state)
        >>> parents = torch.tensor([[-1, 0, 0, 2], [-1, -1, 0, 1]])  # trees: tokens 0, 2, 3 are a path of the first
        >>> o = kda_cuda.decode(q, k, v, g, beta, state, records=records, parent_token=parents)
        >>> kda_cuda.commit(records, None, state, parent_token=parents, accepted_token=torch.tensor([3, -1]))
    """
    c = Checker("commit")
    for name, flag in {"state_v_first": state_v_first, "zero_is_null": zero_is_null}.items():
        c.boolean(name, flag)
    check_records(c, records)
    k, v = records.k, records.u
    if cu_seqlens is not None:
        check_cu_seqlens(c, k, cu_seqlens, None)
        cu_seqlens = cu_seqlens.contiguous()
    pools = StatePools(c, k, calls.sequences_of(k, cu_seqlens), calls.state_sizes(k, v, state_v_first))
    if state is None:
        c.tensor("state", state)
    pools.check("state", state, "slot_of", slot_of, ranks=(1,))
    pools.check("new_state", new_state, "new_slot_of", new_slot_of, ranks=(1,))
    if new_state is not None:
        c.dtype("new_state", new_state, (state.dtype,))
    tree = parent_token is not None
    if tree:
        check_parents(c, parent_token, k)
    if (accepted_token is not None) != tree or (num_accepted_tokens is None) != tree:
        names = ("num_accepted_tokens", "parent_token", "accepted_token")
        given = zip(names, (num_accepted_tokens, parent_token, accepted_token), strict=True)
        names = [name for name, x in given if x is not None]
        raise c.value_error(f"got {names}, expected num_accepted_tokens, or parent_token and accepted_token")
    accepted = accepted_token if tree else num_accepted_tokens
    pools.check_indices("accepted_token" if tree else "num_accepted_tokens", accepted, ranks=(1,))
    written, slots_name, slots = (state, "slot_of", slot_of) if new_state is None else (
        new_state, "new_slot_of", new_slot_of)  # fmt: skip
    c.look(
        k,
        check_slots_and_accepted,
        pools.sequences,
        state,
        slot_of,
        written,
        ("slot_of", slots_name),
        slots,
        zero_is_null,
        accepted,
        k.shape[1],
        cu_seqlens,
        parent_token,
    )
    arguments = Commit(
        state=state, slot_of=slot_of, new_state=new_state, new_slot_of=new_slot_of, record_k=k, record_u=v,
        record_g=records.g, num_accepted_tokens=num_accepted_tokens, cu_seqlens=cu_seqlens,
        parent_token=parent_token, accepted_token=accepted_token, state_v_first=state_v_first,
        zero_is_null=zero_is_null,
    )  # fmt: skip
    return Call("decode_commit", arguments, state, calls.as_it_is, c)


# ---- fused_recurrent_kda ---------------------------------------------------------------------------------------------


def takes_pool(c: Checker, kwargs: dict) -> bool:
    """Whether the arguments of :func:`fused_recurrent_kda` ask for what only the recurrence can do."""
    in_place = kwargs.get("inplace_final_state")
    if in_place is not None:
        c.boolean("inplace_final_state", in_place)
    others = ("ssm_state_indices", "num_accepted_tokens", "out")
    return bool(in_place) or any(kwargs.get(name) is not None for name in others)


def in_pool_call(c: Checker, x: Inputs, initial_state, output_final_state: bool, kwargs: dict) -> Call:
    """Returns o, and the final states: the pool itself where they are written in place."""
    names = ("ssm_state_indices", "num_accepted_tokens", "out")
    slots, accepted, out = (kwargs.get(name) for name in names)
    in_place = bool(kwargs.get("inplace_final_state"))
    if calls.needs_grad(c, *x, initial_state):
        given = next(name for name in (*names, "inplace_final_state") if kwargs.get(name) is not None)
        raise c.value_error(f"{given} is given and an argument requires a gradient, expected one of them")
    if in_place and initial_state is None:
        raise c.value_error("inplace_final_state is True and initial_state is None, expected a state to write to")
    final_state = None
    if output_final_state and not in_place:
        final_state = new_states(c, x, torch.float32 if initial_state is None else initial_state.dtype)
    with_columns = isinstance(slots, Tensor) and slots.dim() == 2
    call = decode_call(
        c, x, state=initial_state, slot_of=slots, num_accepted_tokens=accepted, new_state=final_state,
        in_place=in_place, state_per_token=in_place and with_columns, out=out,
        names=("initial_state", "ssm_state_indices"),
    )  # fmt: skip
    return with_state(call, "state" if in_place else "new_state")


def recurrent_call(c: Checker, x: Inputs, initial_state: Tensor | None, output_final_state: bool) -> Call:
    """A few tokens without gradients, by whatever is fastest; else in chunks. Returns o and the final states."""
    q = x.q
    tokens = q.shape[1] if x.cu_seqlens is None else -(-q.shape[1] // calls.sequences_of(q, x.cu_seqlens))
    if calls.needs_grad(c, *x, initial_state) or tokens > FEW_TOKENS or variants.prefers_chunks(q):
        return calls.chunk_call(c, x, initial_state, output_final_state)
    final_state = new_states(c, x, compute_dtype(q.dtype)) if output_final_state else None
    state = None if initial_state is None else initial_state.contiguous()
    return with_state(decode_call(c, x, state=state, new_state=final_state), "new_state")


def with_state(call: Call, name: str) -> Call:
    """The call of ``decode``, which then returns its output and the argument ``name``."""
    return call._replace(returned=lambda arguments, _: (arguments.out, getattr(arguments, name)))


def new_states(c: Checker, x: Inputs, dtype: torch.dtype) -> Tensor:
    """One state per sequence, in the layout of the call. Zero: null slots leave theirs as it is."""
    sizes = calls.state_sizes(x.q, x.v, x.state_v_first).values()
    shape = (calls.sequences_of(x.q, x.cu_seqlens), *sizes)
    return c.make(x.q, lambda q: q.new_zeros(shape, dtype=dtype))
