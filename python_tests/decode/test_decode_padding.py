"""Padding of decode, commit and fused_recurrent_kda: sequences in null slots, and tokens after the last sequence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import kda_cuda

from ..support import decode_calls
from ..support.cases import Case, Inputs, longer
from .test_decode import BF16, FP32, MODEL, Pool, initial, laid_out
from .test_decode_verify import verify

ANYTHING = 99  # no slot, no column, no number of tokens
LEAST = torch.iinfo(torch.int64).min
BATCH = Case("null rows", 3, batch=5, heads=1, value_heads=2, dtype=BF16, **MODEL)


def rows_of(x: Inputs, rows: list[int]) -> Inputs:
    return x.replace(**{name: y[rows] for name, y in decode_calls.streams(x).items()})


def with_nan(x: Inputs, rows: list[int]) -> Inputs:
    streams = {name: y.clone() for name, y in decode_calls.streams(x).items()}
    for y in streams.values():
        y[rows] = math.nan
    return x.replace(**streams)


def tensor(x: Inputs, values: list) -> Tensor:
    return torch.tensor(values, device=x.q.device)


# ---- null slots ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_is_null", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_null_rows_start_from_any_draft(per_token, zero_is_null, device):
    """Speculative decoding with padded rows: their counts, their other columns and their tokens may be anything."""
    x = BATCH.inputs(device)
    x, state = laid_out(x, initial(BATCH, x), True, FP32)
    null = 0 if zero_is_null else -1
    table = [[3, 4, 5], [null] * 3, [6, 7, 8], [null] * 3, [ANYTHING, null, 6]]
    accepted, live = [2, ANYTHING, 3, LEAST, 2], [0, 2]
    pools = []
    for rows in (live, range(5)):
        pool = Pool(9, state, 1e30)
        pool.put([4, -1, 8, -1, -1], state)
        o = decode_calls.decode(
            rows_of(with_nan(x, [1, 3, 4]), list(rows)),
            pool.slots,
            slot_of=tensor(x, [table[n] for n in rows]),
            num_accepted_tokens=tensor(x, [accepted[n] for n in rows]),
            state_per_token=per_token,
            zero_is_null=zero_is_null,
        )
        pools.append(pool.padded)
    alone = decode_calls.decode(rows_of(x, live), state[live])
    assert torch.equal(o[live], alone) and not o[[1, 3, 4]].any()
    assert torch.equal(*pools), "a null row wrote something"


def test_null_rows_write_nowhere(device):
    """A slot to write to, of a sequence that has none to read from, is not looked at."""
    x = BATCH.inputs(device)
    x, state = laid_out(x, initial(BATCH, x), True, FP32)
    target = Pool(5, state, 1e30)
    target.put([], state)
    read, write = tensor(x, [2, -1, 0, -7, 1]), tensor(x, [4, 4, 1, ANYTHING, -1])
    decode_calls.decode(x, state, slot_of=read, new_state=target.slots, new_slot_of=write)
    assert target.untouched([4, 1])
    alone = state[[2, 0]]
    decode_calls.decode(rows_of(x, [0, 2]), alone)
    assert torch.equal(target.slots[[4, 1]], alone)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_null_rows_commit_any_number(elsewhere, device):
    x = BATCH.inputs(device)
    x, state = laid_out(x, initial(BATCH, x), True, FP32)
    read, write = tensor(x, [2, -1, 0, -7, 1]), tensor(x, [4, 4, 1, ANYTHING, -1])
    _, records = verify(x, state, slot_of=read)
    target = Pool(5, state, 1e30)
    target.put([2, -1, 0, -7, 1], state[[2, 1, 0, 3, 1]])
    accepted = tensor(x, [3, ANYTHING, 2, LEAST, -5 if elsewhere else 0])
    if elsewhere:
        kda_cuda.commit(
            records, accepted, state, slot_of=read, new_state=target.slots, new_slot_of=write, state_v_first=True
        )
    else:
        kda_cuda.commit(records, accepted, target.slots, slot_of=read, state_v_first=True)
    written = [4, 1] if elsewhere else [2, 0]
    assert target.untouched(written)
    for slot, tokens, row in zip(written, (3, 2), (0, 2), strict=True):
        alone = state[[2, 0]][[row // 2]].clone()
        decode_calls.decode(rows_of(x, [row]), alone, tokens=slice(0, tokens))
        # The same kernel gives the same bits; the reference multiplies other shapes, in another order.
        torch.testing.assert_close(target.slots[slot], alone[0], rtol=0 if device.runs_kernels else 1e-5, atol=1e-6)


def test_null_rows_of_fused_recurrent_kda(device):
    x = BATCH.inputs(device)
    x, state = laid_out(x, initial(BATCH, x), True, FP32)
    table = tensor(x, [[0, 1], [-1, -1], [2, 3], [-1, -1], [-1, -1]])
    call = {**decode_calls.streams(with_nan(x, [1, 3, 4])), **decode_calls.options(x)}
    o, final = kda_cuda.fused_recurrent_kda(
        **call,
        initial_state=state.clone(),
        ssm_state_indices=table,
        output_final_state=True,
        num_accepted_tokens=tensor(x, [2, ANYTHING, 1, LEAST, 0]),
    )
    alone = state[[1, 2]]
    assert torch.equal(o[[0, 2]], decode_calls.decode(rows_of(x, [0, 2]), alone)) and not o[[1, 3, 4]].any()
    assert torch.equal(final[[0, 2]], alone) and not final[[1, 3, 4]].any()


# ---- tokens after the last sequence ----------------------------------------------------------------------------------

RAGGED = Case(
    "unowned decode",
    17,
    lengths=(1, 0, 8, 3, 0, 5),
    heads=1,
    value_heads=2,
    value_dim=200,
    gate="long",
    beta_sigmoid=True,
    dtype=BF16,
)
TAILS = [1, 4, 30]  # fewer and more than there are sequences


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("v_first", [True, False], ids=["v_first", "k_first"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_tokens_after_the_last_sequence(dtype, v_first, tail, device):
    """In a bucket of more tokens: outputs of zero, whatever they hold, and no state but its own of each sequence."""
    x = RAGGED.inputs(device, dtype)
    x, state = laid_out(x, initial(RAGGED, x), v_first, FP32)
    slots = tensor(x, [5, 7, -1, 0, 2, 1])
    pool, other = Pool(9, state, 1e30), Pool(9, state, 1e30)
    for each in (pool, other):
        each.put(slots.tolist(), state)
    wide = torch.full((1, 17 + tail, 2, 208), math.nan, dtype=dtype, device=device)
    out = wide[..., 4:204]
    o = decode_calls.decode(longer(x, tail), pool.slots, slot_of=slots, out=out)
    assert o is out and not o[:, 17:].any() and wide[..., :4].isnan().all() and wide[..., 204:].isnan().all()
    assert torch.equal(o[:, :17], decode_calls.decode(x, other.slots, slot_of=slots))
    assert torch.equal(pool.padded, other.padded)


def test_nobody_decodes(device):
    """An idle rank's dummy token; all sequences are empty, with and without a state, in place and elsewhere."""
    x = longer(Case("idle", 0, lengths=(0, 0), dtype=BF16).inputs(device), 5)
    x, state = laid_out(x, initial(RAGGED, x, rows=2), True, FP32)
    before, copy = state.clone(), torch.full_like(state, math.nan)
    for call in ({"state": None}, {"state": state}, {"state": state, "new_state": copy}):
        out = torch.full_like(x.v, math.nan)
        assert not decode_calls.decode(x, **call, out=out).any()
    assert torch.equal(state, before) and torch.equal(copy, before)


