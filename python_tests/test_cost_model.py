"""The cost model is the library's in what the library can say, and its table is what it gives."""

from __future__ import annotations

import json

import pytest
import torch

from bench.python import cost_model, shapes
from kda_cuda import plans

MODEL = cost_model.VARIANTS["bf16_k128_sm90"]


@pytest.mark.devices("emulator")
@pytest.mark.parametrize("variant", cost_model.VARIANTS)
def test_records_are_as_large_as_the_library_says(variant, device):
    model, dtype = cost_model.VARIANTS[variant], variant.split("_")[0]
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    call = plans.ChunkCall(torch.device("cpu"), dtypes[dtype], 1, model.chunk, None, 1, model.head_dim, model.head_dim)
    plan = call.plan("kda_cuda_emulated")
    assert plan["variant"].removesuffix("_sm90") == variant.removesuffix("_sm90") and int(plan["chunk"]) == model.chunk
    assert model.element_bytes == dtypes[dtype].itemsize
    alignment = 1024
    assert int(plan["workspace_bytes"]) - alignment == model.record_bytes


def test_the_table_is_the_model_s():
    results = [json.loads((cost_model.RESULTS / f"chunk_fwd_{name}h100.json").read_text()) for name in ("", "cpp_")]
    written = (cost_model.RESULTS / "chunk_fwd_cost.md").read_text()
    assert written == cost_model.report(*results), "python -m bench.python.cost_model writes it"
    assert all(written.count(f"| {shape} |") == 2 for shape in shapes.ALL)


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
