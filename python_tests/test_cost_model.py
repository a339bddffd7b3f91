"""The cost model is the library's in what the library can say, and its table is what it gives."""

from __future__ import annotations

import json

import pytest
import torch

from bench.python import cost_model, shapes
from kda_cuda import plans

MODEL = cost_model.VARIANTS["bf16_k128_sm90"]


@pytest.mark.devices("emulator")
def test_records_are_as_large_as_the_library_says(device):
    call = plans.ChunkCall(torch.device("cpu"), torch.bfloat16, 1, MODEL.chunk, None, 1, 128, 128)
    plan = call.plan("kda_cuda_emulated")
    assert plan["variant"] == "bf16_k128_sm90" and int(plan["chunk"]) == MODEL.chunk
    alignment = 1024
    assert int(plan["workspace_bytes"]) - alignment == MODEL.record_bytes


def test_the_table_is_the_model_s():
    measured = json.loads((cost_model.RESULTS / "chunk_fwd_h100.json").read_text())
    written = (cost_model.RESULTS / "chunk_fwd_cost.md").read_text()
    assert written == cost_model.table("bf16_k128_sm90", measured), "python -m bench.python.cost_model writes it"
    assert all(f"| {shape} |" in written for shape in shapes.ALL)


def test_scan_is_bound_by_its_longest_chain_the_device_or_the_memory():
    one, step = shapes.even(8192, 16, 1), MODEL.scan_us
    assert MODEL.scan(one, cost_model.H100) == pytest.approx(128 * step)  # 32 blocks on 132 SMs
    eight, no_wait = shapes.even(8192, 96, 8), cost_model.Gpu(132, 1e3)  # 1536 blocks of 16 chunks
    assert MODEL.scan(eight, no_wait) == pytest.approx(12 * 16 * step)
    moved = MODEL.slots(eight) * 96 * (MODEL.record_bytes + 64 * 128 * 2)
    assert MODEL.scan(eight, cost_model.H100) == pytest.approx(moved / 3.0e6)
    assert MODEL.parts(shapes.even(1024, 4, 1)) == 1 and MODEL.parts(one) == 2


def test_prepare_cannot_beat_the_memory():
    slow = cost_model.Gpu(132, 0.1)
    shape = shapes.even(8192, 64, 1)
    assert MODEL.prepare(shape, slow) > 10 * cost_model.floor_us(shape, cost_model.H100)
    assert cost_model.floor_us(shape, cost_model.H200) == pytest.approx(156.3, abs=0.1)
