"""Bad calls of decode and commit: the exact message, and nothing run or written before it."""

from __future__ import annotations

import pytest
import torch

import kda_cuda
from kda_cuda import DraftRecords, testing
from kda_cuda.schemas import Decode

from ..ops.test_errors import HV as HEADS
from ..ops.test_errors import META, B, H, K, T, V, check, gated, good, packed

SLOTS = 6


def pool(**change) -> dict:
    return {"state": torch.zeros(SLOTS, HEADS, K, V), "slot_of": torch.tensor([4, 2])} | change


def table(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows)


def records(k=(B, T, H, K), u=(B, T, HEADS, V), g=(B, T, HEADS, K), dtype=torch.float32) -> DraftRecords:
    return DraftRecords(*(torch.zeros(shape, dtype=dtype) for shape in (k, u, g)))


STATE = torch.zeros(B, HEADS, K, V)
PARENTS = torch.arange(-1, T - 1).expand(B, T)
COLUMNS = torch.arange(2 * T).reshape(B, T)


def tree(**change) -> dict:
    return pool(records=records()) | change


def shared(start: int) -> dict:
    """A state per draft, in the pool that the drafts start from."""
    states = torch.zeros(2 * T + 2, HEADS, K, V)
    return {
        "state": states,
        "slot_of": table(start, 2 * T),
        "new_state": states,
        "new_slot_of": COLUMNS,
        "state_per_token": True,
        "parent_token": PARENTS,
    }


