"""``kda_cuda.prefill``: states in pools, checkpoints, null slots, and what bad contents must not do."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import kda_cuda
from kda_cuda import testing

from ..chunk_fwd.test_chunk_fwd import INVARIANT, VARIANTS, assert_ran
from ..support import accuracy, oracle
from ..support.cases import CASES, Case, Inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")

MODEL = {"gate": "long", "beta_sigmoid": True}
SEQUENCES = Case("sequences", 451, lengths=(130, 0, 64, 193, 1, 63), heads=1, value_heads=2, dtype=torch.bfloat16,
                 initial_state=True, **MODEL)  # fmt: skip
RAGGED = Case("ragged", 211, lengths=(130, 0, 81), heads=1, value_heads=2, key_dim=60, value_dim=72, initial_state=True,
              state_v_first=True, index_dtype=torch.int64, **MODEL)  # fmt: skip
BATCH = Case("batch", 130, batch=3, heads=1, key_dim=100, value_dim=36, dtype=torch.float16, initial_state=True)


def streams_of(x: Inputs) -> dict:
    """What chunk_kda and prefill share."""
    apart = ("initial_state", "output_final_state", "chunk_size")
    return {name: value for name, value in x.public().items() if name not in apart}


def make_pool(x: Inputs, slots: int, dtype=torch.float32, pad: int = 0, fill: float = float("nan")) -> Tensor:
    """Slots that hold ``fill``, with ``pad`` more of it between them."""
    size = x.initial_state[0].numel()
    memory = torch.full((slots, size + pad), fill, dtype=dtype, device=x.q.device)
    return memory[:, :size].unflatten(1, x.initial_state.shape[1:])


def bits(x: Tensor) -> Tensor:
    return x.clone().view(torch.uint8) if x.is_contiguous() else x.contiguous().view(torch.uint8)


def memory_of(pool: Tensor) -> Tensor:
    """All of a pool's memory, padding included."""
    whole = pool.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=pool.device).set_(whole, 0, (whole.nbytes(),))


def expect(x: Inputs, deterministic: bool | str = True, **changes) -> tuple[Tensor, Tensor]:
    """o and final states by chunk_kda, which other tests hold to the recurrence."""
    with torch.inference_mode():
        return kda_cuda.chunk_kda(**x.replace(**changes).public(), deterministic=deterministic)


def assert_same(x: Tensor, y: Tensor, exact: bool) -> None:
    torch.testing.assert_close(x, y, **({"rtol": 0, "atol": 0} if exact else {}))


def tensor(x: Inputs, values, dtype=torch.int32) -> Tensor:
    return torch.tensor(list(values), dtype=dtype, device=x.q.device)


# ---- pools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SEQUENCES, RAGGED, BATCH, CASES["packed"]], ids=str)
def test_a_pool_holds_the_states(case, device):
    """In place, in any slots, with memory between them: bit by bit what chunk_kda makes of a tensor of states."""
    x = case.inputs(device)
    if x.initial_state is None:
        x = x.replace(initial_state=torch.zeros_like(x.dfinal_state))
    sequences = x.initial_state.shape[0]
    slot_of = tensor(x, range(sequences + 1, 1, -1), torch.int64)
    pool = make_pool(x, sequences + 4, pad=24)
    pool[slot_of] = x.initial_state
    before = memory_of(pool).clone()
    o, kernels = device.run(lambda: kda_cuda.prefill(**streams_of(x), state_pool=pool, slot_of=slot_of))
    assert kernels[:1] == (["chunk_fwd_clear"] if device.runs_kernels else [])
    assert_ran(kernels[1:], device)
    wanted, final = expect(x)
    assert torch.equal(o, wanted) and torch.equal(pool[slot_of], final)
    pool[slot_of] = x.initial_state
    assert torch.equal(memory_of(pool), before), "something else was written"


def test_without_slots_sequence_n_has_slot_n(device):
    x = BATCH.inputs(device)
    pool = make_pool(x, 5, fill=1e30)
    pool[:3] = x.initial_state
    o = kda_cuda.prefill(**streams_of(x), state_pool=pool)
    wanted, final = expect(x)
    assert torch.equal(o, wanted) and torch.equal(pool[:3], final) and bool((pool[3:] == 1e30).all())


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_states_are_rounded_once(dtype, v_first, device):
    """A pool of 16-bit states: read exactly, computed in fp32, rounded when written; checkpoints likewise."""
    x = SEQUENCES.inputs(device)
    initial = x.initial_state.to(dtype)
    pool, checkpoints = make_pool(x, 6, dtype), make_pool(x, 1, dtype)
    if v_first:
        x = x.replace(state_v_first=True)  # K = V: the same shapes
    pool.copy_(initial)
    slots = tensor(x, [[-1]] * 3 + [[0]] + [[-1]] * 2)
    o = kda_cuda.prefill(
        **streams_of(x), state_pool=pool, checkpoint_slots=slots, checkpoint_pool=checkpoints, **INVARIANT
    )
    wanted, final = expect(x, **INVARIANT, initial_state=initial.float())
    assert torch.equal(o, wanted) and torch.equal(pool, final.to(dtype))
    first = expect(prefix(x, 3, 64), **INVARIANT, initial_state=initial[3:4].float())[1]
    assert_same(checkpoints, first.to(dtype), device.runs_kernels)


