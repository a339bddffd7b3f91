"""The check that no kernel spills more than bench/results/registers.json says."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "csrc" / "python" / "resource_table.py"
REPORT = """ptxas info    : Compiling entry function '_ZN3kda6kernelEv' for 'sm_80'
    16 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 2048 bytes smem
"""


@pytest.fixture(scope="module")
def resource_table():
    spec = importlib.util.spec_from_file_location("resource_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_report_becomes_a_row(resource_table):
    (row,) = resource_table.parse(REPORT.format(stores=8, loads=12))
    assert row["arch"] == "80" and row["registers"] == 96 and row["static_shared_bytes"] == 2048
    assert resource_table.spilled(row) == 20


@pytest.mark.parametrize(
    ("now", "before", "fault"),
    [
        ((8, 8), (8, 8), None),
        ((4, 8), (8, 8), None),
        ((8, 12), (8, 8), "spills 20 bytes, the baseline has 16"),
        ((0, 4), None, "spills 4 bytes, the baseline does not know it"),
        ((0, 0), None, None),
    ],
)
def test_more_spills_than_the_baseline_fail(resource_table, tmp_path, now, before, fault):
    baseline = resource_table.parse(REPORT.format(stores=before[0], loads=before[1])) if before else []
    (tmp_path / "baseline.json").write_text(json.dumps(baseline))
    (tmp_path / "kernel.ptxas").write_text(REPORT.format(stores=now[0], loads=now[1]))
    command = [sys.executable, SCRIPT, "--check", tmp_path / "baseline.json", tmp_path / "kernel.ptxas"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == (fault is None), done.stderr
    assert fault is None or fault in done.stderr


def test_the_baseline_knows_every_variant():
    kernels = {row["kernel"] for row in json.loads((ROOT / "bench/results/registers.json").read_text())}
    for family in ("chunk_fwd_prepare_kernel", "chunk_fwd_scan_kernel", "decode_kernel", "kda_gate_fwd_kernel"):
        assert any(family in kernel for kernel in kernels), family
