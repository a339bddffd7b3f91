"""Two builds beside each other: a build agrees with itself, another one is told apart, no build is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bench.python import compare_builds
from bench.python.shapes import REGIMES

ROOT = Path(__file__).parents[2]
SMALL = ["--device", "cpu", "--only", "T64_H2_N1", "--repeats", "2"]


def test_a_build_beside_itself(tmp_path):
    result = compare_builds.main([str(ROOT), *SMALL, "--small-decode", "--json", str(tmp_path / "out.json")])
    assert len(result["rows"]) == 6 and all(row["same_bits"] for row in result["rows"])
    sequences = {f"{op} {regime}" for op in ("chunk_kda", "prefill") for regime in REGIMES}
    assert set(result["geomeans"]) == sequences | {"decode fp32"}
    assert all(row["gpu_us_ratio"] > 0 and row["eager_us_ratio"] > 0 for row in result["rows"])
    assert (tmp_path / "out.json").is_file()


def test_another_build_is_told_apart(tmp_path):
    shutil.copytree(ROOT / "kda_cuda", tmp_path / "kda_cuda", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    with (tmp_path / "kda_cuda" / "__init__.py").open("a") as file:
        file.write("_chunk = chunk_kda\n\n\ndef chunk_kda(**a):\n    o, state = _chunk(**a)\n    return o + 1, state\n")
    rows = compare_builds.main([str(tmp_path), *SMALL, "--ops", "chunk_kda"])["rows"]
    assert [row["same_bits"] for row in rows] == [False, False]


def test_no_build(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_builds.main([str(tmp_path), *SMALL])
    assert f"old is {tmp_path / 'kda_cuda'}, expected a package kda_cuda in it" in capsys.readouterr().err
