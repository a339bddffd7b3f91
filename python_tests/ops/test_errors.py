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


def good_conv() -> dict:
    return {"x": torch.zeros(2, 8, 6), "weight": torch.zeros(6, 4)}


ONE_ROW = torch.zeros(1, 8, 6)
CONV_CALLS = [
    ({"x": [[1.0]]}, TypeError, "x[0] is a list, expected a Tensor"),
    ({"x": torch.zeros(8, 6)}, ValueError, "x has shape [8, 6], expected 3 dimensions [B, T, D]"),
    (
        {"x": torch.zeros(2, 8, 6).long()},
        TypeError,
        "x has dtype int64, expected float32 or float16 or bfloat16 or float64",
    ),
    (
        {"x": torch.zeros(2, 8, 0), "weight": torch.zeros(0, 4)},
        ValueError,
        "x has shape [2, 8, 0], expected [B, T, D] with D >= 1",
    ),
    ({"x": []}, ValueError, "x has 0 streams, expected 1 to 3"),
    ({"x": [torch.zeros(2, 8, 6)] * 4}, ValueError, "x has 4 streams, expected 1 to 3"),
    ({"x": [torch.zeros(2, 8, 3), None]}, TypeError, "x[1] is a NoneType, expected a Tensor"),
    (
        {"x": [torch.zeros(2, 8, 3), torch.zeros(2, 7, 3)]},
        ValueError,
        "x[1] is [2, 7, 3] in torch.float32 on cpu, expected dtype, device, B and T of x[0], which is [2, 8, 3] in "
        "torch.float32 on cpu",
    ),
    ({"x": [torch.zeros(2, 8, 3)] * 3}, ValueError, "weight has shape [6, 4], expected [D=9, taps=4]"),
    ({"weight": None}, TypeError, "weight is a NoneType, expected a Tensor"),
    ({"weight": torch.zeros(6, 4, device="meta")}, ValueError, "weight is on meta, expected cpu like x"),
    ({"weight": torch.zeros(6)}, ValueError, "weight has shape [6], expected [D, taps] or [D, 1, taps]"),
    ({"weight": torch.zeros(6, 2, 4)}, ValueError, "weight has shape [6, 2, 4], expected [D, taps] or [D, 1, taps]"),
    ({"weight": torch.zeros(6, 4).half()}, TypeError, "weight has dtype float16, expected float32"),
    (
        {"x": torch.zeros(2, 8, 6).half(), "weight": torch.zeros(6, 4).bfloat16()},
        TypeError,
        "weight has dtype bfloat16, expected float16 or float32",
    ),
    ({"weight": torch.zeros(5, 1, 4)}, ValueError, "weight has shape [5, 4], expected [D=6, taps=4]"),
    ({"weight": torch.zeros(6, 1)}, ValueError, "weight has 1 taps, expected 2 to 8"),
    ({"weight": torch.zeros(6, 9)}, ValueError, "weight has 9 taps, expected 2 to 8"),
    ({"bias": torch.zeros(5)}, ValueError, "bias has shape [5], expected [D=6]"),
    ({"bias": torch.zeros(6).half()}, TypeError, "bias has dtype float16, expected float32"),
    ({"activation": "gelu"}, ValueError, "activation is 'gelu', expected one of [None, 'silu']"),
    ({"output_final_state": 1}, TypeError, "output_final_state is 1 (int), expected a bool"),
    (
        {"initial_state": torch.zeros(2, 6)},
        ValueError,
        "initial_state has shape [2, 6], expected 3 dimensions [N, D, taps-1]",
    ),
    (
        {"initial_state": torch.zeros(2, 6, 4)},
        ValueError,
        "initial_state has shape [2, 6, 4], expected [N=2, D=6, taps-1=3]",
    ),
    ({"initial_state": torch.zeros(2, 6, 3).double()}, TypeError, "initial_state has dtype float64, expected float32"),
    ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "x has shape [2, 8, 6], expected B=1 with cu_seqlens"),
    (
        {"x": ONE_ROW, "cu_seqlens": torch.tensor([0, 8.0])},
        TypeError,
        "cu_seqlens has dtype float32, expected int32 or int64",
    ),
    ({"x": ONE_ROW, "cu_seqlens": torch.tensor([0, 9])}, ValueError, "cu_seqlens[-1] is 9, expected at most T=8"),
    (
        {"x": ONE_ROW, "cu_seqlens": torch.tensor([0, 3, 8]), "initial_state": torch.zeros(1, 6, 3)},
        ValueError,
        "initial_state has shape [1, 6, 3], expected [N=2, D=6, taps-1=3]",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), CONV_CALLS, ids=[m[:60] for _, _, m in CONV_CALLS])
