"""The cost model is the library's, and its table is what that gives."""

from __future__ import annotations

import json

import pytest

from bench.python import cost_model, shapes
from bench.python.cost_model import H100, H200, MAIN
from kda_cuda import testing
from kda_cuda.plans import PlannedGpu

pytestmark = pytest.mark.devices("emulator")


@pytest.mark.parametrize("variant", cost_model.VARIANTS, ids=lambda x: x.name)
def test_kernels_take_no_longer_than_one_after_another(variant, device):
    """And at least as long as what they have to move."""
    for shape in shapes.ALL:
        call, prepare, scan = (variant.us(shape, H100, of) for of in ("", "prepare", "scan"))
        assert cost_model.floor_us(shape, H100, variant) < call <= 1.001 * (prepare + scan), shape
        assert variant.plan(shape, H100)["variant"] == variant.name


def test_the_table_is_the_model_s(device):
    results = [json.loads((cost_model.RESULTS / f"chunk_fwd_{name}h100.json").read_text()) for name in ("", "cpp_")]
    written = (cost_model.RESULTS / "chunk_fwd_cost.md").read_text()
    assert written == cost_model.report(*results), "python -m bench.python.cost_model writes it"
    assert all(written.count(f"| {shape} |") == 2 for shape in shapes.ALL)


def test_the_kernels_are_bound_by_the_device_or_the_memory(device):
    shape, slow = shapes.even(8192, 64, 1), PlannedGpu(132, 0.1)
    for of, moved in (("prepare", 64 * (4 * 128 + 1) * 2), ("scan", 64 * 128 * 2)):
        least = 128 * 64 * (moved + 74752) / 0.1e6  # 74752: bytes of a record
        assert MAIN.us(shape, slow, of) == pytest.approx(least, rel=0.01)
        assert MAIN.us(shape, H200, of) <= MAIN.us(shape, H100, of)
        assert MAIN.us(shape, PlannedGpu(1, 3.0), of) > 50 * MAIN.us(shape, H100, of)
    assert cost_model.floor_us(shape, H200) == pytest.approx(156.3, abs=0.1)


def test_the_scan_of_a_few_heads_is_a_chain(device):
    few, more = (MAIN.us(shapes.even(8192, heads, 1), H100, "scan") for heads in (16, 24))  # 32 and 48 blocks on 132
    assert few == pytest.approx(more, rel=0.1)
    assert MAIN.us(shapes.even(16384, 16, 1), H100, "scan") == pytest.approx(2 * few, rel=0.1)


def test_variants_differ_as_measured(device):
    """Ratios to the main variant at T 8192, H 16, of chunk_fwd_cpp_h100.json, within a quarter."""
    measured = json.loads((cost_model.RESULTS / "chunk_fwd_cpp_h100.json").read_text())["benchmarks"]
    took = {tuple(row["name"].split("/")[1:4]): row["us"] for row in measured}
    shape = shapes.even(8192, 16, 1)
    for variant in cost_model.VARIANTS:
        us = took[variant.name.removesuffix("_sm90"), str(shape), "long"]
        assert variant.us(shape, H100) == pytest.approx(us, rel=0.25), variant


def test_another_device_is_planned_for_as_an_argument(device):
    call = MAIN.call(shapes.even(8192, 16, 1))
    plans_of_h100 = []
    for arch, variant in (("80", "bf16_k128"), ("90", "bf16_k128_sm90")):
        with testing.emulated(arch=arch):
            before = call.forward_plan("kda_cuda_emulated")
            plans_of_h100.append(call.forward_plan("kda_cuda_emulated", planned=H100))
            assert call.forward_plan("kda_cuda_emulated") == before and before["variant"] == variant
            assert float(before["predicted_us"]) > 10 * float(plans_of_h100[-1]["predicted_us"])  # one multiprocessor
    assert plans_of_h100[0] == plans_of_h100[1] and plans_of_h100[0]["variant"] == MAIN.name
