"""``prefill`` as an op: contents that nobody checks, opcheck, compile, and nothing to do."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import kda_cuda
from kda_cuda import library
from kda_cuda.schemas import Prefill

from ..support.cases import Inputs
from .test_prefill import BATCH, RAGGED, SEQUENCES, bits, expect, make_pool, streams_of, tensor

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def raw_op(device):
    namespace = {"cpu": library.NAMESPACE, "emulator": library.NAMESPACE_EMULATED, "cuda": library.NAMESPACE}
    return getattr(torch.ops, namespace[device.name]).prefill


def raw_arguments(x: Inputs, pool, slot_of=None, initial=None, checkpoint_pool=None, checkpoint_slots=None,
                  workspace=None) -> Prefill:  # fmt: skip
    inputs = {name: getattr(x, name) for name in Prefill._fields if hasattr(x, name)}
    return Prefill(
        **inputs, state_pool=pool, slot_of=slot_of, initial_slot_of=initial, has_initial_state=None,
        checkpoint_pool=checkpoint_pool, checkpoint_slots=checkpoint_slots, workspace=workspace, zero_is_null=False,
        checkpoint_interval=64, batch_invariant=False,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_slots_out_of_range_are_null(dtype, device):
    """The public function refuses them where it can read them; the kernels never touch what they point to."""
    x = SEQUENCES.inputs(device)
    huge = torch.iinfo(dtype).max
    slot_of = [2, huge, 6, 3, torch.iinfo(dtype).min, 5]
    memory = torch.full((18, *x.initial_state.shape[1:]), float("nan"), device=x.q.device)
    memory[::2] = 1e30
    pool = memory[6:12]  # six slots among poisoned neighbours
    pool[[2, 3, 5]] = x.initial_state[[0, 3, 5]]
    before = memory.clone()
    guard = torch.full((6, *x.initial_state.shape[1:]), float("nan"), device=x.q.device)
    wild = tensor(x, [[huge, 4], [-9, 4], [0, 1], [2, 3], [1, 1], [0, huge]], dtype)  # of guard's two slots
    o = raw_op(device)(*raw_arguments(x, pool, tensor(x, slot_of, dtype), None, guard[2:4], wild))
    wanted, final = expect(x)
    for n, (begin, end) in enumerate(itertools.pairwise(x.sequence_bounds())):
        if n in (0, 3, 5):
            assert torch.equal(o[:, begin:end], wanted[:, begin:end]) and torch.equal(pool[slot_of[n]], final[n])
        else:
            assert not o[:, begin:end].any()
    memory[[8, 9, 11]] = before[[8, 9, 11]]
    assert torch.equal(bits(memory), bits(before)) and bool(guard.isnan().all())


GARBAGE = {
    "decreasing": [0, 150, 30, 211],
    "negative": [-5, 60, -1, 211],
    "beyond": [0, 500, 100_000, 2**31 - 1],
    "all beyond": [2**31 - 1] * 4,
    "backwards": [211, 140, 70, 0],
    "late": [100, 120, 120, 130],
}


@pytest.mark.devices("emulator", "cuda")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("bounds", GARBAGE.values(), ids=list(GARBAGE))
def test_garbage_in_cu_seqlens_stays_in_range(bounds, dtype, device):
    """NaN before and after every input, every pool and the workspace: none is read, none is overwritten."""
    x = RAGGED.inputs(device)

    def guarded(y: Tensor, size: int | None = None, fill: float = float("nan"), dim: int = 1) -> Tensor:
        size = y.shape[dim] if size is None else size
        shape = [*y.shape[:dim], size + 128, *y.shape[dim + 1 :]]
        return torch.full(shape, fill, dtype=y.dtype, device=y.device).narrow(dim, 64, size)

    streams = {name: guarded(getattr(x, name)).copy_(getattr(x, name)) for name in ("q", "k", "v", "g", "beta")}
    pool = guarded(x.initial_state, dim=0).copy_(x.initial_state)
    checkpoints = guarded(x.initial_state, dim=0).zero_()
    workspace = guarded(torch.empty(0, dtype=torch.uint8, device=x.q.device), 1 << 22, 171, 0).zero_()
    extremes = {2**31 - 1: torch.iinfo(dtype).max, -5: torch.iinfo(dtype).min}
    cu_seqlens = tensor(x, [extremes.get(b, b) for b in bounds], dtype)
    slots = tensor(x, [[0, 1], [2, -1], [-1, -1]])
    x = x.replace(**streams, cu_seqlens=cu_seqlens)
    o = raw_op(device)(*raw_arguments(x, pool, None, None, checkpoints, slots, workspace))
    assert o.shape == x.v.shape
    for y in (pool, checkpoints):
        assert bool(y.isfinite().all()), "something outside was read"
        whole = torch.as_strided(y, (y.shape[0] + 128, *y.shape[1:]), y.stride(), 0)
        assert bool(whole[:64].isnan().all() and whole[-64:].isnan().all()), "something outside was written"
    around = torch.as_strided(workspace, (workspace.numel() + 128,), (1,), 0)
    assert bool((around[:64] == 171).all() and (around[-64:] == 171).all())


# ---- the op as torch sees it -----------------------------------------------------------------------------------------


def op_samples(device="cpu") -> list[tuple]:
    sequences, batch = RAGGED.inputs(device), BATCH.inputs(device)
    slots, checkpoint_slots = tensor(sequences, [4, -1, 2]), tensor(sequences, [[0, 1], [-1, -1], [3, -1]])
    workspace = torch.zeros(1 << 22, dtype=torch.uint8, device=sequences.q.device)
    return [
        raw_arguments(sequences, make_pool(sequences, 5, fill=0.5), slots, None, None, checkpoint_slots),
        raw_arguments(sequences, make_pool(sequences, 5, pad=4, fill=0.5), slots, tensor(sequences, [0, 1, 3]),
                      make_pool(sequences, 4, fill=0.0), checkpoint_slots, workspace),
        raw_arguments(batch, make_pool(batch, 3, torch.bfloat16, fill=0.5)),
    ]  # fmt: skip


def test_opcheck(device):
    op = raw_op(device).default
    utilities = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if device.name == "cpu":
        utilities.append("test_aot_dispatch_static")
    for arguments in op_samples(device):
        torch.library.opcheck(op, arguments, test_utils=utilities)


def test_opcheck_of_the_reference_anywhere():
    for arguments in op_samples():
        torch.library.opcheck(torch.ops.kda_cuda_reference.prefill.default, arguments)


def test_compiled_without_a_break(device):
    x = RAGGED.inputs(device)
    slots = tensor(x, [[3, 4], [-1, -1], [5, -1]])

    def step(pool: Tensor) -> Tensor:
        return kda_cuda.prefill(**streams_of(x), state_pool=pool, checkpoint_slots=slots) + 1

    pools = [make_pool(x, 6, fill=0.25) for _ in range(2)]
    eager = step(pools[0])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(pools[1])
    assert torch.equal(eager, compiled) and torch.equal(*pools)


def test_nothing_is_read_on_the_host():
    """Shapes without contents are all that the function needs, so that a graph can be captured."""
    x = SEQUENCES.inputs("meta")
    slots = torch.empty(6, dtype=torch.int32, device="meta")
    o = kda_cuda.prefill(**streams_of(x), state_pool=make_pool(x, 9), slot_of=slots, initial_slot_of=slots,
                         zero_is_null=True, has_initial_state=slots > 0, checkpoint_slots=slots.unsqueeze(1),
                         checkpoint_pool=make_pool(x, 2, torch.bfloat16))  # fmt: skip
    assert o.is_meta and o.shape == x.v.shape


def test_inputs_are_untouched(device):
    x = SEQUENCES.inputs(device)
    before = x.map(torch.clone)
    kda_cuda.prefill(**streams_of(x), state_pool=x.initial_state.clone())
    for name, y in x.tensors().items():
        assert torch.equal(y, before.tensors()[name]), name


@pytest.mark.parametrize("case", [RAGGED, BATCH], ids=str)
def test_nothing_to_do(case, device):
    """No tokens, or no sequences: states are copied, or nothing is."""
    x = case.inputs(device)
    none = {name: getattr(x, name)[:, :0] for name in ("q", "k", "v", "g", "beta")}
    x = x.replace(**none, cu_seqlens=None if x.cu_seqlens is None else torch.zeros_like(x.cu_seqlens))
    pool = make_pool(x, 6)
    pool[[4, 0, 2]] = x.initial_state
    o = kda_cuda.prefill(**streams_of(x), state_pool=pool, slot_of=tensor(x, [1, 3, 5]),
                         initial_slot_of=tensor(x, [4, 0, 2]), checkpoint_slots=tensor(x, [[5], [1], [3]]))  # fmt: skip
    assert o.shape == x.v.shape and torch.equal(pool[[1, 3, 5]], x.initial_state)
    if x.cu_seqlens is None:
        rows = {name: getattr(x, name)[:0] for name in ("q", "k", "v", "g", "beta")}
        before = pool.clone()
        assert kda_cuda.prefill(**streams_of(x.replace(**rows)), state_pool=pool).shape[0] == 0
        assert torch.equal(bits(pool), bits(before))
