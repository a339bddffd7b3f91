"""Bad calls of ``kda_cuda.prefill``: the exact message, and nothing run or written before it."""

from __future__ import annotations

import pytest
import torch

import kda_cuda
from kda_cuda import testing

from ..ops.test_errors import HV, META, B, K, T, V, check, gated, good, packed

SLOTS = 6


def call(**changes) -> dict:
    return good() | {"state_pool": torch.zeros(SLOTS, HV, K, V)} | changes


def sequences(*lengths: int, **changes) -> dict:
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    one = {name: x[:1].repeat(1, 30, *[1] * (x.dim() - 2)) for name, x in good().items()}  # 240 tokens
    return call(**one, cu_seqlens=bounds, **changes)


def ints(*values) -> torch.Tensor:
    return torch.tensor(values)


# (call, error, message after "kda_cuda::prefill: ")
CALLS = [
    # what chunk_kda checks too
    (call(q=[1.0]), TypeError, "q is a list, expected a Tensor"),
    (call(use_gate_in_kernel=True), ValueError,
     "A_log is None, expected a Tensor [HV] (it may be absent only with a lower_bound)"),
    (call(**gated(A_log=torch.zeros(3))), ValueError, "A_log has shape [3], expected [HV=4]"),
    (call(allow_neg_eigval=True), ValueError,
     "allow_neg_eigval is True and use_beta_sigmoid_in_kernel is False, expected both True"),
    (call(**packed([0, 9])), ValueError, "cu_seqlens[-1] is 9, expected at most T=8"),
    (call(**packed([0, 5, 3])), ValueError, "cu_seqlens[2] is 3 after 5, expected no decrease"),
    # pools
    (call(state_pool=None), TypeError, "state_pool is a NoneType, expected a Tensor"),
    (call(state_pool=META), ValueError, "state_pool is on meta, expected cpu like q"),
    (call(state_pool=torch.zeros(HV, K, V)), ValueError,
     "state_pool has shape [4, 16, 24], expected 4 dimensions [slots, HV, K, V]"),
    (call(state_pool=torch.zeros(SLOTS, HV, K, V).double()), TypeError,
     "state_pool has dtype float64, expected float32 or bfloat16 or float16"),
    (call(state_pool=torch.zeros(SLOTS, HV, V, K)), ValueError,
     "state_pool has shape [6, 4, 24, 16], expected [slots=6, HV=4, K=16, V=24]"),
    (call(state_pool=torch.zeros(SLOTS, HV, K, V), state_v_first=True), ValueError,
     "state_pool has shape [6, 4, 16, 24], expected [slots=6, HV=4, V=24, K=16]"),
    (call(state_pool=torch.zeros(SLOTS, HV, V, K).transpose(2, 3)), ValueError,
     "state_pool has strides [1536, 384, 1, 16], expected every slot contiguous"),
    (call(state_pool=torch.zeros(1, HV, K, V).expand(SLOTS, -1, -1, -1)), ValueError,
     "state_pool has strides [0, 384, 24, 1], expected slots 1536 elements apart or more"),
    (call(state_pool=torch.zeros(SLOTS, HV, K, V, requires_grad=True)), ValueError,
     "an input requires a gradient, expected none: states in a pool have no gradients"),
    (call(state_pool=torch.zeros(1, HV, K, V)), ValueError,
     "state_pool has 1 slots, expected at least N=2 without slot_of"),
    # slots
    (call(slot_of=[0, 1]), TypeError, "slot_of is a list, expected a Tensor"),
    (call(slot_of=ints(0, 1).short()), TypeError, "slot_of has dtype int16, expected int32 or int64"),
    (call(slot_of=ints([0, 1])), ValueError, "slot_of has shape [1, 2], expected [N]"),
    (call(slot_of=ints(0, 1, 2)), ValueError, "slot_of has shape [3], expected [N] with N=2"),
    (call(slot_of=ints(0, 1).to("meta")), ValueError, "slot_of is on meta, expected cpu like q"),
    (call(initial_slot_of=ints(0)), ValueError, "initial_slot_of has shape [1], expected [N] with N=2"),
    (call(has_initial_state=ints(0, 1)), TypeError, "has_initial_state has dtype int64, expected bool"),
    (call(has_initial_state=ints(0, 1, 1).bool()), ValueError, "has_initial_state has shape [3], expected [N=2]"),
    (call(zero_is_null=1, slot_of=ints(0, 1)), TypeError, "zero_is_null is 1 (int), expected a bool"),
    (call(zero_is_null=True), ValueError, "zero_is_null is True and slot_of is None, expected slot_of"),
    # their contents
    (call(slot_of=ints(0, SLOTS)), ValueError, "slot_of[1] is 6, expected less than the 6 slots of its pool"),
    (call(slot_of=ints(3, 3)), ValueError, "slot_of[1] is 3 like slot_of[0], expected another slot"),
    (call(slot_of=ints(3, 1), initial_slot_of=ints(3, 7)), ValueError,
     "initial_slot_of[1] is 7, expected less than the 6 slots of its pool"),
    (call(slot_of=ints(3, 1), initial_slot_of=ints(4, 3)), ValueError,
     "initial_slot_of[1] is 3, which slot_of[0] writes, expected another slot"),
    (sequences(130, 110, checkpoint_slots=ints([2, 3], [4, 6])[:, :2], slot_of=ints(0, 3)), ValueError,
     "slot_of[1] is 3 like checkpoint_slots[0, 1], expected another slot"),
    (sequences(110, 130, checkpoint_slots=ints([2, 3], [4, 6])), ValueError,
     "checkpoint_slots[1, 1] is 6, expected less than the 6 slots of its pool"),
    (sequences(120, 120, checkpoint_slots=ints([2], [1])), ValueError,
     "checkpoint_slots[1, 0] is 1 like slot_of[1], expected another slot"),
    (sequences(120, 120, checkpoint_slots=ints([2], [5]), initial_slot_of=ints(2, 3)), ValueError,
     "initial_slot_of[0] is 2, which checkpoint_slots[0, 0] writes, expected another slot"),
    # checkpoints
    (call(checkpoint_slots=ints(0, 1)), ValueError,
     "checkpoint_slots has shape [2], expected [N, columns]"),
    (call(checkpoint_slots=ints([0, 1])), ValueError,
     "checkpoint_slots has shape [1, 2], expected [N, columns] with N=2"),
    (call(checkpoint_pool=torch.zeros(SLOTS, HV, K, V)), ValueError,
     "checkpoint_slots is None and checkpoint_pool is not, expected both or slots alone"),
    (call(checkpoint_slots=ints([0], [1]), checkpoint_pool=torch.zeros(SLOTS, 2, K, V)), ValueError,
     "checkpoint_pool has shape [6, 2, 16, 24], expected [slots=6, HV=4, K=16, V=24]"),
    (call(checkpoint_interval=96), ValueError, "checkpoint_interval is 96, expected a positive multiple of 64"),
    (call(checkpoint_interval=0), ValueError, "checkpoint_interval is 0, expected a positive multiple of 64"),
    (call(checkpoint_interval=64.0), TypeError, "checkpoint_interval is 64.0 (float), expected an int"),
    # options
    (call(deterministic="yes"), ValueError, "deterministic is 'yes', expected one of [True, 'batch_invariant']"),
    (call(workspace=torch.zeros(9)), TypeError, "workspace has dtype float32, expected uint8"),
    (call(workspace=torch.zeros(2, 9).byte()), ValueError, "workspace has shape [2, 9], expected 1 dimensions [bytes]"),
    (call(workspace=torch.zeros(18).byte()[::2]), ValueError, "workspace has strides [2], expected it contiguous"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), CALLS, ids=[m[:70] for _, _, m in CALLS])
