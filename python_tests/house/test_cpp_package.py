"""The CMake package of the core: what is installed, and the example program that a C++ user starts from."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import kda_cuda

from ..support.accuracy import CAP, measure

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cmake-emulator"
TOKENS, HEADS, K, V = 100, 2, 40, 24  # two chunks, no full tile


def run(*command, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, **options)


def checked(*command) -> str:
    done = run(*command, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> Path:
    if not (BUILD / "CMakeCache.txt").exists():
        pytest.fail(f"{BUILD} does not exist: build it with `make emulator`")
    prefix = tmp_path_factory.mktemp("prefix")
    checked("cmake", "--install", BUILD, "--prefix", prefix, "--component", "core")
    return prefix


@pytest.fixture(scope="module")
def example(prefix, tmp_path_factory) -> Path:
    """csrc/example, built on the installed package alone."""
    build = tmp_path_factory.mktemp("example")
    checked(
        "cmake",
        "-S",
        ROOT / "csrc/example",
        "-B",
        build,
        f"-DCMAKE_PREFIX_PATH={prefix}",
        "-DKDA_PART=emulated",
        "-DCMAKE_CXX_FLAGS=-Wall -Werror",
    )
    checked("cmake", "--build", build)
    return build / "chunk_forward"


def test_the_example_computes_what_the_reference_does(example):
    torch.manual_seed(0)
    q, k, g = (torch.randn(TOKENS, HEADS, K) for _ in range(3))
    v, beta = torch.randn(TOKENS, HEADS, V), torch.rand(TOKENS, HEADS)
    k, g = torch.nn.functional.normalize(k, dim=-1), -g.exp()
    inputs = b"".join(x.numpy().tobytes() for x in (q, k, v, g, beta))
    done = run(example, TOKENS, HEADS, K, V, input=inputs)
    assert done.returncode == 0 and done.stderr.startswith(b"fp32_k64, "), done.stderr
    o, state = np.split(np.frombuffer(done.stdout, np.float32), [TOKENS * HEADS * V])
    truth = [x.double().unsqueeze(0) for x in (q, k, v, g, beta)]
    expected_o, expected_state = kda_cuda.chunk_kda(*truth, output_final_state=True)
    for got, expected in ((o, expected_o), (state, expected_state)):
        error = measure(torch.tensor(got).view(expected.shape), expected)
        assert error.rms <= CAP[torch.float32], str(error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected TOKENS HEADS K V"),
        ((8, 1, 300, 8), "got 300, expected a whole number from 1 to 256"),
        ((8, "x", 8, 8), "got x, expected a whole number from 1 to 65535"),
        ((8, 1, 8, 8), "standard input is too short"),
    ],
    ids=str,
)
def test_the_example_says_what_is_wrong(arguments, message, example):
    done = run(example, *arguments, input=b"1234")
    assert (done.returncode, done.stderr.decode()) == (1, f"chunk_forward: {message}\n") and not done.stdout


def test_headers_of_the_core_and_no_others_are_installed(prefix):
    installed = {p.relative_to(prefix / "include/kda_cuda").as_posix() for p in (prefix / "include").rglob("*.*")}
    core = [p for folder in ("kda", "platform", "tile", "emulator") for p in (ROOT / "csrc" / folder).rglob("*.h")]
    assert installed == {p.relative_to(ROOT / "csrc").as_posix() for p in core}
    assert (prefix / "share/licenses/kda_cuda/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


PROGRAM = "cmake_minimum_required(VERSION 3.24)\nproject(user LANGUAGES NONE)\nfind_package(kda_cuda {} REQUIRED {})\n"


@pytest.mark.parametrize(
    ("version", "components", "message"),
    [
        ("9.9", "", 'compatible with requested version "9.9"'),
        ("", "COMPONENTS kernels", "There is no component kernels in"),
    ],
    ids=["version", "component"],
)
def test_a_package_that_does_not_fit_is_refused(version, components, message, prefix, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(PROGRAM.format(version, components))
    done = run("cmake", tmp_path, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={prefix}", text=True)
    assert done.returncode != 0 and message in " ".join(done.stderr.split()), done.stderr


def engine(text: str, build: Path, prefix: Path) -> subprocess.CompletedProcess:
    """Builds and runs the program of docs/kernels.md as the target that the lines of docs/install.md link."""
    (lines,) = re.findall(r"^```cmake\n(.*?)^```", (ROOT / "docs/install.md").read_text(), re.M | re.S)
    head = "cmake_minimum_required(VERSION 3.24)\nproject(user LANGUAGES CXX)\nadd_executable(engine main.cpp)\n"
    (build / "main.cpp").write_text(text)
    (build / "CMakeLists.txt").write_text(head + lines.replace("kernels", "emulated"))
    checked("cmake", build, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}", "-DCMAKE_CXX_FLAGS=-Wall -Werror")
    checked("cmake", "--build", build)
    return run(build / "engine", text=True)


def test_the_kernel_of_the_documents_runs_and_its_mistake_is_found(prefix, tmp_path):
    (program,) = re.findall(r"^```cpp\n(.*?)^```", (ROOT / "docs/kernels.md").read_text(), re.M | re.S)
    right = engine(program, tmp_path, prefix)
    assert right.returncode == 0, right.stderr
    wait = "  cp_async_wait<0>();\n"
    wrong = engine(program.replace(wait, ""), tmp_path, prefix)
    assert wait in program and wrong.returncode != 0 and "were never waited for, issued at" in wrong.stderr
