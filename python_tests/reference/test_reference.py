"""The reference against the recurrence in float64, and what every implementation of these ops has to keep."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from kda_cuda import reference

from ..support import accuracy, case_files, decode_calls, oracle
from ..support.accuracy import GRADIENTS
from ..support.cases import CASES, Case, Inputs

_truths: dict[tuple[str, torch.dtype], dict[str, Tensor]] = {}


def truth_of(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients in float64 from inputs that are rounded to ``dtype``."""
    if (case.name, dtype) not in _truths:
        _truths[case.name, dtype] = oracle.named(*oracle.gradients(case.inputs(dtype=dtype).double()))
    return _truths[case.name, dtype]


def reference_results(x: Inputs) -> dict[str, Tensor]:
    o, final_state, h = reference.chunk_fwd(*x.fwd_args(output_chunk_states=True))
    gradients = dict(zip(GRADIENTS, reference.chunk_bwd(*x.bwd_args()), strict=True))
    return {"o": o, "final_state": final_state, "h": h.flatten(0, 1)} | gradients


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_fp32_is_within_the_caps(case):
    """Also cases that name another dtype: 1e-5 forward, 3e-5 for gradients, times the case's allowance."""
    case = dataclasses.replace(case, dtype=torch.float32)
    results = reference_results(case.inputs())
    for name, truth in truth_of(case, torch.float32).items():
        limit = accuracy.cap(case, torch.float32, name in GRADIENTS)
        accuracy.Budget(limit, accuracy.ROW_FACTOR * limit).check(name, results[name], truth)


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.dtype != torch.float32], ids=str)
def test_16_bits_are_within_their_budget(case):
    x = case.inputs()
    results, rounded = reference_results(x), accuracy.low_precision_reference(x)
    for name, truth in truth_of(case, case.dtype).items():
        accuracy.budget(case, name, rounded[name], truth).check(name, results[name], truth)


@pytest.mark.parametrize("regime", ["fast", "long", "violent", "steep", "zero"])
def test_512_tokens_in_every_regime(regime):
    model = {"beta_sigmoid": True} if regime in ("fast", "long") else {}
    case = Case(f"512_{regime}", 512, heads=1, value_heads=2, gate=regime, initial_state=True, **model)
    results = reference_results(case.inputs())
    for name, truth in truth_of(case, torch.float32).items():
        limit = accuracy.cap(case, torch.float32, name in GRADIENTS)
        accuracy.Budget(limit, accuracy.ROW_FACTOR * limit).check(name, results[name], truth)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_float64_is_exact(case):
    """The formulas, without the excuse of rounding."""
    x = case.inputs(dtype=torch.float64)
    results, truths = reference_results(x), truth_of(case, torch.float64)
    # the fp32 gate parameters of the kernels are float64 here, so that everything is
    for name, truth in truths.items():
        error = accuracy.measure(results[name], truth)
        assert results[name].dtype == torch.float64
        assert error.same_nonfinite
        assert error.rms <= 1e-11, f"{name}: {error}"


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_token_by_token_path_agrees(case):
    x = case.inputs(dtype=torch.float32)
    o, final_state = decode_calls.reference_step(x)
    case = dataclasses.replace(case, dtype=torch.float32)
    limit = accuracy.cap(case, torch.float32, gradient=False)
    truth = truth_of(case, torch.float32)
    for name, result in {"o": o, "final_state": final_state}.items():
        accuracy.Budget(limit, accuracy.ROW_FACTOR * limit).check(name, result, truth[name])


@pytest.mark.parametrize("name", ["tail_chunk", "varlen", "gva", "v_first", "fp32_gate"])
def test_inputs_are_untouched_and_outputs_are_their_own(name):
    x = CASES[name].inputs()
    before = x.map(torch.clone)
    forward = reference.chunk_fwd(*x.fwd_args(output_chunk_states=True))
    results = (*forward, *decode_calls.reference_step(x), *reference.chunk_bwd(*x.bwd_args()))
    for name, y in x.tensors().items():
        assert torch.equal(y, before.tensors()[name]), f"{name} was modified"
    storages = [y.untyped_storage().data_ptr() for y in (*x.tensors().values(), *results) if y.numel()]
    assert len(set(storages)) == len(storages), "two results, or a result and an input, share memory"
    assert all(y.is_contiguous() for y in results)


