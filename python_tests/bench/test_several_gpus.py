"""The benchmark of several GPUs runs whole over gloo, with two ranks that torchrun starts, and simulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.python import several_gpus

ROOT = Path(__file__).parents[2]
SMALL = ["--tokens", "128", "--heads", "2", "--head-dim", "16", "--repeats", "2", "--regimes", "long"]
GRADIENTS = {"dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias"}


def test_two_ranks(tmp_path):
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "bench.python.several_gpus",
    ]
    command = [sys.executable, *launcher, *SMALL, "--out", str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["ranks"] == 2 and found["left_out"] == []
    (row,) = found["rows"]
    assert (row["regime"], row["tokens"], row["heads"]) == ("long", 128, 2)
    own = row["kda_cuda"]
    assert own["errors"].pop("equal_bits") is True
    assert set(own["errors"]) == {"o", *GRADIENTS} and all(error < 3e-2 for error in own["errors"].values())
    assert own["sent_bytes"] == 2 * 16 * 32 * 4
    for what in ("forward", "step"):
        assert {"us", "exchange_us", "exchange_share", "shard_us", "one_gpu_us", "efficiency"} == set(own[what])


def simulated(monkeypatch, out: Path, *arguments: str) -> dict:
    monkeypatch.setattr(sys, "argv", ["several_gpus", *SMALL, "--out", str(out), *arguments])
    several_gpus.main()
    return json.loads(out.read_text())


def test_simulated_ranks(tmp_path, monkeypatch):
    found = simulated(monkeypatch, tmp_path / "out.json", "--simulate", "2", "4")
    (row,) = found["rows"]
    for ranks in ("2", "4"):
        assert set(row[ranks]["errors"]) == {"o", *GRADIENTS}
        assert all(error < 3e-2 for error in row[ranks]["errors"].values())
        assert set(row[ranks]["step"]) == {"us", "one_gpu_us", "work"}


def test_rows_without_time_are_named(tmp_path, monkeypatch):
    late = simulated(monkeypatch, tmp_path / "out.json", "--simulate", "2", "--seconds", "-1")
    assert late["rows"] == [] and late["left_out"] == ["Row(regime='long', tokens=128, heads=2, head_dim=16)"]


def test_a_wrong_result_is_found():
    assert several_gpus.wrong({"o": 0.01, "dq": 0.04, "dv": None, "equal_bits": True}) == {"dq": 0.04, "dv": None}
