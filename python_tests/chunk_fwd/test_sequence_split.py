"""Sequences in segments that run at once: as exact as in one piece, in place, and where a segment forgets."""

from __future__ import annotations

import pytest
import torch

import kda_cuda
from kda_cuda import testing

from ..prefill.test_prefill import bits, make_pool, streams_of, tensor
from ..support import accuracy, oracle
from ..support.cases import Case, Inputs
from .test_chunk_fwd import INVARIANT, RESET, SPLIT, WHOLE, check, run

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.devices("emulator", "cuda")]

# Long enough for segments of four chunks on the emulator: a summary is asked after its first chunk whether it has
# forgotten, but not if less than three are left of it.
ARCHS = {"bf16_k64_sm90": ("90", 768), "bf16_k64": ("80", 768), "bf16_k64_c32": ("86", 384), "fp32_k64": ("90", 384)}


def long_case(variant: str, **changes) -> tuple[Case, str]:
    arch, tokens = ARCHS[variant]
    dtype = torch.float32 if variant.startswith("fp32") else torch.bfloat16
    options = {
        "heads": 1,
        "value_dim": 40,
        "initial_state": True,
        "dtype": dtype,
        "chunk_size": 32 if variant.endswith("c32") else 64,
    }
    return Case(variant, tokens, **options | changes), arch


def split_of(x: Inputs, **options) -> str:
    return kda_cuda.explain(**x.public(), **options).forward.plan["split"]


@pytest.mark.devices("emulator")
@pytest.mark.parametrize("variant", ARCHS)
@pytest.mark.parametrize("gate", ["long", "violent", "steep", "zero"])
def test_long_segments_match_the_recurrence(variant, gate, device):
    case, arch = long_case(variant, gate=gate)
    with testing.emulated(arch=arch):
        x = case.inputs()
        assert f"segments of {4 * int(kda_cuda.explain(**x.public()).forward.plan['chunk'])} tokens, 3" in split_of(x)
        results, kernels = device.run(lambda: run(x))
        assert kernels == SPLIT
        check(case, results)
        reset = RESET if arch == "90" else []
        assert device.run(lambda: run(x, **INVARIANT))[1] == reset + WHOLE


def forgotten_bytes(x: Inputs) -> tuple[int, torch.Tensor, torch.Tensor]:
    """How much of the room for segment states was not written, o, and the final states."""
    call = {**streams_of(x), "state_pool": x.initial_state.clone()}
    plan = kda_cuda.explain(op="prefill", **call).forward.plan
    workspace = torch.full((int(plan["workspace_bytes"]),), 0xFF, dtype=torch.uint8)
    o = kda_cuda.prefill(**call, workspace=workspace)
    return int((workspace[-int(plan["segment_bytes"]) :] == 0xFF).sum()), o, call["state_pool"]


@pytest.mark.devices("emulator")
@pytest.mark.parametrize("variant", ["bf16_k64_sm90", "bf16_k64", "fp32_k64"])
def test_what_a_segment_forgot_is_neither_written_nor_read(variant, device):
    """Its transition stays what the workspace held before, NaN, and nobody notices. One channel that remembers, the
    last, is enough to need it all."""
    case, arch = long_case(variant, gate="zero", keys="normal")
    size = 64 * 64 * 4  # bytes of a transition
    with testing.emulated(arch=arch):
        unwritten = {}
        for name, strong in (("all forget", 64), ("one remembers", 63), ("none forgets", 0)):
            x = case.inputs()
            x.g[..., :strong] = -3.0
            unwritten[name], o, final_state = forgotten_bytes(x)
            truth = oracle.recurrence(x.double())
            rounded = accuracy.low_precision_reference(x, backward=False)
            wanted = {"o": (o, truth.o), "final_state": (final_state, truth.final_state)}
            for key, (result, exact) in wanted.items():
                accuracy.budget(case, key, rounded[key], exact).check(key, result, exact)
        assert unwritten["all forget"] - unwritten["none forgets"] > 0.9 * size
        assert abs(unwritten["one remembers"] - unwritten["none forgets"]) < 0.1 * size


RAGGED = Case(
    "ragged_segments",
    722,
    lengths=(384, 0, 5, 100, 33, 200),
    heads=1,
    value_dim=40,
    initial_state=True,
    gate="long",
    beta_sigmoid=True,
)


def pooled(x: Inputs, in_place: bool, **options) -> tuple[torch.Tensor, ...]:
    """o, the final states and the checkpoints at 128, 256, ... tokens."""
    pool, checkpoints = make_pool(x, 12, pad=8), make_pool(x, 18)
    pool[:6] = x.initial_state
    final = range(6) if in_place else range(6, 12)
    o = kda_cuda.prefill(
        **streams_of(x),
        state_pool=pool,
        slot_of=tensor(x, final),
        initial_slot_of=tensor(x, range(6)),
        checkpoint_pool=checkpoints,
        checkpoint_slots=tensor(x, [[3 * n, 3 * n + 1, 3 * n + 2] for n in range(6)]),
        checkpoint_interval=128,
        **options,
    )
    return o, pool[list(final)], checkpoints


