"""The checks of what ptxas said: spills against bench/results/registers.json, serialised wgmma; and occupancy."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from kda_cuda import testing

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "csrc" / "tools" / "resource_table.py"
REPORT = """ptxas info    : Compiling entry function '_ZN3kda6kernelEv' for 'sm_80'
ptxas info    : Function properties for _ZN3kda6kernelEv
    16 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 96 registers, used 1 barriers, 2048 bytes smem
"""
CALLED = """ptxas info    : Function properties for _ZN3kda6calledEv
    0 bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
"""
LOSS = (
    "ptxas info    : (C7518) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ill formed "
    "pipeline stage in the function '_ZN3kda6kernelEv'\n"
)


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


def test_what_a_called_function_spills_is_told_apart(resource_table):
    now, before = (
        resource_table.parse(REPORT.format(stores=8, loads=8) + CALLED.format(stores=stores, loads=4))
        for stores in (20, 16)
    )
    assert resource_table.spilled(now[0]) == 16 and resource_table.called_spills(now[0]) == 24
    assert not resource_table.faults(now, now)
    (fault,) = resource_table.faults(now, before)
    assert "what it calls spills 24 bytes, not 20" in fault


def test_the_scan_of_16_bit_elements_may_never_spill(resource_table):
    rows = resource_table.parse(REPORT.format(stores=8, loads=8))
    for kernel, fault in (("Bf16K128Sm90", True), ("Fp16K64C32", True), ("Bf16K256", False), ("Fp32K64", False)):
        rows[0]["kernel"] = f"chunk_fwd_scan_kernel<{kernel}>"
        found = resource_table.faults(rows, rows)
        assert bool(found) == fault and (not fault or "inner loop" in found[0]), kernel


@pytest.mark.parametrize("slow", [True, False])
def test_serialised_wgmma_fails_the_build(tmp_path, slow):
    report = tmp_path / "kernel.ptxas"
    report.write_text(REPORT.format(stores=0, loads=0) + (LOSS if slow else ""))
    done = subprocess.run([sys.executable, SCRIPT, "--guard", report], capture_output=True, text=True)
    assert (done.returncode != 0) == slow
    for part in ("kernel", "ill formed", "no branch") if slow else ():  # which, why, and what to do about it
        assert part in done.stderr


def test_the_guard_is_part_of_every_kernel_s_build():
    assert "resource_table.py --guard ${report}" in (ROOT / "csrc/kda/kernels.cmake").read_text()


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared_bytes", "blocks"),
    [
        ("80", 256, 32, 0, 8),  # threads
        ("80", 32, 16, 0, 32),  # blocks
        ("90", 256, 64, 0, 4),  # registers
        ("90", 384, 168, 1024, 1),
        ("90", 128, 33, 0, 12),  # 33 registers take the room of 40
        ("90", 128, 32, 112 * 1024, 2),  # shared memory; 1 KB of each block is the driver's
        ("80", 128, 32, 82 * 1024, 1),
        ("120", 128, 32, 99 * 1024, 1),
        ("120", 128, 32, 100 * 1024, 0),  # does not fit
    ],
)
def test_blocks_at_once(resource_table, arch, threads, registers, shared_bytes, blocks):
    sm = resource_table.MULTIPROCESSORS[arch]
    assert sm.blocks_at_once(threads, registers, shared_bytes) == blocks


def baseline() -> list[dict]:
    return json.loads((ROOT / "bench/results/registers.json").read_text())


@pytest.mark.devices("emulator")
def test_the_library_says_how_every_kernel_is_launched(resource_table, device):
    said = resource_table.launches(Path(testing.emulator_path()))
    kernels = [row for row in baseline() if row["arch"] == "90a"]
    assert set(said) == {row["kernel"] for row in kernels}
    recorded = {row["kernel"]: (row["threads"], row["dynamic_shared_bytes"]) for row in kernels}
    assert recorded == said, "make registers"
    assert said["chunk_fwd_clear_kernel<Fp32K64>"] == (256, 0)
    for row in kernels:
        assert row["threads"] <= 1024 and row["blocks_per_sm"] >= 1 and 0 < row["occupancy"] <= 1, row


def test_a_kernel_that_the_library_does_not_launch_has_no_occupancy(resource_table):
    rows = resource_table.parse(REPORT.format(stores=0, loads=0))
    with pytest.raises(KeyError, match="kernel"):
        resource_table.add_occupancy(rows, {})


def test_the_table_groups_what_differs_in_registers_alone(resource_table):
    """And names every kernel on every architecture once."""
    row = {"static_shared_bytes": 0, "dynamic_shared_bytes": 2048, "blocks_per_sm": 4, "occupancy": 0.25}
    row |= {"threads": 128, "spill_store_bytes": 0, "spill_load_bytes": 0}
    kernels = [
        row | {"kernel": f"scan_kernel<{variant}>", "arch": arch, "registers": registers}
        for variant, arch, registers in (("A", "80", 90), ("A", "90a", 96), ("B", "80", 92), ("B", "90a", 94))
    ]
    kernels.append(row | {"kernel": "scan_kernel<C>", "arch": "80", "registers": 90, "spill_load_bytes": 8})
    lines = resource_table.markdown(kernels).splitlines()
    assert lines[-2:] == [
        "| `A`, `B` | 80, 90a | 128 | 2.0 | 4 | 25 % | 0 | 90 to 96 |",
        "| `C` | 80 | 128 | 2.0 | 4 | 25 % | 8 | 90 |",
    ]
    assert "## scan_kernel" in lines


def test_the_table_is_the_baseline_s(resource_table):
    written = (ROOT / "bench/results/registers.md").read_text()
    assert written == resource_table.markdown(baseline()), "make registers"


def test_the_baseline_knows_every_variant():
    kernels = {row["kernel"] for row in baseline()}
    for family in ("chunk_prepare_kernel", "chunk_fwd_scan_kernel", "decode_kernel", "kda_gate_fwd_kernel"):
        assert any(family in kernel for kernel in kernels), family