def test_prefill(arguments, error, message):
    check(kda_cuda.prefill, arguments, error, f"kda_cuda::prefill: {message}")


@pytest.mark.devices("emulator")
def test_nothing_is_launched(device):
    for arguments, error, _ in CALLS:
        with pytest.raises(error):
            kda_cuda.prefill(**arguments)
    assert testing.take_record() == []


def test_entries_beyond_a_sequence_are_not_read():
    arguments = sequences(63, 130, checkpoint_slots=ints([99, 99], [2, -5]))
    kda_cuda.prefill(**arguments)
    assert not arguments["state_pool"][3:].any()


@pytest.mark.devices("emulator", "cuda")
def test_kernels_name_what_is_wrong(device):
    """The glue checks again what a direct torch.ops call may get wrong."""
    namespace = "kda_cuda_emulated" if device.name == "emulator" else "kda_cuda"
    op = getattr(torch.ops, namespace).prefill
    pool = torch.zeros(SLOTS, HV, K, V, device=device)
    streams = [x.to(device) for x in good().values()]
    flags = (1.0, False, False, False, False, None, False, False)

    def wrong(interval=64, workspace=None, **changes) -> str:
        names = ("state_pool", "slot_of", "initial_slot_of", "has_initial_state", "checkpoint_pool", "checkpoint_slots")
        given = {"state_pool": pool} | {n: x if x is None else x.to(device) for n, x in changes.items()}
        with pytest.raises(ValueError) as raised:
            op(*streams, None, None, *(given.get(name) for name in names), None, workspace, *flags, interval, False)
        return str(raised.value).removeprefix("kda_cuda::prefill: ")

    assert wrong(state_pool=pool[:, :2]) == "state_pool has shape [6, 2, 16, 24], expected [6, 4, 16, 24]"
    assert wrong(state_pool=pool[:1]) == (
        "state_pool has shape [1, 4, 16, 24], expected a slot for each of 2 sequences without slot_of"
    )
    overlapping = "state_pool is strided inside a slot, or its slots overlap: expected only the slots strided"
    assert wrong(state_pool=pool[:1].expand(SLOTS, -1, -1, -1)) == overlapping
    assert wrong(slot_of=ints(1, 2, 3)) == "slot_of has shape [3], expected [2]"
    assert wrong(slot_of=ints(1, 2).float()) == "slot_of has a dtype that is no index, expected int32 or int64"
    assert wrong(initial_slot_of=ints([1, 2])) == "initial_slot_of has shape [1, 2], expected [2]"
    assert wrong(has_initial_state=ints(1, 2)) == "has_initial_state is not a contiguous bool tensor"
    assert wrong(checkpoint_slots=ints(1, 2)) == "checkpoint_slots has shape [2], expected [2, columns]"
    assert wrong(checkpoint_slots=ints([1], [2]), interval=32) == (
        "checkpoint_interval is 32, expected a positive multiple of 64"
    )
    small = torch.zeros(1 << 20, dtype=torch.uint8, device=device)
    assert wrong(workspace=small[1:]) == "workspace is not aligned to 16 bytes"
    needed = wrong(workspace=small[:16]).removeprefix("workspace has 16 bytes, expected at least ")
    o = op(*streams, None, None, pool, *[None] * 6, small[: int(needed)], *flags, 64, False)
    assert o.shape == (B, T, HV, V)


