"""The chunkwise forward through ``kda_cuda.chunk_kda``: the reference, the kernels on the CPU, the kernels on a GPU."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kda_cuda
from kda_cuda import testing

from ..support import accuracy, oracle
from ..support.cases import CASES, Case, Inputs

CLEAR = ["chunk_fwd_clear"]  # first of all, where there is cu_seqlens: the outputs of tokens that no sequence has
RESET = ["chunk_fwd_reset"]  # once, where kernels run beside each other: the counters that they wait for
WHOLE = ["chunk_prepare", "chunk_fwd_scan"]  # the launches of a round, and where sequences are split
SPLIT = ["chunk_prepare", "chunk_fwd_summarise", "chunk_fwd_chain", "chunk_fwd_scan"]
# Tests that compare a whole with a part of it bit by bit ask for this: whether a sequence is split depends on its
# length and batch, so only then are the bits promised. Split calls are held to the recurrence: test_sequence_split.
INVARIANT = {"deterministic": "batch_invariant"}
MODEL = {"gate": "long", "beta_sigmoid": True}
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run(x: Inputs, **options) -> dict[str, Tensor]:
    with torch.inference_mode():
        o, final_state, h = kda_cuda.chunk_kda(**x.public(), return_intermediate_states=True, **options)
    return {"o": o, "final_state": final_state, "h": h.flatten(0, 1)}


def assert_ran(kernels: list[str], device) -> None:
    """Every launch, round by round: the emulator works in rounds, and splits sequences, in small calls already."""
    kernels = kernels[kernels[:1] == CLEAR :]
    steps = SPLIT if SPLIT[1] in kernels else WHOLE
    kernels = kernels[kernels[:1] == RESET and steps == WHOLE :]
    assert kernels == steps * (len(kernels) // len(steps)) and bool(kernels) == device.runs_kernels


def check(case: Case, results: dict[str, Tensor]) -> None:
    x = case.inputs()
    truth = oracle.named(oracle.recurrence(x.double()), {})
    rounded = accuracy.low_precision_reference(x, backward=False)
    for name, wanted in truth.items():
        accuracy.budget(case, name, rounded[name], wanted).check(name, results[name], wanted)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_matches_the_recurrence(case, device):
    """On the emulator by every variant that serves the case."""
    x = case.inputs(device)
    before = x.map(torch.clone)
    for serve in serving_devices(x) if device.name == "emulator" else [contextlib.nullcontext()]:
        with serve:
            results, kernels = device.run(lambda: run(x))
        assert_ran(kernels, device)
        for name, y in x.tensors().items():
            assert torch.equal(y, before.tensors()[name]), f"{name} was modified"
        check(case, results)


def serving_devices(x: Inputs) -> list[contextlib.AbstractContextManager]:
    """To be a device of each kind that has a variant of its own for this call."""
    variants: dict[str, str] = {}
    for arch in ("90", "80", "86"):
        with testing.emulated(arch=arch):
            variants.setdefault(kda_cuda.explain(**x.public()).forward.plan["variant"], arch)
    return [testing.emulated(arch=arch) for arch in variants.values()]


def test_every_length(device):
    """Around every boundary of groups, splits and chunks, in one call; the sequences are unlike each other."""
    lengths = (*range(1, 18), 31, 32, 33, 47, 48, 49, 63, 64, 65, 66, 95, 97, 127, 128, 129, 130)
    case = Case("lengths", sum(lengths), lengths=lengths, heads=1, key_dim=64, value_dim=16, dtype=torch.bfloat16,
                initial_state=True, **MODEL)  # fmt: skip
    check(case, run(case.inputs(device)))


# every compiled variant: dtype, K, chunk_size, and the device that it is for
VARIANTS = {
    "bf16_k64": (torch.bfloat16, 64, 64, "80"),
    "bf16_k64_c32": (torch.bfloat16, 60, 32, "86"),
    "bf16_k64_sm90": (torch.bfloat16, 64, 64, "90"),
    "bf16_k128": (torch.bfloat16, 128, 64, "80"),
    "bf16_k128_c32": (torch.bfloat16, 100, 64, "86"),
    "bf16_k128_sm90": (torch.bfloat16, 128, 64, "90"),
    "bf16_k256": (torch.bfloat16, 256, 64, "90"),
    "fp16_k64": (torch.float16, 64, 64, "80"),
    "fp16_k64_c32": (torch.float16, 64, 32, "86"),
    "fp16_k64_sm90": (torch.float16, 64, 64, "90"),
    "fp16_k128": (torch.float16, 96, 64, "80"),
    "fp16_k128_c32": (torch.float16, 128, 64, "86"),
    "fp16_k128_sm90": (torch.float16, 128, 64, "90"),
    "fp16_k256": (torch.float16, 160, 32, "80"),
    "fp32_k64": (torch.float32, 64, 64, "90"),
    "fp32_k128": (torch.float32, 128, 32, "80"),
    "fp32_k256": (torch.float32, 256, 64, "90"),
}


def variant_case(variant: str, **changes) -> Case:
    dtype, key_dim, chunk_size, _ = VARIANTS[variant]
    options = {"value_heads": 2, "heads": 1, "value_dim": 72, "initial_state": True, **MODEL, **changes}
    return Case(variant, 150, key_dim=key_dim, dtype=dtype, chunk_size=chunk_size, **options)


def assert_variant(variant: str, x: Inputs) -> None:
    plan = kda_cuda.explain(**x.public()).forward.plan
    assert plan["variant"] == variant


def test_no_variant_is_left_out():
    sources = Path(__file__).parents[2] / "csrc/kda/chunk_fwd/variants"
    assert set(VARIANTS) == {path.stem for path in sources.glob("*.cu")}


@pytest.mark.devices("emulator")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("gate", ["long", "violent"])
def test_every_variant_under_two_schedules(variant, gate, device):
    case = variant_case(variant, gate=gate, beta_sigmoid=gate == "long")
    x = case.inputs()
    with testing.emulated(arch=VARIANTS[variant][3]):
        assert_variant(variant, x)
        in_order, kernels = device.run(lambda: run(x))
    assert_ran(kernels, device)
    check(case, in_order)
    with testing.emulated(seed=1, arch=VARIANTS[variant][3]):
        shuffled = run(x)
    for name, y in in_order.items():
        assert torch.equal(y, shuffled[name]), name


@pytest.mark.devices("emulator")
@pytest.mark.parametrize(
    "variant", ["bf16_k64", "bf16_k64_sm90", "fp16_k128_c32", "fp32_k64", "fp32_k128", "bf16_k256"]
)
def test_eight_schedules_agree_bit_by_bit(variant, device):
    case = variant_case(variant, heads=1, value_heads=1, value_dim=40)
    x = case.inputs()
    runs = []
    for seed in range(8):
        with testing.emulated(seed=seed, threads=1 + seed % 2, arch=VARIANTS[variant][3]):
            assert_variant(variant, x)
            runs.append(run(x))
    for other in runs[1:]:
        for name, y in runs[0].items():
            assert torch.equal(y, other[name]), name


SEVERAL = ("long_memory", "violent", "gva", "v_first", "many_chunks")


def section(x: Inputs, begin: int, end: int, state: Tensor | None) -> Inputs:
    streams = {name: getattr(x, name)[:, begin:end] for name in ("q", "k", "v", "g", "beta")}
    return x.replace(**streams, initial_state=state, cu_seqlens=None)


@pytest.mark.parametrize("name", SEVERAL)
def test_split_and_continue_at_a_chunk_is_the_same(name, device):
    """The state that is handed over is the one that the kernel holds, so no bit may differ; the reference's products
    come in other batches, which may sum in another order."""
    x = CASES[name].inputs(device)
    whole, cut = run(x, **INVARIANT), 64
    first = run(section(x, 0, cut, x.initial_state), **INVARIANT)
    second = run(section(x, cut, x.q.shape[1], first["final_state"]), **INVARIANT)
    tolerance = {"rtol": 0, "atol": 0} if device.runs_kernels else {}
    joined = torch.cat([first["o"], second["o"]], 1)
    torch.testing.assert_close(joined, whole["o"], **tolerance)
    torch.testing.assert_close(second["final_state"], whole["final_state"], **tolerance)


@pytest.mark.parametrize("name", SEVERAL)
def test_split_and_continue_anywhere_is_within_budget(name, device):
    case = CASES[name]
    x = case.inputs(device)
    state, outputs = x.initial_state, []
    for begin, end in itertools.pairwise((0, 1, 38, 41, x.q.shape[1])):
        part = run(section(x, begin, end, state))
        state = part["final_state"]
        outputs.append(part["o"])
    inputs = case.inputs()
    truth, rounded = oracle.recurrence(inputs.double()), accuracy.low_precision_reference(inputs, backward=False)
    for key, result in {"o": torch.cat(outputs, 1), "final_state": state}.items():
        wanted = truth.o if key == "o" else truth.final_state
        accuracy.budget(case, key, rounded[key], wanted).check(key, result, wanted)


@pytest.mark.parametrize("name", ["varlen", "varlen_v_first", "varlen_ones"])
def test_packed_sequences_equal_each_alone(name, device):
    x = CASES[name].inputs(device)
    together, chunk_at = run(x, **INVARIANT), 0
    tolerance = {"rtol": 0, "atol": 0} if device.runs_kernels else {}
    for n, (begin, end) in enumerate(itertools.pairwise(x.sequence_bounds())):
        state = None if x.initial_state is None else x.initial_state[n : n + 1]
        if begin == end:
            expected = torch.zeros_like(together["final_state"][n : n + 1]) if state is None else state
            assert torch.equal(together["final_state"][n : n + 1], expected)
            continue
        alone = run(section(x, begin, end, state), **INVARIANT)
        chunks = alone["h"].shape[0]
        torch.testing.assert_close(together["o"][:, begin:end], alone["o"], **tolerance)
        torch.testing.assert_close(together["final_state"][n : n + 1], alone["final_state"], **tolerance)
        torch.testing.assert_close(together["h"][chunk_at : chunk_at + chunks], alone["h"], **tolerance)
        chunk_at += chunks
    assert chunk_at == together["h"].shape[0]


@pytest.mark.parametrize("name", ["packed", "expanded", "transposed"])
def test_memory_layout_changes_no_bit(name, device):
    x = CASES[name].inputs(device)
    dense = x.map(lambda y: y.clone(memory_format=torch.contiguous_format))
    strided, contiguous = run(x), run(dense)
    for key, y in strided.items():
        assert torch.equal(y, contiguous[key]), key


@pytest.mark.parametrize("name", ["gva", "two_tokens", "fast"])
def test_heads_and_batch_rows_do_not_mix(name, device):
    """Other heads and rows may hold anything, NaN included."""
    x = CASES[name].inputs(device)
    whole = run(x)
    group = x.v.shape[2] // x.q.shape[2]
    for row, head in itertools.product(range(x.q.shape[0]), range(x.v.shape[2])):

        def others_nan(y: Tensor, keep: int, row: int = row) -> Tensor:
            kept = torch.full_like(y, float("nan"))
            kept[row, :, keep] = y[row, :, keep]
            return kept

        streams = {n: others_nan(getattr(x, n), head) for n in ("v", "g", "beta")}
        streams |= {n: others_nan(getattr(x, n), head // group) for n in ("q", "k")}
        alone = run(x.replace(**streams))
        assert torch.equal(alone["o"][row, :, head], whole["o"][row, :, head])
        assert torch.equal(alone["final_state"][row, head], whole["final_state"][row, head])


def test_nothing_but_empty_sequences(device):
    case = Case("empties", 0, lengths=(0, 0, 0), dtype=torch.bfloat16, initial_state=True)
    x = case.inputs(device)
    results = run(x)
    assert results["o"].shape == (1, 0, 2, 64)
    assert torch.equal(results["final_state"], x.initial_state)
    assert results["h"].shape == (0, 2, 64, 64)


@pytest.mark.devices("emulator", "cuda")
def test_twice_the_same(device):
    x = CASES["long_memory"].inputs(device)
    first, second = run(x), run(x)
    for name, y in first.items():
        assert torch.equal(y, second[name]), name


@pytest.mark.parametrize("name", ["long_memory", "varlen"])
def test_without_states(name, device):
    """What is not asked for changes nothing that is."""
    x = CASES[name].inputs(device)
    with torch.inference_mode():
        o, final_state = kda_cuda.chunk_kda(**{**x.public(), "output_final_state": False})
    assert final_state is None
    torch.testing.assert_close(o, run(x)["o"], rtol=0, atol=0)
