"""The host overhead benchmark measures what it says: a checked call up to its launch, and an op that does nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.python import bench_host_overhead
from kda_cuda import testing

RESULTS = Path(__file__).parents[2] / "bench" / "results"


@pytest.mark.devices("emulator")
def test_host_overhead(device):
    result = bench_host_overhead.compare(calls=20, rounds=2)
    assert set(result) == {"empty_us", "decode_us", "ratio"} and result["empty_us"] > 0
    args = bench_host_overhead.arguments(batch=1, heads=1)
    _, kernels = device.run(lambda: torch.ops.kda_cuda_emulated.decode(*args))
    assert kernels == ["decode"], "launches stayed switched off"
    testing.load_emulator().kda_emulator_skip_launches(1)
    try:
        bad = list(args)
        bad[1] = bad[1][..., :5]
        with pytest.raises(ValueError, match="k has shape"):
            torch.ops.kda_cuda_emulated.decode(*bad)
    finally:
        testing.load_emulator().kda_emulator_skip_launches(0)


def test_recorded_result_is_within_the_promise():
    result = json.loads((RESULTS / "host_overhead_cpu.json").read_text())
    assert result["ratio"] <= bench_host_overhead.ALLOWED
