"""Speculative decoding: drafts verified on a state that stays, then the accepted ones committed to it."""

from __future__ import annotations

import math

import pytest
import torch

import kda_cuda
from kda_cuda import DraftRecords
from kda_cuda.state_pools import STATE_DTYPES

from ..support import accuracy, decode_calls, oracle
from ..support.cases import Case
from .test_decode import Pool, initial, laid_out

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DRAFTS = 10  # more than are in shared memory at once
MODEL = {"gate": "long", "beta_sigmoid": True}
RTOL = {FP32: 1e-5, FP16: 2e-3, BF16: 1e-2}  # of states that the reference rounds at other places


def verify(x, state, **more) -> tuple[torch.Tensor, DraftRecords]:
    records = DraftRecords.empty(x.k, x.v)
    for r in records:
        r.fill_(math.nan)
    return decode_calls.decode(x, state, records=records, **more), records


@pytest.mark.parametrize("dims", [(64, 64), (128, 40), (60, 36)], ids=str)
@pytest.mark.parametrize("v_first", [True, False], ids=["v_first", "k_first"])
@pytest.mark.parametrize("state_dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_verify_and_commit_are_single_steps(state_dtype, v_first, dims, device):
    """For every number of accepted drafts: fp32 states are bit for bit those of single steps, 16-bit ones those of one
    call with that many tokens, which rounds once."""
    case = Case(f"verify {dims}", DRAFTS, batch=DRAFTS + 1, heads=1, value_heads=2, key_dim=dims[0], value_dim=dims[1],
                dtype=BF16, **MODEL)  # fmt: skip
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), v_first, state_dtype)
    before = state.clone()
    (o, records), kernels = device.run(lambda: verify(x, state))
    assert torch.equal(state, before) and kernels == (["decode"] if device.runs_kernels else [])
    accepted = torch.arange(DRAFTS + 1, device=device)  # sequence n accepts n drafts
    _, kernels = device.run(lambda: kda_cuda.commit(records, accepted, state, state_v_first=v_first))
    assert kernels == (["decode_commit"] if device.runs_kernels else [])

    stepped, outputs = before.clone(), []
    expected = [before[0]]
    for t in range(DRAFTS):
        outputs.append(decode_calls.decode(x, stepped, tokens=slice(t, t + 1)))
        together = before.clone()
        decode_calls.decode(x, together, tokens=slice(0, t + 1))
        expected.append((stepped if state_dtype == FP32 else together)[t + 1].clone())
    if state_dtype == FP32 and device.runs_kernels:
        assert torch.equal(o, torch.cat(outputs, 1))
    for n, want in enumerate(expected):
        if device.runs_kernels:
            assert torch.equal(state[n], want), f"{n} accepted"
        else:
            torch.testing.assert_close(state[n], want, rtol=RTOL[state_dtype], atol=1e-6)


def test_records_are_what_they_say(device):
    """k normalised, u = beta (v - S'^T k), g the log-decay: S_t = Diag(e^g) S_{t-1} + k u^T in float64."""
    case = Case("records", 3, batch=2, heads=2, value_heads=4, dtype=BF16, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), False, FP32)
    _, records = verify(x, state)
    k, u, g = (r.double().cpu() for r in records)
    for n, history in enumerate(decode_calls.states_after(x.to("cpu"), state)):
        for t in range(3):
            keys = k[n, t].repeat_interleave(2, 0)
            after = g[n, t].exp().unsqueeze(-1) * history[t] + keys.unsqueeze(-1) * u[n, t].unsqueeze(-2)
            accuracy.Budget(1e-5, 1e-4).check(f"state {n} after {t}", after.float(), history[t + 1])