DECODE_CALLS = [
    ({"v": META}, ValueError, "v is on meta, expected cpu like q"),
    ({"k": torch.zeros(B, T, H, 12)}, ValueError, "k has shape [2, 8, 2, 12], expected [B=2, T=8, H=2, K=16]"),
    (gated(A_log=torch.zeros(3)), ValueError, "A_log has shape [3], expected [HV=4]"),
    (packed([0, 9]), ValueError, "cu_seqlens[-1] is 9, expected at most T=8"),
    ({"state_per_token": 1}, TypeError, "state_per_token is 1 (int), expected a bool"),
    ({"state": [0.0]}, TypeError, "state is a list, expected a Tensor"),
    ({"state": STATE.to("meta")}, ValueError, "state is on meta, expected cpu like q"),
    ({"state": STATE[0]}, ValueError, "state has shape [4, 16, 24], expected 4 dimensions [slots, HV, K, V]"),
    ({"state": STATE.double()}, TypeError, "state has dtype float64, expected float32 or bfloat16 or float16"),
    ({"state": STATE, "state_v_first": True}, ValueError,
     "state has shape [2, 4, 16, 24], expected [slots=2, HV=4, V=24, K=16]"),
    ({"state": torch.zeros(3, HEADS, K, V)}, ValueError,
     "state has shape [3, 4, 16, 24], expected [slots=2, HV=4, K=16, V=24]"),
    ({"state": torch.zeros(B, HEADS, V, K).mT}, ValueError,
     "state has strides [1536, 384, 1, 16], expected every slot contiguous"),
    ({"slot_of": table(0, 1)}, ValueError, "slot_of is given and state is None, expected both"),
    (pool(slot_of=[0, 1]), TypeError, "slot_of is a list, expected a Tensor"),
    (pool(slot_of=torch.zeros(2, device="meta").int()), ValueError, "slot_of is on meta, expected cpu like q"),
    (pool(slot_of=torch.tensor(1)), ValueError, "slot_of has shape [], expected [N] or [N, columns]"),
    (pool(slot_of=torch.zeros(2)), TypeError, "slot_of has dtype float32, expected int32 or int64"),
    (pool(slot_of=table(1, 2, 3)), ValueError, "slot_of has shape [3], expected [N] or [N, columns] with N=2"),
    (pool(slot_of=torch.zeros(3, 2).long().T), ValueError,
     "slot_of has shape [2, 3] and strides [1, 2], expected at least one column, and columns side by side"),
    (pool(slot_of=torch.zeros(2, 0).long()), ValueError,
     "slot_of has shape [2, 0] and strides [1, 1], expected at least one column, and columns side by side"),
    (pool(slot_of=table(1, SLOTS)), ValueError, "slot_of has 6 for sequence 1, expected less than slots=6"),
    (pool(slot_of=table(3, 3)), ValueError, "slot_of has slot 3 for sequences 0 and 1, expected one each"),
    (pool(new_state=STATE.bfloat16()), TypeError, "new_state has dtype bfloat16, expected float32"),
    (pool(new_state=torch.zeros(3, HEADS, K, V)), ValueError,
     "new_state has shape [3, 4, 16, 24], expected [slots=2, HV=4, K=16, V=24]"),
    ({"new_slot_of": table(0, 1)}, ValueError, "new_slot_of is given and new_state is None, expected both"),
    (pool(new_state=torch.zeros(SLOTS, HEADS, K, V), new_slot_of=table(1, 1)), ValueError,
     "new_slot_of has slot 1 for sequences 0 and 1, expected one each"),
    (pool(num_accepted_tokens=table(1, 1)), ValueError,
     "num_accepted_tokens is given, expected slot_of [N, columns] with it"),
    (pool(slot_of=table((0, 1), (2, 3)), num_accepted_tokens=table(1, 3)), ValueError,
     "num_accepted_tokens[1] is 3, expected 1 to 2"),
    (pool(slot_of=table((0, 1), (-1, 3)), num_accepted_tokens=table(1, 0)), ValueError,
     "num_accepted_tokens[1] is 0, expected 1 to 2"),
    (pool(slot_of=table((-1, 7), (2, 7)), num_accepted_tokens=table(1, 1)), ValueError,
     "slot_of has 7 for sequence 1, expected less than slots=6"),
    (pool(slot_of=table((0, 1), (2, 3)), num_accepted_tokens=table((1, 3))), ValueError,
     "num_accepted_tokens has shape [1, 2], expected [N]"),
    (pool(state_per_token=True), ValueError,
     "state_per_token is True, expected slot_of [N, columns] of a pool to write to"),
    (pool(state_per_token=True, slot_of=table((0, 1), (2, 3))), ValueError,
     "slot_of has shape [2, 2], expected a column for each of the T=8 tokens"),
    (tree(parent_token=[0]), TypeError, "parent_token is a list, expected a Tensor"),
    (tree(parent_token=PARENTS.to("meta")), ValueError, "parent_token is on meta, expected cpu like q"),
    (tree(parent_token=PARENTS[0]), ValueError, "parent_token has shape [8], expected 2 dimensions [B, T]"),
    (tree(parent_token=PARENTS.float()), TypeError, "parent_token has dtype float32, expected int32 or int64"),
    (tree(parent_token=PARENTS[:, :7]), ValueError, "parent_token has shape [2, 7], expected [B=2, T=8]"),
    (tree(parent_token=PARENTS.T.contiguous().T), ValueError,
     "parent_token has strides [1, 2], expected the last dimension contiguous"),
    (tree(parent_token=PARENTS + 1), ValueError, "parent_token is 0 for token 0 of sequence 0, expected -1"),
    (tree(parent_token=torch.cat([PARENTS[:, :7], table((5,), (7,))], 1)), ValueError,
     "parent_token is 7 for token 7 of sequence 1, expected -1 to 6"),
    (tree(parent_token=PARENTS - 1), ValueError, "parent_token is -2 for token 0 of sequence 0, expected -1"),
    (pool(parent_token=PARENTS), ValueError,
     "parent_token is given and a last state would be written, expected records, or state_per_token with new_state"),
    (pool(parent_token=PARENTS, new_state=STATE.clone()), ValueError,
     "parent_token is given and a last state would be written, expected records, or state_per_token with new_state"),
    (pool(parent_token=PARENTS, slot_of=COLUMNS[:, :8], state_per_token=True), ValueError,
     "parent_token is given and a last state would be written, expected records, or state_per_token with new_state"),
    (shared(5), ValueError, "new_slot_of has slot 5 for sequence 0, expected no slot that a tree starts from"),
    ({"records": 3}, TypeError, "records is a int, expected DraftRecords"),
    ({"records": records(k=(B, T, HEADS, K))}, ValueError,
     "records.k has shape [2, 8, 4, 16], expected [B=2, T=8, H=2, K=16]"),
    ({"records": records(u=(B, T, HEADS, K))}, ValueError,
     "records.u has shape [2, 8, 4, 16], expected [B=2, T=8, HV=4, V=24]"),
    ({"records": records(dtype=torch.bfloat16)}, TypeError, "records.k has dtype bfloat16, expected float32"),
    ({"out": torch.zeros(B, T, HEADS, K)}, ValueError, "out has shape [2, 8, 4, 16], expected [B=2, T=8, HV=4, V=24]"),
    ({"out": torch.zeros(B, T, HEADS, V).half()}, TypeError, "out has dtype float16, expected float32"),
    ({"out": torch.zeros(B, T, V, HEADS).mT}, ValueError,
     "out has strides [768, 96, 1, 4], expected the last dimension contiguous"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), DECODE_CALLS, ids=[m[:70] for _, _, m in DECODE_CALLS])
