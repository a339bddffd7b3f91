"""The benchmark of a whole layer runs on the CPU, verifies, and refuses to time what is wrong."""

from __future__ import annotations

import json

import pytest

from bench.python import bench_layer

# `make test` installs it; a GPU machine without a network may lack it, and then says so.
pytest.importorskip("transformers", minversion="5.17", reason="no transformers >= 5.17 here")
SMALL = [
    "--device",
    "cpu",
    "--hosts",
    "transformers",
    "--tokens",
    "20",
    "--hidden",
    "24",
    "--heads",
    "2",
    "--head-dim",
    "8",
    "--dtype",
    "float32",
    "--rounds",
    "2",
]


def test_every_way_is_verified_and_timed(tmp_path):
    out = tmp_path / "layer.json"
    bench_layer.main([*SMALL, "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["ways"].keys() == set(bench_layer.WAYS)
    for said in row["ways"].values():
        assert said["gpu_us"]["median"] > 0 and max(said["errors"].values()) < 1e-4
        assert {"output", "x", "q_proj.weight"} <= said["errors"].keys()


def test_what_is_wrong_is_not_timed(monkeypatch, capsys):
    monkeypatch.setattr(bench_layer.door, "register", lambda: None)
    real = bench_layer.step

    def wrong_when_patched(layer, x, dy):
        y, gradients = real(layer, x, dy)
        return (y * 1.5 if "forward" in vars(layer) else y), gradients

    truths = bench_layer.truth

    def exact(layer, x, dy):
        monkeypatch.setattr(bench_layer, "step", real)
        result = truths(layer, x, dy)
        monkeypatch.setattr(bench_layer, "step", wrong_when_patched)
        return result

    monkeypatch.setattr(bench_layer, "truth", exact)
    with pytest.raises(SystemExit, match=r"1 of 2 ways failed, the first: wrong, not timed: \{'output'"):
        bench_layer.main(SMALL)
    assert "patched    wrong, not timed" in capsys.readouterr().out