def test_commit_in_a_pool(device):
    """Ragged drafts, null slots, slot zero as null, counts out of range; what is not committed stays, bit by bit."""
    case = Case("commit pool", 9, lengths=(4, 0, 3, 2), heads=1, value_heads=2, dtype=BF16, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    pool = Pool(8, state, math.nan)
    slots = [6, 1, -1, 0]
    pool.put(slots, state)
    indices = torch.tensor(slots, device=device, dtype=torch.int32)
    o, records = verify(x, pool.slots, slot_of=indices, zero_is_null=True)
    assert o[:, :4].any() and not o[:, 4:].any() and pool.untouched([])
    assert records.u[:, :4].isfinite().all() and records.u[:, 4:].isnan().all()  # null: left as they were
    accepted = torch.tensor([3, 0, 2, 2], device=device)
    kda_cuda.commit(records, accepted, pool.slots, slot_of=indices, state_v_first=True, zero_is_null=True,
                    cu_seqlens=x.cu_seqlens)  # fmt: skip
    alone = state[:1].clone()
    one = x.replace(cu_seqlens=None)
    decode_calls.decode(one, alone, tokens=slice(0, 3))
    assert pool.untouched([6])
    torch.testing.assert_close(pool.slots[6], alone[0], rtol=0 if device.runs_kernels else 1e-5, atol=1e-6)


def test_commit_out_of_place(device):
    """From the pool of the drafts to slots of another, also where nothing was accepted."""
    case = Case("commit elsewhere", 4, batch=3, heads=1, dtype=BF16, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    _, records = verify(x, state)
    before, target = state.clone(), torch.full((5, *state.shape[1:]), math.nan, device=device)
    accepted = torch.tensor([0, 4, 1], device=device, dtype=torch.int32)
    kda_cuda.commit(records, accepted, state, new_state=target, new_slot_of=torch.tensor([4, 0, -1], device=device),
                    state_v_first=True)  # fmt: skip
    assert torch.equal(state, before) and target[1:4].isnan().all() and torch.equal(target[4], before[0])
    decode_calls.decode(x, state)
    torch.testing.assert_close(target[0], state[1], rtol=0 if device.runs_kernels else 1e-5, atol=1e-6)


@pytest.mark.devices("emulator", "cuda")
def test_commit_stays_inside(device):
    """Counts beyond the draft or below zero are clamped."""
    case = Case("commit inside", 3, batch=2, heads=1, dtype=BF16, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    _, records = verify(x, state)
    namespace = torch.ops.kda_cuda_emulated if device.name == "emulator" else torch.ops.kda_cuda
    expected = state.clone()
    decode_calls.decode(x, expected)
    expected[1] = state[1]
    accepted = torch.tensor([1000, -7], device=device)
    namespace.decode_commit(state, None, None, None, *records, accepted, None, None, None, True, False)
    assert torch.equal(state, expected)


def test_both_forms_agree(device):
    """A state per draft position, or records: the accepted state is the same."""
    case = Case("two forms", 4, batch=2, heads=1, dtype=BF16, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    table = torch.arange(8, device=device).reshape(2, 4)
    drafts = torch.zeros((8, *state.shape[1:]), device=device)
    o = decode_calls.decode(x, state, new_state=drafts, new_slot_of=table, state_per_token=True)
    again, records = verify(x, state)
    assert torch.equal(o, again)
    kda_cuda.commit(records, torch.tensor([2, 4], device=device), state, state_v_first=True)
    rtol = 0 if device.runs_kernels else 1e-5
    torch.testing.assert_close(state, drafts[[1, 7]], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("v_first", [True, False], ids=["v_first", "k_first"])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES, ids=str)
def test_one_pool_for_a_whole_request(state_dtype, v_first, device):
    """What prefill fills, decode, verification, commit and fused_recurrent_kda take, whatever dtype the pool has."""
    prompt, drafts = 70, slice(72, 76)
    case = Case("request", 80, batch=2, heads=1, value_heads=2, value_dim=40, dtype=BF16, **MODEL)
    x = case.inputs(device).replace(state_v_first=v_first)
    _, zeros = laid_out(x, torch.zeros(5, 2, 64, 40, device=device), v_first, state_dtype)
    pool, slots = Pool(5, zeros, math.nan), torch.tensor([3, 1], device=device)
    pool.put(slots.tolist(), zeros)
    call = {"slot_of": slots}
    options = decode_calls.options(x)
    o = [kda_cuda.prefill(**decode_calls.streams(x, slice(0, prompt)), **options, state_pool=pool.slots, **call)]
    o += [decode_calls.decode(x, pool.slots, tokens=slice(t, t + 1), **call) for t in (70, 71)]
    records = DraftRecords.empty(x.k[:, drafts], x.v[:, drafts])
    o.append(decode_calls.decode(x, pool.slots, tokens=drafts, records=records, **call))
    kda_cuda.commit(records, torch.tensor([4, 4], device=device), pool.slots, state_v_first=v_first, **call)
    last, returned = kda_cuda.fused_recurrent_kda(
        **decode_calls.streams(x, slice(76, 80)),
        **options,
        initial_state=pool.slots,
        ssm_state_indices=slots,
        inplace_final_state=True,
    )
    assert returned is pool.slots and pool.slots.dtype == state_dtype and pool.untouched(slots.tolist())
    truth = oracle.recurrence(x.to("cpu").double().replace(initial_state=None))
    accuracy.Budget(1e-2, 1e-1).check("o", torch.cat([*o, last], 1), truth.o)
    limit = max(accuracy.CAP[state_dtype], accuracy.CAP[BF16])  # the prompt goes through products of bf16
    accuracy.Budget(limit, 10 * limit).check("state", pool.slots[slots], truth.final_state)
