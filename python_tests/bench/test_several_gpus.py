"""The benchmark of several GPUs runs whole over gloo, with two ranks that torchrun starts, and simulated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ["--tokens", "128", "--heads", "2", "--head-dim", "16", "--repeats", "2"]


def run(out: Path, *arguments: str) -> dict:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *arguments, *SMALL, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_two_ranks(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    found = run(tmp_path / "out.json", *launcher, "-m", "bench.python.several_gpus", "--regimes", "long")
    assert found["ranks"] == 2 and found["left_out"] == []
    (row,) = found["rows"]
    assert (row["regime"], row["tokens"], row["heads"]) == ("long", 128, 2)
    own = row["kda_cuda"]
    assert own["errors"].pop("equal_bits") is True
    assert set(own["errors"]) == {"o", "dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias"}
    assert all(0 <= error < 3e-2 for error in own["errors"].values())
    assert own["sent_bytes"] == 2 * 16 * 32 * 4
    for what in ("forward", "step"):
        assert {"us", "exchange_us", "exchange_share", "shard_us", "one_gpu_us", "efficiency"} == set(own[what])


def test_simulated_ranks(tmp_path):
    found = run(tmp_path / "out.json", "-m", "bench.python.several_gpus", "--simulate", "2", "4", "--seconds", "1000")
    assert [row["regime"] for row in found["rows"]] == ["fast", "long"]
    for row in found["rows"]:
        for ranks in ("2", "4"):
            assert all(error < 3e-2 for error in row[ranks]["errors"].values())
            assert row[ranks]["step"]["work"] > 0
    late = run(tmp_path / "none.json", "-m", "bench.python.several_gpus", "--simulate", "2", "--seconds", "-1")
    assert late["rows"] == [] and len(late["left_out"]) == 2