def test_decode(change, error, message):
    check(kda_cuda.decode, good() | change, error, f"kda_cuda::decode: {message}")


def commit_call(**change) -> dict:
    return {"records": records(), "num_accepted_tokens": table(1, 2), "state": STATE.clone()} | change


PATH = {"num_accepted_tokens": None, "parent_token": PARENTS, "accepted_token": table(3, -1)}
COMMIT_CALLS = [
    ({"records": None}, TypeError, "records is a NoneType, expected DraftRecords"),
    ({"records": records(g=(B, T, H, K))}, ValueError,
     "records.g has shape [2, 8, 2, 16], expected [B=2, T=8, HV=4, K=16]"),
    ({"num_accepted_tokens": 3}, TypeError, "num_accepted_tokens is a int, expected a Tensor"),
    ({"num_accepted_tokens": table(1, 2, 3)}, ValueError, "num_accepted_tokens has shape [3], expected [N] with N=2"),
    ({"num_accepted_tokens": table(1, 9)}, ValueError, "num_accepted_tokens[1] is 9, expected 0 to 8"),
    ({"num_accepted_tokens": table(99, 9), "slot_of": table(-1, 0)}, ValueError,
     "num_accepted_tokens[1] is 9, expected 0 to 8"),
    ({"num_accepted_tokens": None}, ValueError,
     "got [], expected num_accepted_tokens, or parent_token and accepted_token"),
    ({"accepted_token": table(0, 1)}, ValueError,
     "got ['num_accepted_tokens', 'accepted_token'], expected num_accepted_tokens, or parent_token and accepted_token"),
    ({"parent_token": PARENTS}, ValueError,
     "got ['num_accepted_tokens', 'parent_token'], expected num_accepted_tokens, or parent_token and accepted_token"),
    (PATH | {"accepted_token": None}, ValueError,
     "got ['parent_token'], expected num_accepted_tokens, or parent_token and accepted_token"),
    (PATH | {"accepted_token": 3}, TypeError, "accepted_token is a int, expected a Tensor"),
    (PATH | {"accepted_token": table(1)}, ValueError, "accepted_token has shape [1], expected [N] with N=2"),
    (PATH | {"accepted_token": table(-1, 8)}, ValueError, "accepted_token[1] is 8, expected -1 to 7"),
    (PATH | {"accepted_token": table(-2, 8), "slot_of": table(-1, 0)}, ValueError,
     "accepted_token[1] is 8, expected -1 to 7"),
    (PATH | {"parent_token": PARENTS[:1]}, ValueError, "parent_token has shape [1, 8], expected [B=2, T=8]"),
    (PATH | {"parent_token": PARENTS + 1}, ValueError,
     "parent_token is 0 for token 0 of sequence 0, expected -1"),
    ({"state": None}, TypeError, "state is a NoneType, expected a Tensor"),
    ({"state": torch.zeros(B, HEADS, V, K)}, ValueError,
     "state has shape [2, 4, 24, 16], expected [slots=2, HV=4, K=16, V=24]"),
    ({"slot_of": table((0, 1), (1, 0))}, ValueError, "slot_of has shape [2, 2], expected [N]"),
    ({"slot_of": table(1, 1)}, ValueError, "slot_of has slot 1 for sequences 0 and 1, expected one each"),
    ({"zero_is_null": None}, TypeError, "zero_is_null is None (NoneType), expected a bool"),
    ({"cu_seqlens": table(0, 4, 8)}, ValueError, "q has shape [2, 8, 2, 16], expected B=1 with cu_seqlens"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), COMMIT_CALLS, ids=[m[:70] for _, _, m in COMMIT_CALLS])
