"""The microbenchmarks link against the kernels, list the shapes of the Python benchmark, and reject bad arguments."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.python import shapes

ROOT = Path(__file__).parents[2]
HEADER = Path("/usr/include/benchmark/benchmark.h")


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def cuda() -> dict[str, str]:
    options = run(sys.executable, ROOT / "setup.py", "--print-kernel-options", "90a")
    if options.returncode or not HEADER.exists():
        # `make test` brings both (Makefile, gtest), so it runs there; pytest alone, on any machine, may be without.
        pytest.skip("building a microbenchmark needs nvcc and libbenchmark-dev")
    return dict(re.findall(r"'-D(\w+)=(.*?)'", options.stdout))


@pytest.fixture(scope="module", params=["decode", "chunk_fwd", "chunk_bwd"])
def benchmark(request, cuda, tmp_path_factory) -> Path:
    """bench/cpp/bench_*.cpp, linked with the objects of whichever build of the kernels is the newest."""
    objects: dict[Path, list[Path]] = {}
    kernels = request.param.replace("chunk_bwd", "chunk_[bf]wd")  # it launches the forward's prepare kernel
    for path in ROOT.glob(f"build/cmake-*/kernels/{kernels}_*.o"):
        objects.setdefault(path.parent, []).append(path)
    if not objects:
        # A checkout for the reference alone (KDA_CUDA_BUILD=off) has nothing to link; `make test` compiles them first.
        pytest.skip("no kernels were compiled in this checkout")
    newest = objects[max(objects, key=lambda folder: max(x.stat().st_mtime for x in objects[folder]))]
    executable = tmp_path_factory.mktemp("bench") / f"bench_{request.param}"
    hopper = ["-DKDA_HAS_SM90"] if any("_sm90" in x.name for x in newest) else []
    done = run(
        "g++",
        "-std=c++17",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        '-DKDA_COMMIT="test"',
        *hopper,
        f"-I{ROOT}",
        f"-I{ROOT / 'csrc'}",
        "-isystem",
        cuda["CUDA_INCLUDE"],
        ROOT / f"bench/cpp/bench_{request.param}.cpp",
        *newest,
        cuda["KDA_CUDART"],
        "-lbenchmark",
        "-ldl",
        "-lrt",
        "-lpthread",
        "-o",
        executable,
    )
    assert done.returncode == 0, done.stderr
    return executable


def test_microbenchmark(benchmark):
    listed = run(benchmark, "--benchmark_list_tests=true")
    assert listed.returncode == 0, listed.stderr
    names = [line.split("/iterations")[0] for line in listed.stdout.splitlines()]
    assert len(set(names)) == len(names) > 10
    if benchmark.name == "bench_chunk_fwd":
        expected = {f"chunk_fwd/bf16_k128/{s}/{r}" for s in shapes.TEN + shapes.LARGE for r in shapes.REGIMES}
        assert {name for name in names if "/bf16_k128/" in name} == expected
    if benchmark.name == "bench_chunk_bwd":
        parts = ["fast", "long", "long/of_q_k_v_beta", "long/of_v"]
        assert set(names) == {f"chunk_bwd/bf16_k128/{s}/{part}" for s in shapes.CORE for part in parts}
    unknown = run(benchmark, "--benchmark_filtr=x")
    assert unknown.returncode == 1 and "--benchmark_filtr=x" in unknown.stderr
    if not torch.cuda.is_available():
        failed = run(benchmark)
        assert failed.returncode == 1 and failed.stderr.startswith(f"{benchmark.name}: cudaGetDeviceProperties")
