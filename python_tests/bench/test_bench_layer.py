"""The benchmark of a whole layer runs on the CPU, verifies, and refuses to time what is wrong."""

from __future__ import annotations

import json
import sys

import pytest

from bench.python import bench_layer, peers

SMALL = "--device cpu --tokens 20 --hidden 24 --heads 2 --head-dim 8 --dtype float32 --rounds 1"
SIZES = SMALL.split()


def run(tmp_path, *more: str) -> list[dict]:
    out = tmp_path / "layer.json"
    bench_layer.main([*SIZES, "--out", str(out), *more])
    return json.loads(out.read_text())["rows"]


def test_every_way_is_verified_and_timed(tmp_path):
    # `make test` installs it; a GPU machine without a network may lack it, and then says so.
    pytest.importorskip("transformers", minversion="5.17", reason="no transformers >= 5.17 here")
    fast_or_long, theirs = run(tmp_path, "--hosts", "kda_cuda", "transformers")[1:]
    assert fast_or_long["regime"] == "fast" and set(fast_or_long["providers"]) == {"kda_cuda", "sdpa"}
    assert set(theirs["providers"]) == set(bench_layer.WAYS)
    for row in (fast_or_long, theirs):
        for said in row["providers"].values():
            assert said["step"]["gpu_us"]["median"] > 0 and max(said["errors"].values()) < 1e-4
            assert {"output", "x", "q_proj.weight"} <= said["errors"].keys()


def test_what_is_wrong_is_not_timed(monkeypatch, capsys, tmp_path):
    real = bench_layer.Way.step

    def wrong(way, x, dy):
        y, gradients = real(way, x, dy)
        return (y * 1.5 if way.name == "kda_cuda" else y), gradients

    monkeypatch.setattr(bench_layer.Way, "step", wrong)
    monkeypatch.setattr(bench_layer, "time_ways", lambda *a: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=r"2 of 2 rows failed, the first: kda_cuda is wrong in kda_cuda, 20 tokens"):
        run(tmp_path, "--hosts", "kda_cuda")
    assert "FAILED   kda_cuda is wrong" in capsys.readouterr().out


def test_a_host_that_is_missing_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fla", None)
    (row,) = run(tmp_path, "--hosts", "fla")
    assert all(said["failed"].startswith("fla is missing") for said in row["providers"].values())


def test_kernels_that_are_not_compiled_in_time_leave_their_host_out(monkeypatch):
    args = bench_layer.arguments([*SIZES, "--compile", "7", "--workers", "4"])
    assert bench_layer.compile_first(args) == {}, "no GPU: nothing to compile"
    asked = {}

    def late(commands, workers, seconds):
        asked.update(commands)
        return {"fla 1": "7 s were not enough"}

    args.device = "cuda"
    monkeypatch.setattr(bench_layer, "find_spec", lambda name: True)
    monkeypatch.setattr(bench_layer, "tune_shortly", lambda: None)
    monkeypatch.setattr(peers, "in_processes", late)
    assert bench_layer.compile_first(args) == {"fla": "fla's kernels are not compiled: 7 s were not enough"}
    assert set(asked) == {"fla 0", "fla 1", "transformers 0", "transformers 1"}
    assert bench_layer.arguments(asked["fla 1"][3:]).share == [1, 2]


def test_processes_say_how_they_ended(capsys):
    commands = {"good": "print()", "bad": "raise SystemExit('no NVRTC')"}
    failed = peers.in_processes({name: [sys.executable, "-c", code] for name, code in commands.items()}, 2)
    assert failed == {"bad": "failed: no NVRTC"} and "s, failed: no NVRTC" in capsys.readouterr().out
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert peers.in_processes({"late": sleeping}, 1, 0.2) == {"late": "0.2 s were not enough"}
    assert peers.in_processes({"later": sleeping}, 1, 0.0) == {"later": "0 s were not enough"}