@pytest.mark.devices("cpu")
def test_double_states(device):
    x = RAGGED.inputs(device).double()
    pool = x.initial_state.clone()
    o = kda_cuda.prefill(**streams_of(x), state_pool=pool)
    wanted, final = expect(x)
    assert torch.equal(o, wanted) and torch.equal(pool, final) and pool.dtype == torch.float64


def test_has_initial_state(device):
    """What a slot holds before a sequence starts in it is not read, even NaN."""
    x = SEQUENCES.inputs(device)
    fresh = torch.tensor([True, True, False, False, True, False], device=x.q.device)
    pool = x.initial_state.clone()
    pool[fresh] = float("nan")
    strided = torch.stack([~fresh, fresh], 1)[:, 0]
    o = kda_cuda.prefill(**streams_of(x), state_pool=pool, has_initial_state=strided)
    initial = x.initial_state.clone()
    initial[fresh] = 0
    wanted, final = expect(x, initial_state=initial)
    assert torch.equal(o, wanted) and torch.equal(pool, final)


@pytest.mark.parametrize("zero_is_null", [False, True])
def test_null_slots(zero_is_null, device):
    """Padding: zero output, nothing written, no effect on anyone else."""
    x = SEQUENCES.inputs(device)
    slot_of = [3, 1, 0 if zero_is_null else -1, 4, -7, 2]
    pool = make_pool(x, 5, pad=8, fill=1e30)
    live = [n for n, slot in enumerate(slot_of) if slot >= (1 if zero_is_null else 0)]
    pool[tensor(x, [slot_of[n] for n in live], torch.int64)] = x.initial_state[live]
    checkpoints = make_pool(x, 6)
    checkpoint_slots = tensor(x, [[n] for n in range(6)])
    o = kda_cuda.prefill(**streams_of(x), state_pool=pool, slot_of=tensor(x, slot_of), zero_is_null=zero_is_null,
                         checkpoint_slots=checkpoint_slots, checkpoint_pool=checkpoints)  # fmt: skip
    wanted, final = expect(x)
    for n, (begin, end) in enumerate(itertools.pairwise(x.sequence_bounds())):
        if n in live:
            assert torch.equal(o[:, begin:end], wanted[:, begin:end]) and torch.equal(pool[slot_of[n]], final[n])
        else:
            assert not o[:, begin:end].any()
    assert bool((pool[[s for s in range(5) if s not in [slot_of[n] for n in live]]] == 1e30).all())
    assert bool(checkpoints[1:3].isnan().all()), "sequence 1 is empty, 2 is null"
    assert not checkpoints[3].isnan().any()
    assert bool(checkpoints[0].isnan().all()) == zero_is_null, "slot 0 of the other pool is null too"


def test_nothing_of_a_null_sequence_is_looked_at(device):
    """Its checkpoints, where it starts from, and its tokens may be anything."""
    x = BATCH.inputs(device)
    x.q[1] = x.g[1] = float("nan")
    pool = x.initial_state.clone()
    o = kda_cuda.prefill(
        **streams_of(x),
        state_pool=pool,
        slot_of=tensor(x, [2, -1, 0]),
        initial_slot_of=tensor(x, [2, 99, 0]),
        checkpoint_slots=tensor(x, [[1], [1], [-1]]),
    )
    wanted, final = expect(x, initial_state=x.initial_state[[2, 1, 0]])
    assert not o[1].any() and torch.equal(o[::2], wanted[::2]) and torch.equal(pool[[2, 0]], final[::2])


def test_null_rows_of_a_batch(device):
    x = BATCH.inputs(device)
    x.v[1] = float("nan")
    pool = x.initial_state.clone()
    o = kda_cuda.prefill(**streams_of(x), state_pool=pool, slot_of=tensor(x, [2, -1, 0]))
    wanted, final = expect(x, initial_state=x.initial_state[[2, 1, 0]])
    assert not o[1].any()
    assert torch.equal(o[::2], wanted[::2]) and torch.equal(pool[[2, 0]], final[::2])
    assert torch.equal(pool[1], x.initial_state[1])