def test_commit(change, error, message):
    check(kda_cuda.commit, commit_call() | change, error, f"kda_cuda::commit: {message}")


def test_no_sequence_accepts_more_than_it_has():
    one = records(k=(1, T, H, K), u=(1, T, HEADS, V), g=(1, T, HEADS, K))
    call = commit_call(records=one, cu_seqlens=table(0, 3, 8), num_accepted_tokens=table(4, 5))
    check(kda_cuda.commit, call, ValueError, "kda_cuda::commit: num_accepted_tokens[0] is 4, expected 0 to 3")


RECURRENT_CALLS = [
    ({"ssm_state_indices": table(0, 1)}, ValueError,
     "ssm_state_indices is given and initial_state is None, expected both"),
    ({"initial_state": STATE, "ssm_state_indices": table(1, 1), "inplace_final_state": True}, ValueError,
     "ssm_state_indices has slot 1 for sequences 0 and 1, expected one each"),
    ({"initial_state": STATE, "num_accepted_tokens": table(1, 1)}, ValueError,
     "num_accepted_tokens is given, expected ssm_state_indices [N, columns] with it"),
    ({"inplace_final_state": True}, ValueError,
     "inplace_final_state is True and initial_state is None, expected a state to write to"),
    ({"inplace_final_state": 1}, TypeError, "inplace_final_state is 1 (int), expected a bool"),
    ({"out": torch.zeros(B)}, ValueError, "out has shape [2], expected 4 dimensions [B, T, HV, V]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), RECURRENT_CALLS, ids=[m[:70] for _, _, m in RECURRENT_CALLS])
def test_fused_recurrent_kda(change, error, message):
    check(kda_cuda.fused_recurrent_kda, good() | change, error, f"kda_cuda::fused_recurrent_kda: {message}")


GRADIENTS = {
    "ssm_state_indices": {"ssm_state_indices": table(0, 1)},
    "num_accepted_tokens": {"num_accepted_tokens": table(1, 1)},
    "out": {"out": torch.zeros(B, T, HEADS, V)},
    "inplace_final_state": {"inplace_final_state": True},
}


@pytest.mark.parametrize("name", list(GRADIENTS))
def test_no_gradients_in_pools(name):
    call = good() | {"initial_state": STATE.clone().requires_grad_()} | GRADIENTS[name]
    with pytest.raises(ValueError) as raised:
        kda_cuda.fused_recurrent_kda(**call)
    assert str(raised.value) == (
        f"kda_cuda::fused_recurrent_kda: {name} is given and an argument requires a gradient, expected one of them"
    )
    with torch.no_grad():
        kda_cuda.fused_recurrent_kda(**good(), initial_state=call["initial_state"], output_final_state=True)


def test_decode_has_no_gradients():
    call = good()
    call["v"].requires_grad_()
    with pytest.raises(ValueError) as raised:
        kda_cuda.decode(**call)
    assert str(raised.value) == (
        "kda_cuda::decode: an argument requires a gradient, expected none: decode has no gradients (use chunk_kda)"
    )


@pytest.mark.devices("emulator")
def test_nothing_is_launched(device):
    for change, error, _ in DECODE_CALLS:
        with pytest.raises(error):
            kda_cuda.decode(**(good() | change))
    assert testing.take_record() == []


def raw_call(device, **change) -> Decode:
    """Arguments of torch.ops.kda_cuda.decode."""
    call = {name: x.to(device) for name, x in good().items()} | {
        "A_log": None, "dt_bias": None, "out": torch.zeros(B, T, HEADS, V, device=device),
        "state": torch.zeros(SLOTS, HEADS, K, V, device=device), "slot_of": torch.tensor([4, 2], device=device),
        "new_state": None, "new_slot_of": None, "num_accepted_tokens": None, "cu_seqlens": None, "parent_token": None,
        "record_k": None, "record_u": None, "record_g": None, "scale": 1.0, "use_qk_l2norm": True, "use_gate": False,
        "use_beta_sigmoid": False, "allow_neg_eigval": False, "lower_bound": None, "state_v_first": False,
        "in_place": True, "state_per_token": False, "zero_is_null": False,
    }  # fmt: skip
    return Decode(**call | change)


RAW_CALLS = [
    ({"q": torch.zeros(B, T, K)}, "q has shape [2, 8, 16], expected 4 dimensions"),
    ({"k": torch.zeros(B, T, H, 12)}, "k has shape [2, 8, 2, 12], expected [2, 8, 2, 16]"),
    ({"beta": torch.zeros(B, T, H)}, "beta has shape [2, 8, 2], expected [2, 8, 4]"),
    ({"out": torch.zeros(B, T, HEADS, K)}, "out has shape [2, 8, 4, 16], expected [2, 8, 4, 24]"),
    ({"v": torch.zeros(B, T, HEADS, V).half()}, "q, k, v and out differ in dtype"),
    ({"g": torch.zeros(B, T, HEADS, K).half()}, "g has neither the dtype of q nor float32"),
    ({"q": torch.zeros(B, T, K, H).mT}, "q is strided in its last dimension, expected it contiguous"),
    ({"A_log": torch.zeros(3)}, "A_log has shape [3], expected [4]"),
    ({"state": torch.zeros(SLOTS, HEADS, V, K)}, "state has shape [6, 4, 24, 16], expected [6, 4, 16, 24]"),
    ({"state": torch.zeros(SLOTS, HEADS, K, V).double()},
     "state has a dtype that kernels do not take, expected float32, float16 or bfloat16"),
    ({"state": torch.zeros(SLOTS, HEADS, V, K).mT},
     "state is strided inside a slot, or its slots overlap: expected only the slots strided"),
    ({"state": torch.zeros(1, HEADS, K, V).expand(SLOTS, HEADS, K, V)},
     "state is strided inside a slot, or its slots overlap: expected only the slots strided"),
    ({"slot_of": None}, "state has shape [6, 4, 16, 24], expected [2, 4, 16, 24]"),
    ({"slot_of": torch.zeros(2)}, "slot_of has a dtype that is no index, expected int32 or int64"),
    ({"slot_of": torch.zeros(3).int()}, "slot_of has shape [3], expected [2] or [2, columns]"),
    ({"new_state": torch.zeros(B, HEADS, K, V)}, "in_place is True, expected state and no new_state with it"),
    ({"in_place": False, "new_state": torch.zeros(B, HEADS, K, V).bfloat16()},
     "new_state has another dtype than state"),
    ({"in_place": False, "state_per_token": True},
     "state_per_token is True, expected a slot for the state after each token"),
    ({"slot_of": None, "state": torch.zeros(B, HEADS, K, V), "num_accepted_tokens": torch.ones(2).int()},
     "num_accepted_tokens is given, expected slot_of [N, columns] with it"),
    ({"parent_token": PARENTS[:, :7]}, "parent_token has shape [2, 7], expected [2, 8]"),
    ({"parent_token": PARENTS.float()}, "parent_token has a dtype that is no index, expected int32 or int64"),
    ({"parent_token": PARENTS.T.contiguous().T},
     "parent_token is strided in its last dimension, expected it contiguous"),
    ({"parent_token": PARENTS},
     "parent_token is given and a last state would be written, expected records, or state_per_token with new_state"),
    ({"record_k": torch.zeros(B, T, H, K)}, "record_k, record_u and record_g are given in part, expected all or none"),
    ({"cu_seqlens": torch.zeros(3).int()}, "q has shape [2, 8, 2, 16], expected B=1 with cu_seqlens"),
]  # fmt: skip


def moved(x: torch.Tensor, device) -> torch.Tensor:
    """To another device as it is, expanded dimensions included."""
    once = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())]
    return once.to(device).expand(x.shape)


