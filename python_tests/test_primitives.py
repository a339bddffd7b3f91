"""The primitives of csrc/platform: the emulator against a GPU, bit by bit, and against itself under other schedules.

The programs are those of csrc/tests/programs; their plain definitions are checked by ``make cpp-tests``, which also
builds both executables into ``build/primitives``. On a machine without them: KDA_CUDA_PRIMITIVES_EXE and
KDA_EMULATED_PRIMITIVES_EXE name them; the one for the GPU is built here if there is an nvcc.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
BUILT = ROOT / "build" / "primitives"
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


def outputs(executable: Path, directory: Path, seed: int = 0) -> dict[str, tuple[bytes, float, float]]:
    """What each program wrote, and the tolerance and floor of its comparison."""
    directory.mkdir(parents=True, exist_ok=True)
    done = subprocess.run([executable, directory, str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in (directory / "programs.txt").read_text().splitlines():
        name, tolerance, floor = line.split()
        found[name] = ((directory / f"{name}.bin").read_bytes(), float(tolerance), float(floor))
    return found


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> dict[str, tuple[bytes, float, float]]:
    return outputs(emulated_executable(), tmp_path_factory.mktemp("in_order"))


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
    other = outputs(emulated_executable(), tmp_path, seed)
    assert other.keys() == emulated.keys()
    different = [name for name in emulated if emulated[name][0] != other[name][0]]
    assert not different


@pytest.mark.gpu
def test_a_gpu_gives_the_bits_of_the_emulator(emulated, tmp_path):
    """The scalar functions of the special function units have a tolerance of a few units in the last place."""
    cuda = outputs(cuda_executable(tmp_path), tmp_path / "cuda")
    assert cuda.keys() == emulated.keys()
    different = []
    for name, (expected, tolerance, floor) in emulated.items():
        got = cuda[name][0]
        if got == expected:
            continue
        if tolerance:
            x, y = np.frombuffer(got, np.float32), np.frombuffer(expected, np.float32)
            finite = np.isfinite(y)
            same_elsewhere = np.array_equal(x[~finite], y[~finite], equal_nan=True)
            error = np.abs(x[finite] - y[finite]) / np.maximum(np.abs(y[finite]), floor)
            if same_elsewhere and error.max() <= tolerance:
                continue
            different.append(f"{name} (relative error {error.max():.3g})")
        else:
            x, y = np.frombuffer(got, np.uint8), np.frombuffer(expected, np.uint8)
            different.append(f"{name} ({np.count_nonzero(x != y) if x.size == y.size else 'size'} bytes)")
    assert not different