@pytest.mark.parametrize("name", ["packed", "expanded", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_layout_changes_no_bit(name, dtype):
    x = CASES[name].inputs(dtype=dtype)
    dense = x.map(lambda y: y.clone(memory_format=torch.contiguous_format))
    assert any(a.stride() != b.stride() for a, b in zip(x.tensors().values(), dense.tensors().values(), strict=True))
    for (name, a), b in zip(reference_results(x).items(), reference_results(dense).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["varlen", "varlen_v_first", "varlen_ones"])
def test_packed_sequences_equal_each_alone(name):
    """To the last digits: the number of chunks in a batch of products may change how they are summed."""
    x = CASES[name].inputs(dtype=torch.float64)
    together = reference_results(x)
    chunk_at = 0
    for n, (begin, end) in enumerate(itertools.pairwise(x.sequence_bounds())):
        own = {key: getattr(x, key)[:, begin:end] for key in ("q", "k", "v", "g", "beta", "do")}
        states = {
            key: getattr(x, key)[n : n + 1] for key in ("initial_state", "dfinal_state") if getattr(x, key) is not None
        }
        alone = reference_results(x.replace(cu_seqlens=None, **own, **states))
        chunks = math.ceil((end - begin) / x.chunk_size)
        torch.testing.assert_close(together["o"][:, begin:end], alone["o"])
        torch.testing.assert_close(together["final_state"][n : n + 1], alone["final_state"])
        torch.testing.assert_close(together["h"][chunk_at : chunk_at + chunks], alone["h"])
        for key in ("dq", "dk", "dv", "dg", "dbeta"):
            torch.testing.assert_close(together[key][:, begin:end], alone[key])
        chunk_at += chunks
    assert chunk_at == together["h"].shape[0]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("with_state", [False, True])
def test_empty_sequences_keep_their_state(index_dtype, with_state):
    case = Case("empties", 0, lengths=(0, 0), heads=2, initial_state=with_state, index_dtype=index_dtype)
    x = case.inputs()
    expected = x.initial_state if with_state else torch.zeros(2, 2, 64, 64)
    for o, final_state, *h in (reference.chunk_fwd(*x.fwd_args(True)), decode_calls.reference_step(x)):
        assert o.shape == (1, 0, 2, 64)
        assert torch.equal(final_state, expected)
        assert all(y.shape == (1, 0, 2, 64, 64) for y in h)
    *_, dinitial_state = reference.chunk_bwd(*x.bwd_args())
    assert dinitial_state.numel() == 0 if not with_state else torch.equal(dinitial_state, x.dfinal_state)


def test_absent_results_are_empty():
    x = CASES["one_token"].inputs().replace(initial_state=None)
    _, final_state, h = reference.chunk_fwd(*x.common(), False, 64, False)
    assert final_state.shape == h.shape == (0,)
    gradients = dict(zip(GRADIENTS, reference.chunk_bwd(x.do, None, *x.common(), 64), strict=True))
    assert [name for name, y in gradients.items() if y.numel() == 0] == ["dA_log", "ddt_bias", "dinitial_state"]


def test_dtypes_of_results():
    x = CASES["fp32_gate"].inputs().replace(initial_state=torch.zeros(1, 2, 64, 64))
    o, final_state, h = reference.chunk_fwd(*x.fwd_args(output_chunk_states=True))
    assert (o.dtype, final_state.dtype, h.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    dq, dk, dv, dg, dbeta, *_, dstate = reference.chunk_bwd(*x.bwd_args())
    assert {dq.dtype, dk.dtype, dv.dtype} == {torch.bfloat16}
    assert {dg.dtype, dbeta.dtype, dstate.dtype} == {torch.float32}


def test_minus_infinity_forgets_everything():
    """A channel whose log-decay is -inf starts anew, in values and gradients."""
    x = Case("forget", 100, gate="mild", initial_state=True).inputs()
    reset = x.replace(g=x.g.index_fill(1, torch.tensor([70]), -math.inf))
    after = slice(70, None)
    o, final_state, _ = reference.chunk_fwd(*reset.fwd_args())
    tail = {name: getattr(x, name)[:, after] for name in ("q", "k", "v", "g", "beta")}
    o_tail, final_tail, _ = reference.chunk_fwd(*x.replace(**tail, initial_state=None).fwd_args())
    torch.testing.assert_close(o[:, after], o_tail, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final_state, final_tail, rtol=1e-4, atol=1e-5)
    assert all(y.isfinite().all() for y in reference.chunk_bwd(*reset.bwd_args()))


@pytest.mark.parametrize("name", ["chunk_32", "varlen_v_first"])
def test_chunk_size_changes_only_the_rounding(name):
    x = CASES[name].inputs(dtype=torch.float64)
    small, large = (reference_results(x.replace(chunk_size=size)) for size in (32, 64))
    for key in small.keys() - {"h"}:
        torch.testing.assert_close(small[key], large[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["varlen", "dim_3", "fast_200", "zero_17"])
def test_case_files_hold_the_case(name, tmp_path):
    case = case_files.ALL[name]
    entries = case_files.entries(case)
    case_files.write(tmp_path / "x.case", entries)
    back = case_files.read(tmp_path / "x.case")
    assert list(back) == list(entries)
    for key, x in entries.items():
        assert back[key].dtype == x.dtype
        assert torch.equal(back[key], x.contiguous())
    assert torch.equal(back["q"], case.inputs().q)
    assert 0 < back["budget.dq"][0] <= back["budget.dq"][1]
    assert ("layer.q" in back) == (case.key_dim == case.value_dim)
    assert ("dfinal_state" in back) == case.dfinal_state
    for argument in ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state"):
        assert (argument in back) == (f"truth.d{argument}" in back) == (f"budget.d{argument}" in back)
        assert argument not in back or back[argument].shape == back[f"truth.d{argument}"].shape
