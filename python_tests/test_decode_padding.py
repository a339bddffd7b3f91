"""Padding of decode, commit and fused_recurrent_kda: sequences in null slots, and tokens after the last sequence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import kda_cuda

from . import decode_calls
from .cases import Case, Inputs
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
            rows_of(with_nan(x, [1, 3, 4]), list(rows)), pool.slots, slot_of=tensor(x, [table[n] for n in rows]),
            num_accepted_tokens=tensor(x, [accepted[n] for n in rows]), state_per_token=per_token,
            zero_is_null=zero_is_null,
        )  # fmt: skip
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
        kda_cuda.commit(records, accepted, state, slot_of=read, new_state=target.slots, new_slot_of=write,
                        state_v_first=True)  # fmt: skip
    else:
        kda_cuda.commit(records, accepted, target.slots, slot_of=read, state_v_first=True)
    written = [4, 1] if elsewhere else [2, 0]
    assert target.untouched(written)
    for slot, tokens, row in zip(written, (3, 2), (0, 2), strict=True):
        alone = state[[2, 0]][[row // 2]].clone()
        decode_calls.decode(rows_of(x, [row]), alone, tokens=slice(0, tokens))
        torch.testing.assert_close(target.slots[slot], alone[0], rtol=0 if device.runs_kernels else 1e-5, atol=1e-6)


def test_null_rows_of_fused_recurrent_kda(device):
    x = BATCH.inputs(device)
    x, state = laid_out(x, initial(BATCH, x), True, FP32)
    table = tensor(x, [[0, 1], [-1, -1], [2, 3], [-1, -1], [-1, -1]])
    call = {**decode_calls.streams(with_nan(x, [1, 3, 4])), **decode_calls.options(x)}
    o, final = kda_cuda.fused_recurrent_kda(
        **call, initial_state=state.clone(), ssm_state_indices=table, output_final_state=True,
        num_accepted_tokens=tensor(x, [2, ANYTHING, 1, LEAST, 0]),
    )  # fmt: skip
    alone = state[[1, 2]]
    assert torch.equal(o[[0, 2]], decode_calls.decode(rows_of(x, [0, 2]), alone)) and not o[[1, 3, 4]].any()
    assert torch.equal(final[[0, 2]], alone) and not final[[1, 3, 4]].any()