def test_tokens_after_the_last_sequence_are_padding(device):
    """A graph captured for more tokens: zero output there, whatever they hold."""
    x = RAGGED.inputs(device)
    longer = {n: torch.cat([getattr(x, n), torch.full_like(getattr(x, n)[:, :75], float("nan"))], 1)
              for n in ("q", "k", "v", "g", "beta")}  # fmt: skip
    pool = x.initial_state.clone()
    o = kda_cuda.prefill(**streams_of(x.replace(**longer)), state_pool=pool, **INVARIANT)
    wanted, final = expect(x, **INVARIANT)
    assert not o[:, 211:].any() and torch.equal(o[:, :211], wanted) and torch.equal(pool, final)


def test_indices_of_any_type_and_stride(device):
    x = SEQUENCES.inputs(device)
    slots = [4, 0, 5, 1, 3, 2]
    results = []
    for dtype in (torch.int32, torch.int64):
        table = tensor(x, [[99, slot, 77] for slot in slots], dtype)
        wide = tensor(x, [[6 + n, 50, 12 + n, 50] for n in range(6)], dtype)
        for slot_of, checkpoint_slots in ((table[:, 1], wide[:, ::2]), (table[:, 1].clone(), wide[:, ::2].clone())):
            pool = make_pool(x, 18)
            pool[:6] = x.initial_state
            o = kda_cuda.prefill(**streams_of(x), state_pool=pool, slot_of=slot_of, checkpoint_slots=checkpoint_slots)
            results.append((o, pool))
    assert not results[0][1][6].isnan().any()
    for o, pool in results[1:]:
        assert torch.equal(o, results[0][0]) and torch.equal(bits(pool), bits(results[0][1]))


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def prefix(x: Inputs, n: int, tokens: int) -> Inputs:
    """The first tokens of sequence n, by themselves."""
    if x.cu_seqlens is None:
        rows, begin = slice(n, n + 1), 0
    else:
        rows, begin = slice(None), x.sequence_bounds()[n]
    streams = {name: getattr(x, name)[rows, begin : begin + tokens] for name in ("q", "k", "v", "g", "beta")}
    return x.replace(**streams, initial_state=x.initial_state[n : n + 1], cu_seqlens=None)


def assert_checkpoints(x: Inputs, pool: Tensor, slots: list[list[int]], interval: int, exact: bool) -> int:
    """Each is the final state of its prefix; all other slots hold NaN. Returns how many there are."""
    untouched = set(range(pool.shape[0]))
    bounds = x.sequence_bounds() if x.cu_seqlens is not None else [0, x.q.shape[1]]
    for n, row in enumerate(slots):
        length = bounds[n + 1] - bounds[n] if x.cu_seqlens is not None else bounds[1]
        for j, slot in enumerate(row):
            if slot >= 0 and (j + 1) * interval <= length:
                wanted = expect(prefix(x, n, (j + 1) * interval), **INVARIANT)[1][0]
                assert_same(pool[slot], wanted.to(pool.dtype), exact)
                untouched.remove(slot)
    assert bool(pool[list(untouched)].isnan().all())
    return pool.shape[0] - len(untouched)


@pytest.mark.parametrize(("interval", "count"), [(64, 6), (128, 2), (192, 1), (256, 0)])
def test_checkpoints_are_the_final_states_of_prefixes(interval, count, device):
    x = SEQUENCES.inputs(device)
    slots = [[6 * j + n for j in range(4)] for n in range(6)]
    pool, checkpoints = x.initial_state.clone(), make_pool(x, 30, pad=8)
    o = kda_cuda.prefill(
        **streams_of(x),
        state_pool=pool,
        checkpoint_pool=checkpoints,
        checkpoint_interval=interval,
        checkpoint_slots=tensor(x, slots),
        **INVARIANT,
    )
    wanted, final = expect(x, **INVARIANT)
    assert torch.equal(o, wanted) and torch.equal(pool, final)
    assert assert_checkpoints(x, checkpoints, slots, interval, device.runs_kernels) == count