@pytest.mark.parametrize("tail", TAILS)
def test_drafts_before_unowned_tokens(tail, device):
    """Records of such tokens stay as they were, and commit reads none of them."""
    x = RAGGED.inputs(device)
    x, state = laid_out(x, initial(RAGGED, x), True, FP32)
    committed, accepted = state.clone(), tensor(x, [1, 0, 5, 0, 0, 5])
    o, records = verify(longer(x, tail), state)
    assert not o[:, 17:].any() and all(r[:, 17:].isnan().all() and r[:, :17].isfinite().all() for r in records)
    kda_cuda.commit(records, accepted, state, state_v_first=True, cu_seqlens=x.cu_seqlens)
    wanted, records = verify(x, committed)
    kda_cuda.commit(records, accepted, committed, state_v_first=True, cu_seqlens=x.cu_seqlens)
    assert torch.equal(o[:, :17], wanted) and torch.equal(state, committed)


def test_fused_recurrent_kda_before_unowned_tokens(device):
    x = RAGGED.inputs(device)
    x, state = laid_out(x, initial(RAGGED, x), True, FP32)
    results = []
    for y in (x, longer(x, 30)):
        call = {**decode_calls.streams(y), **decode_calls.options(y), "cu_seqlens": y.cu_seqlens}
        results.append(kda_cuda.fused_recurrent_kda(**call, initial_state=state, output_final_state=True))
    (wanted, wanted_state), (o, final_state) = results
    assert torch.equal(o[:, :17], wanted) and not o[:, 17:].any() and torch.equal(final_state, wanted_state)
