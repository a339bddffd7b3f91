"""The chunkwise backward against autograd of the float64 recurrence: every pair of properties, every variant, and the
cases that other libraries got wrong."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kda_cuda
from kda_cuda import testing

from ..support import accuracy, bwd_calls
from ..support.bwd_calls import TOKEN_GRADIENTS, assert_ran, check, check_by_sequence, expected, gradients
from ..support.bwd_cases import GRID, PEERS, PROPERTIES, REGIMES, VALUES, key_tile
from ..support.cases import CASES, Case, Inputs

pytestmark = pytest.mark.usefixtures("poisoned_memory")
needs_kernel = pytest.mark.usefixtures("chunk_bwd")


def run(x: Inputs, device) -> dict[str, Tensor]:
    """All gradients; the kernels were those that should be, and no input was changed."""
    before = x.map(torch.clone)
    results, kernels = device.run(lambda: gradients(x))
    assert_ran(kernels, device)
    for name, y in x.tensors().items():
        assert torch.equal(y, before.tensors()[name]), f"{name} was modified"
    assert set(results) == {f"d{name}" for name in x.differentiable()}
    for name, y in x.differentiable().items():
        assert (results[f"d{name}"].shape, results[f"d{name}"].dtype) == (y.shape, y.dtype), name
    return results


# ---- every pair of properties, every variant ------------------------------------------------------------------------


def test_every_pair_is_covered():
    assert set(PROPERTIES) == set(VALUES)
    missing = []
    for (a, of_a), (b, of_b) in itertools.combinations(PROPERTIES.items(), 2):
        found = {(of_a(case), of_b(case)) for case in GRID.values()}
        missing += [{a: x, b: y} for x, y in itertools.product(VALUES[a], VALUES[b]) if (x, y) not in found]
    assert not missing
    assert all(0 in case.lengths for case in GRID.values() if case.lengths)
    assert {(case.dtype, case.key_dim) for case in GRID.values()} >= {
        (dtype, key_dim) for dtype in VALUES["dtype"] for key_dim in (60, 64, 100, 128, 200, 256)
    }


@needs_kernel
@pytest.mark.parametrize("case", GRID.values(), ids=str)
def test_grid(case, device):
    check(case, run(case.inputs(device), device))


@needs_kernel
@pytest.mark.devices("emulator", "cuda")
@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_named_cases(case, device):
    """The reference is held to these in test_reference."""
    check(case, run(case.inputs(device), device))


VARIANT_CALLS = tuple(itertools.product(VALUES["dtype"], (40, 64, 96, 128, 160, 256)))  # dtype, K: each tile twice


def variant_case(dtype: torch.dtype, key_dim: int, gate: str = "long") -> Case:
    return Case(
        f"variant {gate}", 80, heads=1, value_heads=1 if key_dim > 128 else 2, key_dim=key_dim, value_dim=72,
        dtype=dtype, initial_state=True, **REGIMES[gate],
    )  # fmt: skip


def serving_devices(x: Inputs) -> dict[str, str]:
    """For each backward variant that serves the call somewhere, a device where it does."""
    found: dict[str, str] = {}
    for arch in ("90", "80", "86"):
        with testing.emulated(arch=arch):
            backward = kda_cuda.explain(**x.replace(q=x.q.detach().requires_grad_()).public()).backward
            if "variant" in backward.plan:  # large K needs more shared memory than small devices have
                found.setdefault(backward.plan["variant"], arch)
    assert found
    return found


@needs_kernel
@pytest.mark.devices("emulator")
def test_no_variant_is_left_out(device):
    sources = Path(__file__).parents[2] / "csrc/kda/chunk_bwd/variants"
    served = {variant for call in VARIANT_CALLS for variant in serving_devices(variant_case(*call).inputs())}
    assert served == {path.stem for path in sources.glob("*.cu")}


@needs_kernel
@pytest.mark.devices("emulator")
@pytest.mark.parametrize("gate", ["long", "steep"])
@pytest.mark.parametrize(("dtype", "key_dim"), VARIANT_CALLS)
def test_every_variant_under_two_schedules(dtype, key_dim, gate, device):
    case = variant_case(dtype, key_dim, gate)
    x = case.inputs()
    for arch in serving_devices(x).values():
        with testing.emulated(arch=arch):
            in_order = run(x, device)
        check(case, in_order)
        with testing.emulated(seed=1, arch=arch):
            shuffled = gradients(x)
        for name, d in in_order.items():
            assert torch.equal(d, shuffled[name]), name


# ---- how tensors come ------------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("name", ["packed", "expanded", "transposed"])
def test_memory_layout_changes_no_bit(name, device):
    x = CASES[name].inputs(device)
    dense = x.map(lambda y: y.clone(memory_format=torch.contiguous_format))
    strided, contiguous = gradients(x), gradients(dense)
    for key, d in strided.items():
        assert torch.equal(d, contiguous[key]), key


@needs_kernel
@pytest.mark.parametrize("do", ["rows", "one", "transposed"])
def test_layout_of_do_changes_no_bit(do, device):
    case = Case(f"do {do}", 70, heads=1, value_heads=2, do=do, gate="long", beta_sigmoid=True, dtype=torch.bfloat16)
    x = case.inputs(device)
    assert not x.do.is_contiguous()
    strided, contiguous = gradients(x), gradients(x.replace(do=x.do.contiguous()))
    for key, d in strided.items():
        assert torch.equal(d, contiguous[key]), key


@needs_kernel
def test_a_loss_of_the_final_state_alone(device):
    """Autograd has no do then."""
    case = Case("final state alone", 70, heads=1, value_heads=2, gate="long", beta_sigmoid=True, initial_state=True)
    x = case.inputs(device)
    leaves = {name: y.detach().requires_grad_() for name, y in x.differentiable().items()}
    _, final_state = kda_cuda.chunk_kda(**x.replace(**leaves).public())
    found = torch.autograd.grad(final_state, list(leaves.values()), x.dfinal_state)
    zero = gradients(x.replace(do=torch.zeros_like(x.do)))
    for name, d in zip(leaves, found, strict=True):
        assert torch.equal(d, zero[f"d{name}"]), name
    assert not zero["dq"].any() and all(zero[f"d{name}"].any() for name in leaves if name != "q")


@needs_kernel
def test_nothing_but_empty_sequences(device):
    """The gradient of a state that no token touched is that of the final state."""
    x = Case("empties", 0, lengths=(0, 0, 0), dtype=torch.bfloat16, initial_state=True).inputs(device)
    d = gradients(x)
    assert torch.equal(d["dinitial_state"], x.dfinal_state)
    assert d["dq"].shape == x.q.shape and d["dv"].shape == x.v.shape


# ---- what other libraries got wrong ----------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize("case", PEERS.values(), ids=str)
def test_right_in_every_sequence(case, device):
    """All gradients; then those of tokens sequence by sequence, each with its worst token."""
    results = run(case.inputs(device), device)
    assert all(d.isfinite().all() for d in results.values())
    check(case, results)
    check_by_sequence(case, results)


@needs_kernel
@pytest.mark.parametrize("name", ["partial_last_chunks", "partial_last_chunks_fp32"])
def test_no_sequence_reads_its_neighbours(name, device):
    """Whatever stands in the other sequences, NaN included, the gradients of one keep their bits."""
    x = PEERS[name].inputs(device)
    whole = gradients(x)
    for n, (begin, end) in enumerate(itertools.pairwise(x.sequence_bounds())):
        inside = torch.zeros(x.q.shape[1], dtype=torch.bool, device=x.q.device)
        inside[begin:end] = True

        def only(y: Tensor, inside: Tensor = inside) -> Tensor:
            return torch.where(inside.reshape(1, -1, *[1] * (y.dim() - 2)), y, float("nan"))

        streams = {key: only(getattr(x, key)) for key in ("q", "k", "v", "g", "beta", "do")}
        alone = gradients(x.replace(**streams))
        for key in TOKEN_GRADIENTS:
            assert torch.equal(alone[key][:, begin:end], whole[key][:, begin:end]), (key, n)
        assert torch.equal(alone["dinitial_state"][n], whole["dinitial_state"][n]), n


@needs_kernel
@pytest.mark.parametrize("name", ["heavy_tails", "heavy_tails_fp32"])
def test_gradients_of_a_heavy_tailed_gate(name, device):
    """dg by itself, and dA_log, a sum of dg g over all tokens: 1e-2 is half of what a peer misses it by."""
    results = run(PEERS[name].inputs(device), device)
    check(PEERS[name], results)
    truth, _ = expected(PEERS[name])
    for key in ("dg", "dA_log", "ddt_bias"):
        error = accuracy.measure(results[key], truth[key])
        assert error.rms <= 1e-2, f"{key}: {error}"


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("gate", ["violent", "at_the_bound", "steep"])
def test_sum_of_dg_times_g(gate, dtype, device):
    """For a given log-decay. A dg that is a difference of large numbers has the sum wrong by its whole size."""
    case = Case(f"sum of {gate}", 130, heads=2, gate=gate, initial_state=True, dtype=dtype)
    x, dg = case.inputs(), run(case.inputs(device), device)["dg"]
    ours, truth = ((d.double().cpu() * x.g.double()).sum((1, 3)) for d in (dg, expected(case)[0]["dg"]))
    error = accuracy.measure(ours, truth)
    assert error.rms <= accuracy.cap(case, dtype, gradient=True), error


@needs_kernel
@pytest.mark.parametrize("name", ["one_slow_channel", "one_slow_channel_fp32"])
def test_one_slow_channel_hides_no_fast_one(name, device):
    """Each kind of channel by itself: their gradients differ by orders of magnitude."""
    case = PEERS[name]
    results = run(case.inputs(device), device)
    truth, rounded = expected(case)
    for key, channels in itertools.product(("dq", "dk", "dg"), (slice(0, 1), slice(1, None))):
        own = [y[key][..., channels] for y in (results, rounded, truth)]
        accuracy.budget(case, key, own[1], own[2]).check(f"{key} of channels {channels}", own[0], own[2])


def test_the_cases_are_what_they_say():
    """One slow channel: its dg is far above the others'. Heavy tails: decays of every size."""
    truth, _ = expected(PEERS["one_slow_channel"])
    slow, fast = (truth["dg"][..., channels].square().mean().sqrt() for channels in (slice(0, 1), slice(1, None)))
    assert slow > 10 * fast
    x = PEERS["heavy_tails"].inputs(dtype=torch.float64)
    decay = torch.nn.functional.softplus(x.g)
    assert decay.min() < 1e-3 and decay.max() > 1e4
    assert set(REGIMES) >= {"collinear"} and {key_tile(case) for case in GRID.values()} == {64, 128, 256}
    assert bwd_calls.mask(accuracy.GRADIENTS) == 255
