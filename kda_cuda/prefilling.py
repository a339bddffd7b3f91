"""``kda_cuda.prefill``: whole sequences on a pool of states, as serving engines keep them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from . import calls
from .checks import Checker, cu_seqlens_list
from .schemas import Prefill
from .state_pools import StatePools, check_like

CHECKPOINT_TOKENS = 64


@calls.public
def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    state_pool: Tensor,
    slot_of: Tensor | None = None,
    initial_slot_of: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    zero_is_null: bool = False,
    checkpoint_slots: Tensor | None = None,
    checkpoint_pool: Tensor | None = None,
    checkpoint_interval: int = CHECKPOINT_TOKENS,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    deterministic: bool | str = True,
    workspace: Tensor | None = None,
):
    """:func:`chunk_kda` on a pool of states: reads, writes and checkpoints them in place. No gradients.

    Sequence n starts from slot ``initial_slot_of[n]``, by default ``slot_of[n]``, and leaves its final state in slot
    ``slot_of[n]``; an empty one copies. Its states after ``checkpoint_interval``, twice ``checkpoint_interval``, ...
    tokens go to the slots ``checkpoint_slots[n, 0]``, ``[n, 1]``, ...: with 130 tokens and an interval of 64 those
    after the tokens 64 and 128, from which a prefix cache restarts. Entries beyond the sequence are not read.

    A slot below zero (``zero_is_null``: or zero) is null. A sequence with a null ``slot_of`` is padding: its output is
    zero, and nothing of it is written. A null ``initial_slot_of`` starts from zero, a null checkpoint is not kept.
    Tokens after the last sequence of cu_seqlens are padding too.

    No argument's contents are read on the host, so that a captured CUDA graph can be replayed with other inputs,
    cu_seqlens, slots and destinations. Contents are checked on the CPU, in ``cu_seqlens_cpu``, and with
    KDA_CUDA_CHECK=1; otherwise slots beyond the pool count as null, boundaries are clamped to [0, T], and writing one
    slot twice, or one that another sequence starts from, leaves either state in it.

    Args:
        q, k, v, g, beta: as :func:`chunk_kda` takes them.
        state_pool: ``[slots, HV, K, V]`` (``[slots, HV, V, K]`` with ``state_v_first``), fp32, bf16 or fp16 whatever q
            is (float64 with a float64 q); slots are contiguous, the distance between them is free.
        slot_of: ``[N]``, int32 or int64, any stride. Default: sequence n has slot n.
        initial_slot_of: likewise.
        has_initial_state: bool ``[N]``; False: the sequence starts from zero. Default: all True.
        checkpoint_slots: ``[N, checkpoints]``, int32 or int64. Default: no checkpoints.
        checkpoint_pool: where the checkpoints go, like state_pool with any number of slots. Default: state_pool.
        checkpoint_interval: tokens between checkpoints, a multiple of 64.
        cu_seqlens, cu_seqlens_cpu, scale, state_v_first: as :func:`chunk_kda` takes them.
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval: likewise.
        A_log, dt_bias, lower_bound: likewise.
        deterministic: the same call always gives the same bits; ``"batch_invariant"``: those of a sequence do not
            depend on what it is batched with either, and no sequence is split into segments that run at once.
        workspace: uint8, at least :func:`workspace_size` bytes, aligned to 16, overwritten. Default: allocated.

    Returns:
        o, ``[B, T, HV, V]`` in the dtype of v.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it. Nothing has run or been written then.

    Example:
        >>> import torch, kda_cuda
        >>> q, k, v = (torch.randn(1, 200, 2, 64) for _ in range(3))
        >>> g, beta, pool = -torch.rand(1, 200, 2, 64), torch.rand(1, 200, 2), torch.zeros(8, 2, 64, 64)
        >>> o = kda_cuda.prefill(
        ...     q, k, v, g, beta, state_pool=pool, use_qk_l2norm_in_kernel=True,
        ...     cu_seqlens=torch.tensor([0, 130, 200]),  # two sequences, of 130 and 70 tokens
        ...     slot_of=torch.tensor([1, 2]), has_initial_state=torch.tensor([False, False]),
        ...     checkpoint_slots=torch.tensor([[5, 6], [7, -1]]))  # after tokens 64 and 128; after token 64
        >>> o.shape, [bool(slot.any()) for slot in pool]
        (torch.Size([1, 200, 2, 64]), [False, True, True, False, False, True, True, True])
    """
    c = Checker("prefill")
    transforms = calls.Transforms(
        use_qk_l2norm_in_kernel, use_gate_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval
    )
    x = calls.common_arguments(
        c, q, k, v, g, beta, A_log, dt_bias, scale, transforms, lower_bound, state_v_first, cu_seqlens, cu_seqlens_cpu,
        zero_is_null=zero_is_null,
    )  # fmt: skip
    q, v, cu_seqlens = x.q, x.v, x.cu_seqlens
    if calls.needs_grad(c, *x, state_pool, checkpoint_pool):
        raise c.value_error("an input requires a gradient, expected none: states in a pool have no gradients")
    pools = StatePools(c, q, calls.sequences_of(q, cu_seqlens), calls.state_sizes(q, v, state_v_first))
    pools.check_pool("state_pool", state_pool)
    has_initial_state = calls.contiguous(has_initial_state)
    check_slots(pools, state_pool, slot_of, initial_slot_of, has_initial_state, zero_is_null)
    if checkpoint_slots is not None:
        checkpoint_slots = calls.contiguous(checkpoint_slots)
        pools.check_indices("checkpoint_slots", checkpoint_slots, ranks=(2,))
    if checkpoint_pool is not None:
        if checkpoint_slots is None:
            raise c.value_error("checkpoint_slots is None and checkpoint_pool is not, expected both or slots alone")
        pools.check_pool("checkpoint_pool", checkpoint_pool)
        checkpoint_pool = None if checkpoint_pool is state_pool else checkpoint_pool
    c.integer("checkpoint_interval", checkpoint_interval)
    if checkpoint_interval < 1 or checkpoint_interval % CHECKPOINT_TOKENS:
        raise c.value_error(
            f"checkpoint_interval is {checkpoint_interval}, expected a positive multiple of {CHECKPOINT_TOKENS}"
        )
    if workspace is not None:
        check_workspace(c, workspace, q)
    invariant = calls.batch_invariant(c, deterministic)
    arguments = Prefill(
        **x._asdict(), state_pool=state_pool, slot_of=slot_of, initial_slot_of=initial_slot_of,
        has_initial_state=has_initial_state, checkpoint_pool=checkpoint_pool, checkpoint_slots=checkpoint_slots,
        workspace=workspace, zero_is_null=zero_is_null, checkpoint_interval=checkpoint_interval,
        batch_invariant=invariant,
    )  # fmt: skip
    c.look(q, check_slot_contents, *arguments)
    return calls.Call("prefill", arguments, q, calls.as_it_is, c)


def check_slots(
    pools: StatePools, pool: Tensor, slot_of, initial_slot_of, has_initial_state, zero_is_null: bool
) -> None:
    c = pools.c
    if slot_of is not None:
        pools.check_indices("slot_of", slot_of, ranks=(1,))
    elif zero_is_null:
        raise c.value_error("zero_is_null is True and slot_of is None, expected slot_of")
    elif pool.shape[0] < pools.sequences:
        raise c.value_error(
            f"state_pool has {pool.shape[0]} slots, expected at least N={pools.sequences} without slot_of"
        )
    if initial_slot_of is not None:
        pools.check_indices("initial_slot_of", initial_slot_of, ranks=(1,))
    if has_initial_state is not None:
        check_like(c, "has_initial_state", has_initial_state, pool, torch.bool, {"N": pools.sequences})


def lengths_of(q: Tensor, cu_seqlens: Tensor | None) -> list[int]:
    if cu_seqlens is None:
        return [q.shape[1]] * q.shape[0]
    return [end - begin for begin, end in itertools.pairwise(cu_seqlens_list(cu_seqlens))]


def check_workspace(c: Checker, workspace: Tensor, q: Tensor) -> None:
    """Its type; whoever serves the call knows what it must hold."""
    c.tensor("workspace", workspace)
    c.device("workspace", workspace, q.device, "q")
    c.rank("workspace", workspace, "bytes")
    c.dtype("workspace", workspace, (torch.uint8,))
    if not workspace.is_contiguous():
        raise c.value_error(f"workspace has strides {list(workspace.stride())}, expected it contiguous")


def check_slot_contents(c: Checker, *arguments: object) -> None:
    SlotContents(c, Prefill(*arguments)).check()


class SlotContents:
    """The slots of a call whose contents may be read: inside the pool, and no two sequences in each other's way."""

    def __init__(self, c: Checker, x: Prefill):
        lengths = lengths_of(x.q, x.cu_seqlens)
        self._c, self._zero_is_null, self._interval = c, x.zero_is_null, x.checkpoint_interval
        self._slots = x.state_pool.shape[0]
        self._other_pool = x.checkpoint_pool is not None
        self._checkpoint_slots = (x.checkpoint_pool if self._other_pool else x.state_pool).shape[0]
        self._slot_of = list(range(len(lengths))) if x.slot_of is None else x.slot_of.tolist()
        self._initial = None if x.initial_slot_of is None else x.initial_slot_of.tolist()
        self._has_initial = [True] * len(lengths) if x.has_initial_state is None else x.has_initial_state.tolist()
        self._checkpoints = [[]] * len(lengths) if x.checkpoint_slots is None else x.checkpoint_slots.tolist()
        self._sequences = [(n, length) for n, length in enumerate(lengths) if not self._null(self._slot_of[n])]

    def check(self) -> None:
        written: dict[tuple[bool, int], str] = {}  # (in the other pool, slot) -> the entry that says so
        for pool, slot, entry in self._writes():
            other = written.setdefault((pool, slot), entry)
            if other != entry:
                raise self._c.value_error(f"{entry} is {slot} like {other}, expected another slot")
        for n, slot, entry in self._reads():
            by = written.get((False, slot))
            if by not in (None, f"slot_of[{n}]"):
                raise self._c.value_error(f"{entry} is {slot}, which {by} writes, expected another slot")

    def _writes(self) -> Iterator[tuple[bool, int, str]]:
        for n, length in self._sequences:
            entry = f"slot_of[{n}]"
            yield False, self._in_pool(entry, self._slot_of[n], self._slots), entry
            for j, slot in enumerate(self._checkpoints[n][: length // self._interval]):
                if not self._null(slot):
                    entry = f"checkpoint_slots[{n}, {j}]"
                    yield self._other_pool, self._in_pool(entry, slot, self._checkpoint_slots), entry

    def _reads(self) -> Iterator[tuple[int, int, str]]:
        for n, _ in self._sequences if self._initial is not None else ():
            slot, entry = self._initial[n], f"initial_slot_of[{n}]"
            if self._has_initial[n] and not self._null(slot):
                yield n, self._in_pool(entry, slot, self._slots), entry

    def _null(self, slot: int) -> bool:
        return slot < self._zero_is_null

    def _in_pool(self, entry: str, slot: int, slots: int) -> int:
        if slot >= slots:
            raise self._c.value_error(f"{entry} is {slot}, expected less than the {slots} slots of its pool")
        return slot
