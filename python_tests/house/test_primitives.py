"""The primitives of csrc/platform: the emulator against a GPU, bit by bit, and against itself under other schedules.

The programs are those of csrc/tests/programs; their plain definitions are checked by ``make cpp-tests``, which also
builds both executables into ``build/primitives``. On a machine without them: KDA_CUDA_PRIMITIVES_EXE and
KDA_EMULATED_PRIMITIVES_EXE name them; the one for the GPU is built here if there is an nvcc.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BUILT = ROOT / "build" / "primitives"
TIMEOUT_SECONDS = 60
DEVICE_FUNCTION = re.compile(r"^KDA_(?:HOST_)?DEVICE (?:constexpr )?[\w:<>]+ (\w+|operator\*)\(", re.M)


def emulated_executable() -> Path:
    path = Path(os.environ.get("KDA_EMULATED_PRIMITIVES_EXE", BUILT / "primitives_emulated"))
    if not path.exists():
        pytest.fail(f"{path} does not exist: build it with `make cpp-tests`, or set KDA_EMULATED_PRIMITIVES_EXE")
    return path


def cuda_executable(directory: Path) -> Path:
    given = os.environ.get("KDA_CUDA_PRIMITIVES_EXE")
    path = Path(given) if given else BUILT / "primitives_cuda"
    if path.exists():
        return path
    nvcc = shutil.which("nvcc")
    if given or not nvcc:
        pytest.fail(f"{path} does not exist, and there is no nvcc to build it")
    source, built = ROOT / "csrc" / "tests" / "primitives.cu", directory / "primitives_cuda"
    options = ["-std=c++17", "-O2", "--expt-relaxed-constexpr", "-gencode", "arch=compute_90a,code=sm_90a"]
    subprocess.run([nvcc, *options, f"-I{ROOT / 'csrc'}", source, "-o", built], check=True)
    return built


@dataclasses.dataclass(frozen=True)
class Program:
    """How its outputs on the emulator and on a GPU are compared. tolerance: relative; 0: bit by bit."""

    name: str
    tolerance: float
    floor: float

    def difference(self, got: bytes, expected: bytes) -> str | None:
        if got == expected:
            return None
        if len(got) != len(expected):
            return f"{len(got)} bytes, expected {len(expected)}"
        if not self.tolerance:
            x, y = np.frombuffer(got, np.uint8), np.frombuffer(expected, np.uint8)
            return f"{np.count_nonzero(x != y)} of {x.size} bytes, the first at {np.flatnonzero(x != y)[0]}"
        x, y = np.frombuffer(got, np.float32), np.frombuffer(expected, np.float32)
        finite = np.isfinite(y)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
            return "other non-finite values"
        error = np.abs(x[finite] - y[finite]) / np.maximum(np.abs(y[finite]), self.floor)
        return None if error.max() <= self.tolerance else f"relative error {error.max():.3g}"


def programs(executable: Path) -> list[Program]:
    listed = subprocess.run([executable, "--list"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [Program(name, float(tolerance), float(floor)) for name, tolerance, floor in rows]


def outputs(executable: Path, directory: Path, seed: int = 0) -> dict[str, bytes]:
    """What each program wrote, all in one process."""
    directory.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([executable, directory, str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path.stem: path.read_bytes() for path in directory.glob("*.bin")}


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> dict[str, bytes]:
    return outputs(emulated_executable(), tmp_path_factory.mktemp("in_order"))


def test_the_list_names_every_program(emulated):
    listed = programs(emulated_executable())
    assert len(listed) > 80
    assert {program.name for program in listed} == emulated.keys()


def test_a_program_runs_alone(emulated, tmp_path):
    done = subprocess.run([emulated_executable(), tmp_path, "0", "mbarriers", "sums"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.stem: path.read_bytes() for path in tmp_path.iterdir()} == {
        name: emulated[name] for name in ("mbarriers", "sums")
    }
    done = subprocess.run([emulated_executable(), tmp_path, "0", "no_such"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no program no_such" in done.stderr


def test_a_difference_is_seen():
    exact, near = Program("exact", 0, 0), Program("near", 2**-21, 1.0)
    one, next_to_one = np.float32([1, np.inf]), np.float32([1 + 2**-22, np.inf])
    assert exact.difference(one.tobytes(), one.tobytes()) is None
    assert exact.difference(next_to_one.tobytes(), one.tobytes()) == "1 of 8 bytes, the first at 0"
    assert exact.difference(one.tobytes()[:4], one.tobytes()) == "4 bytes, expected 8"
    assert near.difference(next_to_one.tobytes(), one.tobytes()) is None
    assert near.difference(np.float32([1.5, np.inf]).tobytes(), one.tobytes()) == "relative error 0.5"
    assert near.difference(np.float32([1, np.nan]).tobytes(), one.tobytes()) == "other non-finite values"


def test_every_primitive_has_a_program():
    programs = "".join(path.read_text() for path in (ROOT / "csrc" / "tests" / "programs").glob("*.h"))
    primitives = {
        name for path in (ROOT / "csrc" / "platform").glob("*.h") for name in DEVICE_FUNCTION.findall(path.read_text())
    }
    assert len(primitives) > 50
    missing = [name for name in sorted(primitives) if name != "operator*" and not re.search(rf"\b{name}\b", programs)]
    assert not missing, f"no program in csrc/tests/programs uses {missing}"


@pytest.mark.parametrize("seed", range(1, 8))
def test_every_schedule_gives_the_same_bits(emulated, tmp_path, seed):
    assert outputs(emulated_executable(), tmp_path, seed) == emulated


@pytest.mark.gpu
def test_a_gpu_gives_the_bits_of_the_emulator(emulated, tmp_path):
    """The scalar functions of the special function units have a tolerance of a few units in the last place. A process
    for each program: what fails names itself, and the others are still compared."""
    executable = cuda_executable(tmp_path)

    def fault(program: Program) -> str | None:
        command = [executable, tmp_path, "0", program.name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{program.name}: not done after {TIMEOUT_SECONDS} s"
        if done.returncode:
            return done.stderr.strip() or f"{program.name}: exit code {done.returncode}"
        difference = program.difference((tmp_path / f"{program.name}.bin").read_bytes(), emulated[program.name])
        return difference and f"{program.name}: {difference}"

    listed = programs(executable)
    assert {program.name for program in listed} == emulated.keys()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        faults = [text for text in pool.map(fault, listed) if text]
    assert not faults, f"{len(faults)} of {len(listed)} programs:\n" + "\n".join(faults)
