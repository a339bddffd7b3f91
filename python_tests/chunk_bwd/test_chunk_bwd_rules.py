"""What the chunkwise backward promises beside being right: only what is asked for, the same bits, named errors."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

import kda_cuda
from kda_cuda import testing

from ..chunk_fwd.test_chunk_fwd import INVARIANT, MODEL
from ..support.accuracy import GRADIENTS
from ..support.bwd_calls import TAKES_MASK, TOKEN_GRADIENTS, UNNEEDED, assert_ran, gradients, raw_gradients
from ..support.cases import CASES, Case, Inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory", "chunk_bwd")
needs_mask = pytest.mark.skipif(not TAKES_MASK, reason="chunk_bwd has no argument `wanted`")

# Every gradient exists; several chunks, grouped heads, a partial chunk.
WHOLE = Case("whole", 80, heads=1, value_heads=2, value_dim=72, initial_state=True, dtype=torch.bfloat16, **MODEL)
PACKED = Case("packed whole", 149, lengths=(70, 0, 65, 1, 13), heads=1, value_heads=2, value_dim=40,
              initial_state=True, dtype=torch.bfloat16, **MODEL)  # fmt: skip
BATCH = Case("batch of three", 70, batch=3, heads=1, value_heads=2, initial_state=True, dtype=torch.float16, **MODEL)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, d in a.items():
        assert torch.equal(d, b[name]), name


# ---- only what is asked for ------------------------------------------------------------------------------------------

MASKS = [(), *((name,) for name in GRADIENTS), ("dq", "dk", "dv", "dbeta"), ("dg", "dA_log"), ("dv", "dinitial_state"),
         ("dA_log", "ddt_bias"), TOKEN_GRADIENTS]  # fmt: skip
ASKED = [("dv",), ("dA_log",), ("dinitial_state",), ("dq", "dbeta"), ("dk", "dg", "ddt_bias")]


@needs_mask
@pytest.mark.parametrize("wanted", MASKS, ids=" ".join)
def test_no_other_gradient_is_computed(wanted, device):
    x = WHOLE.inputs(device)
    everything = raw_gradients(x, device)
    assert all(d.numel() for d in everything.values())
    results, kernels = device.run(lambda: raw_gradients(x, device, wanted))
    for name, d in results.items():
        if name in wanted:
            assert torch.equal(d, everything[name]), name
        else:
            assert d.numel() == 0, name
    assert not UNNEEDED.get(wanted, set()) & set(kernels)
    if wanted:
        assert_ran(kernels, device)


@needs_mask
@pytest.mark.devices("emulator", "cuda")
@pytest.mark.parametrize("wanted", [("dv",), ("dq", "dk", "dg"), GRADIENTS], ids=" ".join)
def test_packed_sequences_ask_for_a_part(wanted, device):
    x = PACKED.inputs(device)
    everything, results = raw_gradients(x, device), raw_gradients(x, device, wanted)
    assert_same({name: results[name] for name in wanted}, {name: everything[name] for name in wanted})


@pytest.mark.parametrize("wanted", ASKED, ids=" ".join)
def test_autograd_asks_for_what_needs_a_gradient(wanted, device):
    x = WHOLE.inputs(device)
    everything = gradients(x)
    assert_same(gradients(x, wanted), {name: everything[name] for name in wanted})


def test_absent_arguments_have_no_gradient(device):
    x = Case("absent", 70, heads=1, dtype=torch.bfloat16).inputs(device)
    empty = {name for name, d in raw_gradients(x, device).items() if d.numel() == 0}
    assert empty == {"dA_log", "ddt_bias", "dinitial_state"}


def test_results_are_new_and_contiguous(device):
    x = WHOLE.inputs(device)
    results = raw_gradients(x, device)
    storages = [y.untyped_storage().data_ptr() for y in (*x.tensors().values(), *results.values())]
    assert len(set(storages)) == len(storages), "two results, or a result and an input, share memory"
    assert all(d.is_contiguous() for d in results.values())


# ---- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [WHOLE, PACKED, CASES["steep"]], ids=str)
def test_twice_the_same(case, device):
    x = case.inputs(device)
    assert_same(gradients(x), gradients(x))


@pytest.mark.devices("emulator")
@pytest.mark.parametrize("case", [
    WHOLE, PACKED, dataclasses.replace(WHOLE, name="violent fp32", dtype=torch.float32, gate="violent", key_dim=100),
    dataclasses.replace(WHOLE, name="fp16 of 256", dtype=torch.float16, key_dim=200, tokens=70, value_heads=1),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("arch", ["80", "90"])
def test_eight_schedules_agree_bit_by_bit(case, arch, device):
    x, runs = case.inputs(), []
    for seed in range(8):
        with testing.emulated(seed=seed, threads=1 + seed % 2, arch=arch):
            runs.append(gradients(x))
    for other in runs[1:]:
        assert_same(runs[0], other)


def section(x: Inputs, begin: int, end: int, n: int) -> Inputs:
    """Sequence ``n`` of packed ones, by itself."""
    streams = {name: getattr(x, name)[:, begin:end] for name in ("q", "k", "v", "g", "beta", "do")}
    states = {name: getattr(x, name)[n : n + 1] for name in ("initial_state", "dfinal_state")}
    return x.replace(**streams, **states, cu_seqlens=None)


def assert_part(whole: Tensor, alone: Tensor, device, name: str) -> None:
    """No bit differs between kernels; the reference's products come in other batches, which may sum otherwise."""
    if device.runs_kernels:
        assert torch.equal(whole, alone), name
    else:
        torch.testing.assert_close(whole, alone, rtol=2e-2, atol=2e-3, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("case", [PACKED, CASES["varlen"], CASES["varlen_v_first"]], ids=str)
def test_packed_sequences_are_as_each_alone(case, device):
    """Gradients of tokens and states; those of A_log and dt_bias are sums over the batch."""
    x = case.inputs(device)
    together = gradients(x, **INVARIANT)
    for n, (begin, end) in enumerate(itertools.pairwise(x.sequence_bounds())):
        if begin == end:
            assert torch.equal(together["dinitial_state"][n], x.dfinal_state[n]), n
            continue
        alone = gradients(section(x, begin, end, n), **INVARIANT)
        for name in TOKEN_GRADIENTS:
            assert_part(together[name][:, begin:end], alone[name], device, f"{name} of {n}")
        assert_part(together["dinitial_state"][n], alone["dinitial_state"][0], device, f"dinitial_state of {n}")


@pytest.mark.parametrize("case", [BATCH, CASES["two_tokens"]], ids=str)
def test_the_position_in_a_batch_changes_no_bit(case, device):
    x = case.inputs(device)
    together = gradients(x, **INVARIANT)
    of_rows = ("q", "k", "v", "g", "beta", "do", "initial_state", "dfinal_state")
    for n in range(case.batch):
        alone = gradients(x.replace(**{name: getattr(x, name)[n : n + 1] for name in of_rows}), **INVARIANT)
        for name in (*TOKEN_GRADIENTS, "dinitial_state"):
            assert_part(together[name][n : n + 1], alone[name], device, f"{name} of row {n}")


@pytest.mark.parametrize("name", ["gva", "two_tokens"])
def test_heads_do_not_mix(name, device):
    """Other heads may hold anything, NaN included: of a group of heads, all gradients keep their bits."""
    x = CASES[name].inputs(device)
    whole, group = gradients(x), x.v.shape[2] // x.q.shape[2]
    for head in range(x.q.shape[2]):
        mine = {"q": slice(head, head + 1), "v": slice(head * group, (head + 1) * group)}

        def keep(y: Tensor, of: slice, dim: int) -> Tensor:
            kept = torch.full_like(y, float("nan"))
            kept.transpose(0, dim)[of] = y.transpose(0, dim)[of]
            return kept

        streams = {n: keep(getattr(x, n), mine["q"], 2) for n in ("q", "k")}
        streams |= {n: keep(getattr(x, n), mine["v"], 2) for n in ("v", "g", "beta", "do")}
        streams |= {n: keep(getattr(x, n), mine["v"], 1) for n in ("initial_state", "dfinal_state")
                    if getattr(x, n) is not None}  # fmt: skip
        alone = gradients(x.replace(**streams))
        for n in (*TOKEN_GRADIENTS, "dinitial_state"):
            dim, of = (1 if n == "dinitial_state" else 2), mine["q" if n in ("dq", "dk") else "v"]
            assert torch.equal(alone[n].transpose(0, dim)[of], whole[n].transpose(0, dim)[of]), (n, head)


# ---- bad calls -------------------------------------------------------------------------------------------------------

# what is changed in a good call, and the message after "kda_cuda::chunk_bwd: "; WHOLE is [1, 80, 2, 72] of K = 64
BAD_CALLS = [
    ("do", lambda d: d[:, :-1], r"do has shape \[1, 79, 2, 72\], expected \[1, 80, 2, 72\]"),
    ("do", lambda d: d[..., 0], r"do has shape \[1, 80, 2\], expected \[1, 80, 2, 72\]"),
    ("do", lambda d: d.float(), "do differs from v in dtype"),
    ("dfinal_state", lambda d: d[:, :1], r"dfinal_state has shape \[1, 1, 64, 72\], expected \["),
    ("dfinal_state", lambda d: d.transpose(-1, -2).contiguous(), r"dfinal_state has shape \[1, 2, 72, 64\], expected"),
    ("dfinal_state", lambda d: d.double(), "dfinal_state has a dtype that kernels do not take"),
    ("k", lambda k: k[..., :-1], r"k has shape \[1, 80, 1, 63\], expected \[1, 80, 1, 64\]"),
    ("initial_state", lambda s: s[..., :-1], r"initial_state has shape \[1, 2, 64, 71\], expected"),
]


@pytest.mark.devices("emulator", "cuda")
@pytest.mark.parametrize(("argument", "change", "message"), BAD_CALLS)
def test_bad_calls_of_the_op(argument, change, message, device):
    """What autograd would never hand over. The error names op, argument, got and expected, before anything runs."""
    x = WHOLE.inputs(device)
    bad = x.replace(**{argument: change(getattr(x, argument))})
    before = bad.map(torch.clone)

    def call() -> None:
        with pytest.raises(ValueError, match=f"^kda_cuda::chunk_bwd: {message}"):
            raw_gradients(bad, device)

    _, kernels = device.run(call)
    assert not kernels
    for name, y in bad.tensors().items():
        assert torch.equal(y, before.tensors()[name]), f"{name} was written"


def forward(x: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """``sum(o do)``, and the leaves that it came from."""
    leaves = {name: y.clone().requires_grad_() for name, y in x.differentiable().items()}
    o, _ = kda_cuda.chunk_kda(**x.replace(**leaves).public())
    return (o * x.do).sum(), leaves


def test_second_derivatives_are_refused(device):
    loss, leaves = forward(WHOLE.inputs(device))
    (dq,) = torch.autograd.grad(loss, leaves["q"], create_graph=True)
    assert dq.requires_grad and dq.any()
    with pytest.raises(RuntimeError, match=r"chunk_bwd.* has no derivative: second derivatives of kda_cuda's ops"):
        dq.square().sum().backward()


@pytest.mark.parametrize("name", ["q", "g", "beta", "A_log", "initial_state"])
def test_a_kept_input_that_was_changed(name, device):
    """Nothing runs, no gradient is set."""
    loss, leaves = forward(WHOLE.inputs(device))
    with torch.no_grad():
        leaves[name].mul_(2)

    def call() -> None:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    _, kernels = device.run(call)
    assert not [kernel for kernel in kernels if kernel.startswith("chunk_bwd")]
    assert all(leaf.grad is None for leaf in leaves.values())


def test_a_do_that_does_not_fit(device):
    x = WHOLE.inputs(device)
    q = x.q.clone().requires_grad_()
    o, _ = kda_cuda.chunk_kda(**x.replace(q=q).public())
    with pytest.raises(RuntimeError, match=r"Mismatch in shape: grad_output\[0\]"):
        torch.autograd.grad(o, q, x.do[:, :-1])
    wide, narrow = (torch.autograd.grad(o, q, do, retain_graph=True)[0] for do in (x.do.float(), x.do))
    assert torch.equal(wide, narrow), "a do of another dtype is cast"
