"""decode against the float64 recurrence: gates, dtypes, layouts, dimensions, pools of states, ragged sequences."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

import kda_cuda

from ..support import accuracy, decode_calls, oracle
from ..support.cases import Case, Draw, Inputs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MODEL = {"beta_sigmoid": True}
CASES = (
    Case("fast", 4, batch=2, gate="fast", key_dim=128, value_dim=128, dtype=BF16, **MODEL),
    Case("long", 4, batch=2, gate="long", key_dim=128, value_dim=128, dtype=BF16, **MODEL),
    Case("neg_eigval", 5, gate="long", neg_eigval=True, dtype=FP16, **MODEL),
    Case("violent", 6, gate="violent", dtype=FP16),
    Case("steep", 6, gate="steep", dtype=BF16),
    Case("zero_gate", 4, gate="zero"),
    Case("negative_zero", 4, gate="negative_zero", keys="negative_zero"),
    Case("bounded_plain", 3, gate="bounded_plain", dtype=FP16),
    Case("collinear", 16, gate="zero", keys="collinear", beta=1.0, forward_allowance=5),
    Case("reflections", 16, gate="zero", keys="collinear", beta=12.0, beta_sigmoid=True, neg_eigval=True,
         forward_allowance=20),
    Case("zero_rows", 4, keys="zero_rows", dtype=BF16),
    Case("beta_zero", 2, beta=0.0),
    Case("gva", 2, heads=2, value_heads=6, gate="long", dtype=BF16, **MODEL),
    Case("no_l2norm", 3, l2norm=False, scale=1.7),
    Case("fp32_gate", 3, gate="violent", wide_gate=True, dtype=BF16),
    Case("one_token", 1, batch=3, dtype=FP16),
    Case("sixteen_tokens", 16, dtype=BF16),
    Case("more_than_staged", 19, gate="long", **MODEL),
    Case("ragged", 17, lengths=(1, 0, 8, 3, 0, 5), gate="long", dtype=BF16, **MODEL),
    Case("ragged_int64", 9, lengths=(0, 9), index_dtype=torch.int64),
)  # fmt: skip
DIMENSIONS = ((64, 64), (64, 128), (128, 64), (128, 128), (256, 256), (256, 64), (60, 60), (3, 5), (100, 36),
              (129, 200), (1, 1), (128, 40))  # fmt: skip


def laid_out(x: Inputs, state: Tensor, v_first: bool, dtype: torch.dtype) -> tuple[Inputs, Tensor]:
    """``state [N, HV, K, V]`` of a K-first case as the call takes it."""
    state = state.transpose(-1, -2) if v_first else state
    return x.replace(state_v_first=v_first, initial_state=None), state.to(dtype).contiguous()


def initial(case: Case, x: Inputs, rows: int | None = None) -> Tensor:
    n = rows or (x.q.shape[0] if x.cu_seqlens is None else len(x.cu_seqlens) - 1)
    state = Draw(f"{case} state").normal(n, x.v.shape[2], x.q.shape[3], x.v.shape[3])
    return state.to(device=x.q.device, dtype=torch.float32)


def check(case: Case, x: Inputs, state: Tensor, o: Tensor, final_state: Tensor, name: str = "") -> None:
    """Twice the error of the reference with the same storage dtypes, and never above the caps."""
    y = x.to("cpu")
    truth = oracle.recurrence(y.replace(initial_state=state.cpu()).double())
    low_o, low_state = torch.empty_like(o, device="cpu"), state.cpu().clone()
    decode_calls.decode(y, low_state, out=low_o)
    for what, result, low, exact in (("o", o, low_o, truth.o), ("state", final_state, low_state, truth.final_state)):
        limit = accuracy.CAP[result.dtype] * case.forward_allowance
        if what == "o":
            limit = max(limit, accuracy.CAP[case.dtype] * case.forward_allowance)
        rms = min(2 * accuracy.measure(low, exact).rms + accuracy.FLOOR * case.forward_allowance, limit)
        accuracy.Budget(rms, accuracy.ROW_FACTOR * limit).check(name + what, result, exact)


@pytest.mark.parametrize("v_first", [True, False], ids=["v_first", "k_first"])
@pytest.mark.parametrize("state_dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_recurrence(case, state_dtype, v_first, device):
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), v_first, state_dtype)
    before, out = state.clone(), torch.full_like(x.v, math.nan)
    o, kernels = device.run(lambda: decode_calls.decode(x, state, out=out))
    assert o is out
    assert kernels == (["decode"] if device.runs_kernels else [])
    check(case, x, before, o, state)


@pytest.mark.parametrize("v_first", [True, False], ids=["v_first", "k_first"])
@pytest.mark.parametrize("state_dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("dims", DIMENSIONS, ids=lambda d: f"{d[0]}x{d[1]}")
def test_every_dimension(dims, state_dtype, v_first, device):
    case = Case(f"dims{dims}", 2, heads=1, value_heads=2, key_dim=dims[0], value_dim=dims[1], dtype=BF16)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), v_first, state_dtype)
    shifted = torch.empty(state.numel() + 1, dtype=state_dtype, device=device)[1:].view(state.shape)  # never aligned
    shifted.copy_(state)
    before = state.clone()
    o = decode_calls.decode(x, state)
    check(case, x, before, o, state)
    again = decode_calls.decode(x, shifted)
    assert torch.equal(again, o) and torch.equal(shifted, state)


def test_without_a_state(device):
    """From zero, and nothing is kept."""
    case = CASES[0]
    x = case.inputs(device)
    zero = torch.zeros_like(initial(case, x))
    assert torch.equal(decode_calls.decode(x, None), decode_calls.decode(x, zero))
    assert zero.any()


@pytest.mark.parametrize("layout", ["packed", "transposed", "expanded"])
def test_layouts_change_nothing(layout, device):
    case = Case("layouts", 3, batch=2, gate="fast", key_dim=60, value_dim=60, dtype=BF16, layout=layout, **MODEL)
    x = case.inputs(device)
    plain = x.map(lambda t: t.contiguous())
    state = initial(case, x)
    copy = state.clone()
    assert torch.equal(decode_calls.decode(x, state), decode_calls.decode(plain, copy))
    assert torch.equal(state, copy)


def test_strided_out(device):
    case = Case("strided out", 3, batch=2, dtype=BF16)
    x = case.inputs(device)
    state = initial(case, x)
    wide = torch.full((*x.v.shape[:3], 80), 7.0, dtype=BF16, device=device)
    o = decode_calls.decode(x, state.clone(), out=wide[..., 8:72])
    assert torch.equal(o, decode_calls.decode(x, state)) and torch.equal(wide[..., 8:72], o)
    assert (wide[..., :8] == 7).all() and (wide[..., 72:] == 7).all()


# ---- pools -----------------------------------------------------------------------------------------------------------


class Pool:
    """A padded pool with poison in every slot and between them; ``untouched``: what a call left alone, bit by bit."""

    def __init__(self, slots: int, state: Tensor, poison: float):
        size = state[0].numel()
        poison = min(poison, torch.finfo(state.dtype).max)
        self.padded = torch.full((slots, size + 24), poison, dtype=state.dtype, device=state.device)
        self.slots = self.padded[:, :size].unflatten(1, state.shape[1:])
        self._before: Tensor | None = None

    def put(self, indices: list[int], states: Tensor) -> None:
        for n, slot in enumerate(indices):
            if slot >= 0:
                self.slots[slot] = states[n]
        self._before = self.padded.clone()

    def untouched(self, except_for: list[int]) -> bool:
        bits = {2: torch.int16, 4: torch.int32}[self.padded.element_size()]
        now, before = self.padded.view(bits).clone(), self._before.view(bits).clone()
        size = self.slots[0].numel()
        for slot in except_for:
            now[slot, :size] = before[slot, :size] = 0
        return torch.equal(now, before)


@pytest.mark.parametrize("poison", [math.nan, 1e30], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("state_dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("v_first", [True, False], ids=["v_first", "k_first"])
def test_pool_in_place(v_first, state_dtype, index_dtype, poison, device):
    case = Case("pool", 2, batch=4, heads=1, value_heads=2, key_dim=64, value_dim=48, dtype=BF16)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), v_first, state_dtype)
    slots = [5, -1, 0, 2]
    pool = Pool(7, state, poison)
    pool.put(slots, state)
    indices = torch.tensor(slots, dtype=index_dtype, device=device)
    out = torch.full_like(x.v, math.nan)
    o = decode_calls.decode(x, pool.slots, slot_of=indices, out=out)
    alone = state.clone()
    expected = decode_calls.decode(x, alone)
    live = [n for n, slot in enumerate(slots) if slot >= 0]
    assert torch.equal(o[live], expected[live]) and not o[1].any()
    assert torch.equal(pool.slots[[slots[n] for n in live]], alone[live])
    assert pool.untouched([slots[n] for n in live])


def test_slot_zero_as_null(device):
    case = Case("slot zero", 1, batch=3, dtype=BF16)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    pool = Pool(4, state, math.nan)
    pool.put([3, 0, 1], state)
    indices = torch.tensor([3, 0, 1], device=device)
    o = decode_calls.decode(x, pool.slots, slot_of=indices, zero_is_null=True)
    assert not o[1].any() and o[0].any() and o[2].any() and pool.untouched([3, 1])
    o = decode_calls.decode(x, pool.slots, slot_of=indices)
    assert o[1].any() and not pool.untouched([3, 1])


def test_pool_out_of_place(device):
    """Read from one pool, written to other slots of another; empty sequences are copied, null ones are not."""
    case = Case("out of place", 5, lengths=(2, 0, 3, 0), dtype=BF16)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    source, target = Pool(6, state, math.nan), Pool(5, state, 1e30)
    source.put([1, 2, 3, 5], state)
    target.put([], state)
    read = torch.tensor([1, 2, 3, 5], device=device)
    write = torch.tensor([4, 0, -1, 2], dtype=torch.int32, device=device)
    o = decode_calls.decode(x, source.slots, slot_of=read, new_state=target.slots, new_slot_of=write)
    alone = state.clone()
    assert torch.equal(o, decode_calls.decode(x, alone))
    assert source.untouched([]) and target.untouched([4, 0, 2])
    assert torch.equal(target.slots[[4, 0, 2]], alone[[0, 1, 3]])
    assert torch.equal(alone[1], state[1]) and torch.equal(alone[3], state[3])


def test_moves_within_a_pool(device):
    """The same pool read and written, at other slots: copy on write for a prefix cache."""
    case = Case("moves", 1, batch=2, dtype=BF16)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    pool = Pool(5, state, math.nan)
    pool.put([0, 3], state)
    read, write = torch.tensor([0, 3], device=device), torch.tensor([2, 1], device=device)
    decode_calls.decode(x, pool.slots, slot_of=read, new_state=pool.slots, new_slot_of=write)
    decode_calls.decode(x, state)
    assert pool.untouched([2, 1]) and torch.equal(pool.slots[[2, 1]], state)


@pytest.mark.parametrize("new_pool", [False, True], ids=["in_place", "out_of_place"])
def test_state_per_draft_position(new_pool, device):
    """Column t gets the state after token t; the next call starts from the accepted one."""
    case = Case("per token", 11, lengths=(4, 1, 0, 3, 3), gate="long", dtype=BF16, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    table = torch.arange(20, device=device).reshape(5, 4).flip(1)
    table[4, :] = -1
    pool = Pool(21, state, math.nan)
    starts = [3, 7, 11, 15, -1]
    pool.put(starts, state)
    other = Pool(21, state, 1e30)
    other.put([], state)
    more = {"new_state": other.slots, "new_slot_of": table.int()} if new_pool else {}
    o = decode_calls.decode(x, pool.slots, slot_of=table, state_per_token=True, **more)
    truth = oracle.recurrence(x.to("cpu").replace(initial_state=state.cpu()).double())
    accuracy.Budget(1e-2, 1e-1).check("o", o[:, :8], truth.o[:, :8])
    assert not o[:, 8:].any()
    written = [int(table[n, t]) for n, length in enumerate((4, 1, 0, 3)) for t in range(length)]
    target = other if new_pool else pool
    assert target.untouched(written) and (not new_pool or pool.untouched([]))
    for n, history in enumerate(decode_calls.states_after(x.to("cpu"), state)[:4]):
        for t, after in enumerate(history[1:]):
            got = target.slots[int(table[n, t])].transpose(-1, -2)
            accuracy.Budget(1e-5, 1e-4).check(f"state {n} after {t}", got, after)


@pytest.mark.parametrize("per_token", [False, True])
def test_starts_from_the_accepted_draft(per_token, device):
    case = Case("accepted", 2, batch=3, dtype=BF16)
    x = case.inputs(device)
    x, states = laid_out(x, initial(case, x, rows=12), True, FP32)
    table = torch.arange(12, device=device, dtype=torch.int32).reshape(3, 4)
    accepted = torch.tensor([1, 4, 2], device=device)
    pool = states.clone()
    o = decode_calls.decode(x, pool, slot_of=table, num_accepted_tokens=accepted, state_per_token=per_token)
    alone = states[[0, 7, 9]].clone()
    assert torch.equal(o, decode_calls.decode(x, alone))
    expected = states.clone()
    expected[[1, 5, 9] if per_token else [0, 4, 8]] = alone
    if per_token:
        first = states[[0, 7, 9]].clone()
        decode_calls.decode(x, first, tokens=slice(0, 1))
        expected[[0, 4, 8]] = first
    assert torch.equal(pool, expected)


@pytest.mark.devices("emulator", "cuda")
def test_kernels_stay_inside(device):
    """Whatever indices, counts and boundaries contain: null slots, clamped columns, no token out of range."""
    case = Case("inside", 6, lengths=(2, 2, 2), dtype=BF16)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    pool = Pool(3, state, 1e30)
    pool.put([0, 1, 2], state)
    bad = x.replace(cu_seqlens=torch.tensor([-5, 2, 4, 1000], device=device, dtype=torch.int32))
    namespace = torch.ops.kda_cuda_emulated if device.name == "emulator" else torch.ops.kda_cuda
    for indices, accepted in (
        ([[7, 1], [1, -9], [2**31 - 1, 0]], [100, -100, 2]),
        ([[0, 1], [2, 9], [9, 9]], [0, 1, 2]),
    ):
        out = torch.full_like(x.v, math.nan)
        rows = torch.tensor(indices, device=device, dtype=torch.int32)
        counts = torch.tensor(accepted, device=device, dtype=torch.int32)
        namespace.decode(
            *decode_calls.streams(bad).values(), None, None, out, pool.slots, rows, None, None, counts, bad.cu_seqlens,
            None, None, None, None, x.scale, True, False, False, False, None, True, True, False, False,
        )  # fmt: skip
        assert out.isfinite().all() and pool.untouched([0, 1, 2])


def test_no_tokens(device):
    case = Case("no tokens", 0, batch=2)
    x = case.inputs(device)
    state = initial(case, x)
    new_state = torch.full_like(state, math.nan)
    assert decode_calls.decode(x, state, new_state=new_state).shape == (2, 0, 2, 64)
    assert torch.equal(new_state, state)
    none = {name: t[:0] for name, t in decode_calls.streams(x).items()}
    assert kda_cuda.decode(**none, state=state[:0], state_v_first=False).shape == (0, 0, 2, 64)


# ---- many steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["long", "zero", "fast"])
@pytest.mark.parametrize("state_dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_drift_over_200_steps(gate, state_dtype, device):
    """fp32 states stay at fp32 accuracy; bf16 states are no worse than rounding them after every step makes them."""
    case = Case(f"drift {gate}", 200, heads=1, value_dim=16, gate=gate, dtype=BF16, **(MODEL if gate != "zero" else {}))
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, state_dtype)
    truth = oracle.recurrence(x.to("cpu").replace(initial_state=state.cpu()).double())
    low_x, low, low_o, o = x.to("cpu"), state.cpu().clone(), [], []
    for t in range(200):
        one = slice(t, t + 1)
        o.append(decode_calls.decode(x, state, tokens=one))
        low_o.append(_reference_decode(low_x, low, one))
    for name, got, want, exact in (
        ("o", torch.cat(o, 1), torch.cat(low_o, 1), truth.o),
        ("state", state, low, truth.final_state),
    ):
        limit = accuracy.CAP[got.dtype] if state_dtype == FP32 else 1.5 * accuracy.measure(want, exact).rms
        accuracy.Budget(limit, 10 * limit).check(name, got, exact)


def _reference_decode(x: Inputs, state: Tensor, tokens: slice) -> Tensor:
    from kda_cuda import variants

    before = variants.set_emulating(False)
    try:
        return decode_calls.decode(x, state, tokens=tokens)
    finally:
        variants.set_emulating(before)


def test_steps_compose(device):
    """Any cut of the tokens into calls gives the same bits with an fp32 state."""
    case = Case("compose", 16, batch=2, gate="long", dtype=BF16, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    whole = state.clone()
    o = decode_calls.decode(x, whole)
    for cut in (1, 5, 9):
        parts = state.clone()
        pieces = [decode_calls.decode(x, parts, tokens=slice(t, t + cut)) for t in range(0, 16, cut)]
        if device.runs_kernels:
            assert torch.equal(torch.cat(pieces, 1), o) and torch.equal(parts, whole)
        else:
            torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)


def test_float64_on_the_cpu():
    case = dataclasses.replace(CASES[1], dtype=torch.float64)
    x = case.inputs()
    state = initial(case, x).double()
    truth = oracle.recurrence(x.replace(initial_state=state.clone()).double())
    o = decode_calls.decode(x, state)
    assert accuracy.measure(o, truth.o).rms < 1e-13 and accuracy.measure(state, truth.final_state).rms < 1e-13