@pytest.mark.devices("cuda")
def test_contents_on_the_gpu_are_checked_on_request(device, monkeypatch):
    arguments = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in call(slot_of=ints(3, 3)).items()}
    kda_cuda.prefill(**arguments)
    monkeypatch.setenv("KDA_CUDA_CHECK", "1")
    with pytest.raises(ValueError, match=r"slot_of\[1\] is 3 like slot_of\[0\], expected another slot$"):
        kda_cuda.prefill(**arguments)


@pytest.mark.devices("cuda")
def test_kernels_refuse_pointers_of_the_host(device):
    """A direct torch.ops call with a pool, slots or lengths that are not on the GPU."""
    streams = [x.to(device) for x in good().values()]
    flags = (1.0, False, False, False, False, None, False, False, 64, False)
    pool = torch.zeros(SLOTS, HV, K, V)
    with pytest.raises(ValueError, match=r"^kda_cuda::prefill: state_pool is on another device than q$"):
        torch.ops.kda_cuda.prefill(*streams, None, None, pool, *[None] * 7, *flags)
    with pytest.raises(ValueError, match=r"^kda_cuda::prefill: slot_of is on another device than q$"):
        torch.ops.kda_cuda.prefill(*streams, None, None, pool.to(device), ints(0, 1), *[None] * 6, *flags)
    with pytest.raises(ValueError, match=r"^kda_cuda::chunk_fwd: initial_state is on another device than q$"):
        torch.ops.kda_cuda.chunk_fwd(*streams, None, None, pool[:B], None, *flags[:7], True, 64, False)
