"""Bad calls: the exact message, the type of the error, and nothing run or written before it."""

from __future__ import annotations

import pytest
import torch

import kda_cuda
from kda_cuda import testing

B, T, H, HV, K, V = 2, 8, 2, 4, 16, 24


def good(dtype: torch.dtype = torch.float32) -> dict:
    torch.manual_seed(0)
    return {
        "q": torch.randn(B, T, H, K, dtype=dtype),
        "k": torch.randn(B, T, H, K, dtype=dtype),
        "v": torch.randn(B, T, HV, V, dtype=dtype),
        "g": -torch.rand(B, T, HV, K, dtype=dtype),
        "beta": torch.rand(B, T, HV, dtype=dtype),
    }


def packed(cu_seqlens: list[int], dtype: torch.dtype = torch.int64, **more) -> dict:
    one = {name: x[:1] for name, x in good().items()}
    return one | {"cu_seqlens": torch.tensor(cu_seqlens, dtype=dtype)} | more


def gated(**more) -> dict:
    return {"use_gate_in_kernel": True, "A_log": torch.zeros(HV)} | more


META = torch.empty(B, T, H, K, device="meta")
INT = torch.zeros(B, T, H, K, dtype=torch.int32)
# (what is changed in a good call, error, message after "kda_cuda::chunk_kda: ")
CHUNK_CALLS = [
    ({"q": [1.0]}, TypeError, "q is a list, expected a Tensor"),
    ({"beta": None}, TypeError, "beta is a NoneType, expected a Tensor"),
    ({"k": META}, ValueError, "k is on meta, expected cpu like q"),
    ({"q": torch.zeros(B, T, K)}, ValueError, "q has shape [2, 8, 16], expected 4 dimensions [B, T, H, K]"),
    ({"beta": torch.zeros(B, T, HV, 1)}, ValueError, "beta has shape [2, 8, 4, 1], expected 3 dimensions [B, T, HV]"),
    ({"q": INT, "k": INT}, TypeError, "q has dtype int32, expected float32 or float16 or bfloat16 or float64"),
    ({"k": torch.zeros(B, T, H, K).half()}, TypeError, "k has dtype float16, expected float32"),
    ({"v": torch.zeros(B, T, HV, V).double()}, TypeError, "v has dtype float64, expected float32"),
    ({"g": torch.zeros(B, T, HV, K).bfloat16()}, TypeError, "g has dtype bfloat16, expected float32"),
    (good(torch.bfloat16) | {"beta": torch.zeros(B, T, HV).half()}, TypeError,
     "beta has dtype float16, expected bfloat16 or float32"),
    ({"k": torch.zeros(B, T, H, 12)}, ValueError, "k has shape [2, 8, 2, 12], expected [B=2, T=8, H=2, K=16]"),
    ({"v": torch.zeros(B, 7, HV, V)}, ValueError, "v has shape [2, 7, 4, 24], expected [B=2, T=8, HV=4, V=24]"),
    ({"v": torch.zeros(B, T, 3, V)}, ValueError, "v has HV=3 heads, expected a multiple of the H=2 heads of q and k"),
    ({"g": torch.zeros(B, T, H, K)}, ValueError, "g has shape [2, 8, 2, 16], expected [B=2, T=8, HV=4, K=16]"),
    ({"beta": torch.zeros(B, T, H)}, ValueError, "beta has shape [2, 8, 2], expected [B=2, T=8, HV=4]"),
    ({"q": torch.zeros(B, T, H, 257), "k": torch.zeros(B, T, H, 257), "g": torch.zeros(B, T, HV, 257)}, ValueError,
     "q has K=257, expected 1 <= K <= 256"),
    ({"v": torch.zeros(B, T, HV, 0)}, ValueError, "v has V=0, expected V >= 1"),
    ({"scale": "0.1"}, TypeError, "scale is '0.1' (str), expected a number"),
    ({"use_qk_l2norm_in_kernel": 1}, TypeError, "use_qk_l2norm_in_kernel is 1 (int), expected a bool"),
    ({"safe_gate": None}, TypeError, "safe_gate is None (NoneType), expected a bool"),
    ({"allow_neg_eigval": True}, ValueError,
     "allow_neg_eigval is True and use_beta_sigmoid_in_kernel is False, expected both True"),
    ({"use_gate_in_kernel": True}, ValueError,
     "A_log is None, expected a Tensor [HV] (it may be absent only with a lower_bound)"),
    (gated(A_log=torch.zeros(3)), ValueError, "A_log has shape [3], expected [HV=4]"),
    (gated(A_log=torch.zeros(HV).long()), TypeError,
     "A_log has dtype int64, expected float32 or float16 or bfloat16 or float64"),
    (gated(A_log=torch.zeros(HV, device="meta")), ValueError, "A_log is on meta, expected cpu like g"),
    (gated(dt_bias=torch.zeros(H * K)), ValueError, "dt_bias has shape [32], expected [HV=4, K=16]"),
    (gated(lower_bound=0.5), ValueError, "lower_bound is 0.5, expected a finite negative number"),
    (gated(lower_bound="-5"), TypeError, "lower_bound is '-5' (str), expected a number"),
    ({"initial_state": torch.zeros(HV, K, V)}, ValueError,
     "initial_state has shape [4, 16, 24], expected 4 dimensions [N, HV, K, V]"),
    ({"initial_state": torch.zeros(B, HV, K, V).half()}, TypeError,
     "initial_state has dtype float16, expected float32"),
    ({"initial_state": torch.zeros(B, HV, V, K)}, ValueError,
     "initial_state has shape [2, 4, 24, 16], expected [N=2, HV=4, K=16, V=24]"),
    ({"initial_state": torch.zeros(B, HV, K, V), "state_v_first": True}, ValueError,
     "initial_state has shape [2, 4, 16, 24], expected [N=2, HV=4, V=24, K=16]"),
    ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "q has shape [2, 8, 2, 16], expected B=1 with cu_seqlens"),
    (packed([0, 8], torch.int16), TypeError, "cu_seqlens has dtype int16, expected int32 or int64"),
    (packed([0]), ValueError, "cu_seqlens has shape [1], expected [N+1] with N >= 1"),
    (packed([1, 8]), ValueError, "cu_seqlens[0] is 1, expected 0"),
    (packed([0, 9], torch.int32), ValueError, "cu_seqlens[-1] is 9, expected at most T=8"),
    (packed([0, 5, 3, 8]), ValueError, "cu_seqlens[2] is 3 after 5, expected no decrease"),
    (packed([0, 8], cu_seqlens_cpu=torch.tensor([0, 4, 8])), ValueError,
     "cu_seqlens_cpu has shape [3], expected [N+1=2]"),
    (packed([0, 8], cu_seqlens_cpu=torch.tensor([0, 9])), ValueError,
     "cu_seqlens_cpu[-1] is 9, expected at most T=8"),
    ({"cu_seqlens_cpu": torch.tensor([0, 8])}, ValueError,
     "cu_seqlens is None and cu_seqlens_cpu is not, expected both or cu_seqlens alone"),
    (packed([0, 3, 8], initial_state=torch.zeros(1, HV, K, V)), ValueError,
     "initial_state has shape [1, 4, 16, 24], expected [N=2, HV=4, K=16, V=24]"),
    ({"deterministic": False}, ValueError, "deterministic is False, expected one of [True, 'batch_invariant']"),
    ({"chunk_size": 48}, ValueError, "chunk_size is 48, expected one of [32, 64]"),
    ({"cp_context": object()}, TypeError, "cp_context is a object without the field 'group', expected a CPContext"),
    ({"return_intermediate_states": True}, ValueError,
     "return_intermediate_states is True outside of torch.inference_mode(), expected inside"),
    ({"state_v_first": True, "transpose_state_layout": True}, ValueError,
     "got both state_v_first and transpose_state_layout, expected only state_v_first"),
    ({"headfirst": True, "Alog": None}, TypeError,
     "got unexpected keyword arguments ['Alog', 'headfirst'], expected some of "
     "['A_log', 'chunk_size', 'deterministic', 'dt_bias', 'max_num_seqs', 'transpose_state_layout', 'use_graph']"),
]  # fmt: skip