def test_short_conv(change, error, message):
    check(kda_cuda.short_conv, good_conv() | change, error, f"kda_cuda::short_conv: {message}")


def good_norm() -> dict:
    return {"x": torch.zeros(4, 6), "gate": torch.zeros(4, 6), "weight": torch.zeros(6)}


NORM_CALLS = [
    ({"x": 1.0}, TypeError, "x is a float, expected a Tensor"),
    (
        {"x": torch.zeros(4, 6).int()},
        TypeError,
        "x has dtype int32, expected float32 or float16 or bfloat16 or float64",
    ),
    ({"x": torch.zeros(())}, ValueError, "x has shape [], expected [..., D] with D >= 1"),
    ({"x": torch.zeros(4, 0)}, ValueError, "x has shape [4, 0], expected [..., D] with D >= 1"),
    ({"gate": None}, TypeError, "gate is a NoneType, expected a Tensor"),
    ({"gate": torch.zeros(4, 6, device="meta")}, ValueError, "gate is on meta, expected cpu like x"),
    ({"gate": torch.zeros(4, 6).half()}, TypeError, "gate has dtype float16, expected float32"),
    ({"gate": torch.zeros(6)}, ValueError, "gate has shape [6], expected [4, 6] like x"),
    ({"weight": torch.zeros(1, 6)}, ValueError, "weight has shape [1, 6], expected 1 dimensions [D]"),
    ({"weight": torch.zeros(5)}, ValueError, "weight has shape [5], expected [D=6]"),
    ({"weight": torch.zeros(6).half()}, TypeError, "weight has dtype float16, expected float32"),
    ({"eps": 0}, ValueError, "eps is 0.0, expected a finite positive number"),
    ({"eps": float("nan")}, ValueError, "eps is nan, expected a finite positive number"),
    ({"eps": None}, TypeError, "eps is None (NoneType), expected a number"),
    ({"activation": None}, ValueError, "activation is None, expected one of ['sigmoid', 'silu']"),
]


@pytest.mark.parametrize(("change", "error", "message"), NORM_CALLS, ids=[m[:60] for _, _, m in NORM_CALLS])
def test_gated_rmsnorm(change, error, message):
    check(kda_cuda.gated_rmsnorm, good_norm() | change, error, f"kda_cuda::gated_rmsnorm: {message}")


@pytest.mark.devices("emulator", "cuda")
def test_surrounding_kernels_name_what_is_wrong(device):
    """Direct calls of torch.ops."""
    ops = getattr(torch.ops, "kda_cuda_emulated" if device.name == "emulator" else "kda_cuda")
    x, weight, rows = (torch.zeros(shape, device=device) for shape in ((1, 8, 6), (6, 4), (4, 6)))
    with pytest.raises(ValueError) as raised:
        ops.short_conv_fwd(x, None, None, weight[:5], None, None, None, True, False)
    assert str(raised.value) == "kda_cuda::short_conv_fwd: weight has shape [5, 4], expected [6, 2 to 8]"
    with pytest.raises(ValueError) as raised:
        ops.short_conv_bwd(x[:, :7], None, None, None, x, None, None, weight, None, None, None, True)
    assert str(raised.value) == "kda_cuda::short_conv_bwd: dy has shape [1, 7, 6], expected [1, 8, 6]"
    with pytest.raises(ValueError) as raised:
        ops.gated_rmsnorm_fwd(rows, rows.half(), rows[0], 1e-5, False)
    assert str(raised.value) == "kda_cuda::gated_rmsnorm_fwd: gate has another dtype than x"
    with pytest.raises(ValueError) as raised:
        ops.gated_rmsnorm_bwd(rows, rows, rows, rows[0, :5], 1e-5, False)
    assert str(raised.value) == "kda_cuda::gated_rmsnorm_bwd: weight has shape [5], expected [6]"


@pytest.mark.devices("emulator")
def test_nothing_is_launched(device):
    functions = (
        (kda_cuda.chunk_kda, good, CHUNK_CALLS),
        (kda_cuda.short_conv, good_conv, CONV_CALLS),
        (kda_cuda.gated_rmsnorm, good_norm, NORM_CALLS),
    )
    for function, arguments, calls in functions:
        for change, error, _ in calls:
            with pytest.raises(error):
                function(**(arguments() | change))
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