@pytest.mark.parametrize("name", ["long_memory", "varlen", "steep", "negative_eigenvalues"])
def test_checkpoints_match_the_recurrence(name, device):
    """Within the error budget, token by token in float64, as the states of chunk_kda are."""
    case = CASES[name]
    x = case.inputs(device)
    inputs = case.inputs()
    truth, rounded = oracle.recurrence(inputs.double()), accuracy.low_precision_reference(inputs, backward=False)
    before_chunks, rounded_chunks = truth.chunk_states, rounded["h"].reshape(-1, *truth.chunk_states.shape)
    bounds = x.sequence_bounds()
    rows, slots = [], torch.full((len(bounds) - 1, 3), -1)
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):  # of a sequence's chunks but the first
        first = sum(-(-(e - b) // 64) for b, e in itertools.pairwise(bounds[: n + 1]))
        for j in range(max(0, -(-(end - begin) // 64) - 1)):
            slots[n, j] = len(rows)
            rows.append(first + 1 + j)
    checkpoints = make_pool(x, len(rows))
    kda_cuda.prefill(**streams_of(x), state_pool=x.initial_state.clone(), checkpoint_pool=checkpoints,
                     checkpoint_slots=slots.to(x.q.device))  # fmt: skip
    wanted = before_chunks[rows]
    accuracy.budget(case, "h", rounded_chunks[:, rows], wanted).check("checkpoints", checkpoints, wanted)


def test_130_tokens_have_checkpoints_at_64_and_128(device):
    x = prefix(SEQUENCES.inputs(device), 0, 130)
    pool = make_pool(x, 4)
    pool[0] = x.initial_state[0]
    kda_cuda.prefill(
        **streams_of(x), state_pool=pool, slot_of=tensor(x, [0]), checkpoint_slots=tensor(x, [[3, 2, 1]]), **INVARIANT
    )
    for slot, tokens in ((3, 64), (2, 128)):
        assert_same(pool[slot], expect(prefix(x, 0, tokens), **INVARIANT)[1][0], device.runs_kernels)
    assert bool(pool[1].isnan().all())


def test_checkpoints_of_a_batch_some_not_wanted(device):
    x = BATCH.inputs(device)
    slots = [[-1, 2], [5, -3], [0, 7]]
    pool, checkpoints = x.initial_state.clone(), make_pool(x, 9, torch.bfloat16)
    kda_cuda.prefill(
        **streams_of(x), state_pool=pool, checkpoint_pool=checkpoints, checkpoint_slots=tensor(x, slots), **INVARIANT
    )
    assert assert_checkpoints(x, checkpoints, slots, 64, device.runs_kernels) == 4


VARIANTS_HERE = ["bf16_k64", "bf16_k128_sm90", "fp16_k128_c32", "fp32_k64", "bf16_k256"]


@pytest.mark.devices("emulator")
@pytest.mark.parametrize("variant", VARIANTS_HERE)
def test_checkpoints_of_every_kind_of_variant(variant, device):
    dtype, key_dim, _, arch = VARIANTS[variant]
    x = Case("checkpoints", 193, key_dim=key_dim, dtype=dtype, heads=1, value_dim=72, initial_state=True,
             **MODEL).inputs()  # fmt: skip
    pool, checkpoints = x.initial_state.clone(), make_pool(x, 4)
    call = {
        **streams_of(x),
        "state_pool": pool,
        "checkpoint_pool": checkpoints,
        "checkpoint_slots": tensor(x, [[2, 1, 0]]),
        **INVARIANT,
    }
    with testing.emulated(arch=arch):
        assert kda_cuda.explain(op="prefill", **call).forward.plan["variant"] == variant
        assert bool(checkpoints.isnan().all()), "explain runs nothing"
        kda_cuda.prefill(**call)
        assert_checkpoints(x, checkpoints, [[2, 1, 0]], 64, exact=True)
        assert torch.equal(pool, expect(x, **INVARIANT)[1])


def test_restart_from_a_checkpoint(device):
    """A prefix cache: the second request shares 128 tokens with the first, and the cached state stays."""
    x = prefix(SEQUENCES.inputs(device), 3, 193)
    pool = make_pool(x, 8)
    first = kda_cuda.prefill(
        **streams_of(x),
        state_pool=pool,
        slot_of=tensor(x, [1]),
        has_initial_state=torch.tensor([False], device=x.q.device),
        checkpoint_slots=tensor(x, [[-1, 5]]),
        **INVARIANT,
    )
    cached = pool[5].clone()
    rest = x.replace(**{name: getattr(x, name)[:, 128:] for name in ("q", "k", "v", "g", "beta")})
    second = kda_cuda.prefill(
        **streams_of(rest), state_pool=pool, slot_of=tensor(x, [2]), initial_slot_of=tensor(x, [5]), **INVARIANT
    )
    assert_same(second, first[:, 128:], device.runs_kernels)
    assert_same(pool[2], pool[1], device.runs_kernels)
    assert torch.equal(pool[5], cached)
    third = kda_cuda.prefill(
        **streams_of(x), state_pool=pool, slot_of=tensor(x, [3]), initial_slot_of=tensor(x, [-1]), **INVARIANT
    )
    assert torch.equal(third, first) and torch.equal(pool[3], pool[1]), "a null initial slot starts from zero"