def check(function, arguments: dict, error: type, message: str) -> None:
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor)}
    with pytest.raises(error) as raised:
        function(**arguments)
    assert str(raised.value) == message
    assert type(raised.value) is error
    for name, x in before.items():
        assert x.device.type == "meta" or torch.equal(arguments[name], x), f"{name} was changed"


@pytest.mark.parametrize(("change", "error", "message"), CHUNK_CALLS, ids=[m[:60] for _, _, m in CHUNK_CALLS])
def test_chunk_kda(change, error, message):
    check(kda_cuda.chunk_kda, good() | change, error, f"kda_cuda::chunk_kda: {message}")


RECURRENT_CALLS = [
    ({"k": torch.zeros(B, T, H, 12)}, ValueError, "k has shape [2, 8, 2, 12], expected [B=2, T=8, H=2, K=16]"),
    ({"initial_state": torch.zeros(1, HV, K, V)}, ValueError,
     "initial_state has shape [1, 4, 16, 24], expected [N=2, HV=4, K=16, V=24]"),
    (packed([0, 9]), ValueError, "cu_seqlens[-1] is 9, expected at most T=8"),
    ({"output_final_state": "yes"}, TypeError, "output_final_state is 'yes' (str), expected a bool"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), RECURRENT_CALLS, ids=[m[:60] for _, _, m in RECURRENT_CALLS])