@pytest.mark.devices("emulator", "cuda")
@pytest.mark.parametrize(("change", "message"), RAW_CALLS, ids=[m[:60] for _, m in RAW_CALLS])
def test_kernels_name_what_is_wrong(change, message, device):
    """The glue checks again: a direct torch.ops call never reads out of range."""
    namespace = torch.ops.kda_cuda_emulated if device.name == "emulator" else torch.ops.kda_cuda
    change = {name: moved(x, device) if isinstance(x, torch.Tensor) else x for name, x in change.items()}
    namespace.decode(*raw_call(device))
    with pytest.raises(ValueError) as raised:
        namespace.decode(*raw_call(device, **change))
    assert str(raised.value) == f"kda_cuda::decode: {message}"


@pytest.mark.devices("emulator", "cuda")
def test_commit_takes_one_form(device):
    namespace = torch.ops.kda_cuda_emulated if device.name == "emulator" else torch.ops.kda_cuda
    states = [x.to(device) for x in (STATE.clone(), *records())]
    parents, accepted = PARENTS.to(device), table(1, 2).to(device)
    for given in ((None, None, None), (accepted, parents, None), (None, parents, None), (accepted, parents, accepted)):
        count, tree, last = given
        with pytest.raises(ValueError) as raised:
            namespace.decode_commit(states[0], None, None, None, *states[1:], count, None, tree, last, False, False)
        assert str(raised.value) == (
            "kda_cuda::decode_commit: expected num_accepted_tokens, or parent_token and accepted_token"
        )


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("name", ["k", "g", "out", "state", "slot_of", "cu_seqlens", "parent_token", "record_u"])
def test_kernels_refuse_pointers_of_the_host(name, device):
    tensors = {
        "k": torch.zeros(B, T, H, K),
        "g": torch.zeros(B, T, HEADS, K),
        "out": torch.zeros(B, T, HEADS, V),
        "state": torch.zeros(SLOTS, HEADS, K, V),
        "slot_of": torch.tensor([4, 2]),
        "cu_seqlens": torch.tensor([0, 3, T]),
        "parent_token": PARENTS,
        "record_u": torch.zeros(B, T, HEADS, V),
    }
    with pytest.raises(ValueError, match=rf"^kda_cuda::decode: {name} is on another device than q$"):
        torch.ops.kda_cuda.decode(*raw_call(device, **{name: tensors[name]}))