def test_in_place_with_checkpoints(device):
    """Long, short and empty sequences: writing the final states where the initial ones were changes no bit; and in one
    piece they are the same to the accuracy of fp32."""
    x = RAGGED.inputs(device)
    assert device.name == "cuda" or "sequences into segments" in split_of(x)
    apart, in_place, whole = pooled(x, False), pooled(x, True), pooled(x, True, **INVARIANT)
    for a, b, c in zip(apart, in_place, whole, strict=True):
        assert torch.equal(bits(a), bits(b))
        assert torch.equal(a.isnan(), c.isnan()), "the same checkpoints"
        a, c = a.nan_to_num(), c.nan_to_num()
        assert (a - c).norm() <= accuracy.CAP[torch.float32] * c.norm()
    assert int((~whole[2].isnan()).all((1, 2, 3)).sum()) == 4, "three of the first sequence, one of the last"


@pytest.mark.devices("emulator")
def test_rounds_beside_each_other(device):
    """Where the scan leaves multiprocessors free, it runs beside the prepare kernel, whose blocks then are teams, and
    rounds follow each other through the same records. Rounds change no bit."""
    case = Case("rounds", 4096 + 7, heads=1, value_dim=8, initial_state=True, dtype=torch.bfloat16, gate="long")
    x = case.inputs()
    results = {}
    for multiprocessors, overlap in (
        (1, "the scan follows the prepare kernel"),
        (4, "the scan runs beside the prepare kernel, on 1 multiprocessors"),  # with teams: there are not many
        (132, "the scan runs beside the prepare kernel, on 1 multiprocessors"),
    ):
        with testing.emulated(multiprocessors=multiprocessors):
            plan = kda_cuda.explain(**x.public(), **INVARIANT).forward.plan
            assert plan["overlap"].startswith(overlap)
            results[multiprocessors], kernels = device.run(lambda: run(x, **INVARIANT))
            prepare = "chunk_prepare_teams" if multiprocessors == 4 else "chunk_prepare"
            assert int(plan["rounds"]) >= 2 and kernels == RESET + [prepare, "chunk_fwd_scan"] * int(plan["rounds"])
    check(case, results[132])
    for name, y in results[132].items():
        assert torch.equal(y, results[1][name]) and torch.equal(y, results[4][name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["long", "violent", "zero"])
def test_a_long_sequence_on_a_gpu(dtype, gate):
    case = Case("long_on_gpu", 65536, heads=2, key_dim=128, value_dim=128, dtype=dtype, initial_state=True, gate=gate)
    x = case.inputs("cuda")
    assert "sequences into segments" in split_of(x)
    split, again, whole = run(x), run(x), run(x, **INVARIANT)
    for name, y in split.items():
        assert torch.equal(y, again[name]), name
        difference, size = (y.float() - whole[name].float()).norm(), whole[name].float().norm()
        assert difference <= 2 * accuracy.CAP[dtype] * size, name


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [4096, 4096 - 5])
def test_the_scan_beside_the_prepare_kernel_on_a_gpu(tokens):
    """More than one round, in which every record is written and read twice; beside each other, again, and per head."""
    case = Case(
        "beside_on_gpu",
        tokens,
        heads=8,
        key_dim=128,
        value_dim=128,
        dtype=torch.bfloat16,
        initial_state=True,
        gate="long",
    )
    x = case.inputs("cuda")
    plan = kda_cuda.explain(**x.public(), **INVARIANT).forward.plan
    assert plan["overlap"].startswith("the scan runs beside the prepare kernel") and int(plan["rounds"]) >= 2
    results, again = run(x, **INVARIANT), run(x, **INVARIANT)
    for name, y in results.items():
        assert torch.equal(y, again[name]), name
    head = slice(3, 4)
    streams = {name: getattr(x, name)[:, :, head] for name in ("q", "k", "v", "g", "beta")}
    one = x.replace(**streams, A_log=x.A_log[head], dt_bias=x.dt_bias[head], initial_state=x.initial_state[:, head])
    alone = run(one, **INVARIANT)
    assert torch.equal(alone["o"], results["o"][:, :, head])
    assert torch.equal(alone["final_state"], results["final_state"][:, head])


@pytest.mark.devices("emulator")
def test_explain_says_why(device):
    x = long_case("bf16_k64_sm90")[0].inputs()
    assert split_of(x).startswith(
        "V into 1 of 64 columns; sequences into segments of 256 tokens, 3 for one of mean length in a round, as this "
        "device wants: predicted "
    )
    assert split_of(x, **INVARIANT) == "V into 1 of 64 columns; no sequence, as batch_invariant asks"
    short = x.replace(**{name: getattr(x, name)[:, :64] for name in ("q", "k", "v", "g", "beta")})
    assert split_of(short) == "V into 1 of 64 columns; no sequence: one chunk, or heads and V fill the device"