def test_fused_recurrent_kda(change, error, message):
    check(kda_cuda.fused_recurrent_kda, good() | change, error, f"kda_cuda::fused_recurrent_kda: {message}")


GATE_CALLS = [
    ({"g": 3}, TypeError, "g is a int, expected a Tensor"),
    ({"g": torch.zeros(4, 2, 8).long()}, TypeError,
     "g has dtype int64, expected float32 or float16 or bfloat16 or float64"),
    ({"g": torch.zeros(8)}, ValueError, "g has shape [8], expected [..., HV, K], or [..., HV*K] with head_dim=K"),
    ({"g": torch.zeros(4, 16), "head_dim": 5}, ValueError,
     "g has shape [4, 16], expected [..., HV*K] with K=head_dim=5"),
    ({"head_dim": 8.0}, TypeError, "head_dim is 8.0 (float), expected an int"),
    ({"A_log": None}, ValueError, "A_log is None, expected a Tensor [HV] (it may be absent only with a lower_bound)"),
    ({"A_log": torch.zeros(8)}, ValueError, "A_log has shape [8], expected [HV=2]"),
    ({"dt_bias": torch.zeros(8)}, ValueError, "dt_bias has shape [8], expected [HV=2, K=8]"),
    ({"lower_bound": float("-inf")}, ValueError, "lower_bound is -inf, expected a finite negative number"),
    ({"dtype": torch.int32}, ValueError,
     "dtype is torch.int32, expected one of [torch.float32, torch.float16, torch.bfloat16, torch.float64]"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "message"), GATE_CALLS, ids=[m[:60] for _, _, m in GATE_CALLS])
def test_kda_gate(change, error, message):
    call = {"g": torch.zeros(4, 2, 8), "A_log": torch.zeros(2)} | change
    check(kda_cuda.kda_gate, call, error, f"kda_cuda::kda_gate: {message}")


@pytest.mark.devices("emulator")
def test_nothing_is_launched(device):
    for change, error, _ in CHUNK_CALLS:
        with pytest.raises(error):
            kda_cuda.chunk_kda(**(good() | change))
    assert testing.take_record() == []


@pytest.mark.devices("emulator", "cuda")
def test_kernels_name_what_is_wrong(device):
    """The glue checks again: a direct torch.ops call never reads out of range."""
    namespace = "kda_cuda_emulated" if device.name == "emulator" else "kda_cuda"
    x = {name: t.to(device) for name, t in good().items()}
    x["k"] = x["k"][:, :, :, :12]
    flags = (False, False, False, False, None, False, True, 64, False)
    with pytest.raises(ValueError) as raised:
        getattr(torch.ops, namespace).chunk_fwd(*x.values(), None, None, None, None, 1.0, *flags)
    assert str(raised.value) == "kda_cuda::chunk_fwd: k has shape [2, 8, 2, 12], expected [2, 8, 2, 16]"


@pytest.mark.devices("emulator")
def test_float64_has_no_kernel(device):
    x = {name: t.double() for name, t in good().items()}
    with pytest.raises(RuntimeError) as raised:
        kda_cuda.chunk_kda(**x)
    assert str(raised.value) == (
        "kda_cuda::chunk_fwd: no emulated kernel serves this call: "
        "kernels take float32, float16 and bfloat16, not float64"
    )


def test_deprecated_name():
    state = torch.randn(B, HV, V, K)
    new = kda_cuda.chunk_kda(**good(), initial_state=state, state_v_first=True)[0]
    with pytest.warns(DeprecationWarning, match="^transpose_state_layout is deprecated: use state_v_first$") as caught:
        old = kda_cuda.chunk_kda(**good(), initial_state=state, transpose_state_layout=True)[0]
    assert caught[0].filename == __file__
    assert torch.equal(old, new)


def test_contents_are_checked_on_request(monkeypatch):
    from kda_cuda.checks import check_contents

    assert check_contents(torch.zeros(1))
    assert not check_contents(torch.zeros(1, device="meta"))
    monkeypatch.setenv("KDA_CUDA_CHECK", "1")
    assert check_contents(torch.zeros(1, device="meta"))