@pytest.mark.devices("cuda")
def test_commit_refuses_pointers_of_the_host(device):
    records = [torch.zeros(B, T, H, K), torch.zeros(B, T, HEADS, V), torch.zeros(B, T, HEADS, K)]
    state, accepted = torch.zeros(B, HEADS, K, V), torch.ones(B, dtype=torch.int32)
    call = [state, None, None, None, *records, accepted, None, PARENTS, accepted]
    names = {
        4: "record_k",
        5: "record_u",
        6: "record_g",
        7: "num_accepted_tokens",
        9: "parent_token",
        10: "accepted_token",
    }
    for i, name in names.items():
        given = [x if x is None or j == i else x.to(device) for j, x in enumerate(call)]
        with pytest.raises(ValueError, match=rf"^kda_cuda::decode_commit: {name} is on another device than state$"):
            torch.ops.kda_cuda.decode_commit(*given, False, False)


@pytest.mark.gpu
def test_contents_are_checked_on_request(monkeypatch):
    call = {name: x.cuda() for name, x in good().items()} | {
        "state": torch.zeros(SLOTS, HEADS, K, V, device="cuda"), "slot_of": torch.tensor([3, 3], device="cuda")
    }  # fmt: skip
    kda_cuda.decode(**call)
    monkeypatch.setenv("KDA_CUDA_CHECK", "1")
    check(kda_cuda.decode, call, ValueError,
          "kda_cuda::decode: slot_of has slot 3 for sequences 0 and 1, expected one each")  # fmt: skip
