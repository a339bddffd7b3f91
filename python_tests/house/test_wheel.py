"""What csrc/tools/check_wheel.py says of wheels, and of the machine code in the ops library that was built here."""

from __future__ import annotations

import importlib.util
import struct
import zipfile
import zlib
from pathlib import Path

import pytest

import kda_cuda
from kda_cuda.build_info import ops_library

ROOT = Path(__file__).parents[2]
GOOD_NAME = f"kda_cuda-{kda_cuda.__version__}-py3-none-manylinux_2_34_x86_64.whl"
LICENCES = f"kda_cuda-{kda_cuda.__version__}.dist-info/licenses"
needs_ops = pytest.mark.skipif(ops_library() is None, reason="reference-only install: there is no _ops.so")


def load_tool():
    spec = importlib.util.spec_from_file_location("check_wheel", ROOT / "csrc/tools/check_wheel.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def fatbin(*architectures: str) -> bytes:
    """Device code as far as the tool looks: an empty piece of machine code for each architecture, in one container."""
    entries = b""
    for arch in architectures:
        flags = tool.ARCHITECTURE_SPECIFIC if arch.endswith("a") else 0
        header = struct.pack("<HHIQIIHHIIIQ", tool.ELF_KIND, 0, 64, 8, 0, 0, 0, 0, int(arch.rstrip("a")), 0, 0, flags)
        entries += header.ljust(64, b"\0") + bytes(8)
    return tool.FATBIN + struct.pack("<HHQ", 1, 16, len(entries)) + entries


def library() -> bytes:
    """Code for every variant and architecture, in more than one container, as a linker leaves it."""
    pieces = [arch for arch, count in tool.expected_code(tool.ARCHITECTURES).items() for _ in range(count)]
    return b"ELF, and text" + fatbin(*pieces[:30]) + b"padding" + fatbin(*pieces[30:])


def wheel_of(folder: Path, name: str = GOOD_NAME, **changed: bytes | None) -> Path:
    """A wheel that is right but for the files that are changed, or left out (None)."""
    files = {str(path.relative_to(ROOT)): b"" for path in (ROOT / "kda_cuda").rglob("*.py")}
    information = f"kda_cuda-{kda_cuda.__version__}.dist-info"
    files |= {tool.OPS: library(), "kda_cuda/_C.cpython-311-x86_64-linux-gnu.so": b"", f"{information}/METADATA": b""}
    files |= {f"{information}/licenses/{licence}": b"MIT" for licence in tool.LICENCES}
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, content in {**files, **changed}.items():
            if content is not None:
                archive.writestr(path, content)
    return folder / name


def test_a_right_wheel_has_no_fault(tmp_path):
    assert list(tool.faults(wheel_of(tmp_path))) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"name": "kda_cuda-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl"}, "the name is kda_cuda-0.1.0-cp311-cp311"),
        ({"name": "kda_cuda-0.1.0-py3-none-linux_x86_64.whl"}, "the name is kda_cuda-0.1.0-py3-none-linux_x86_64.whl"),
        ({"kda_cuda/layers.py": None}, "it lacks ['kda_cuda/layers.py']"),
        ({"kda_cuda/libkda_cuda_emulated.so": b""}, "it has ['kda_cuda/libkda_cuda_emulated.so'], which nothing needs"),
        ({"kda_cuda/_reference_only.txt": b""}, "it has ['kda_cuda/_reference_only.txt'], which nothing needs"),
        ({f"{LICENCES}/LICENSE": None}, "it lacks the licences ['LICENSE']"),
        ({f"{LICENCES}/THIRD_PARTY_NOTICES.txt": None}, "it lacks the licences ['THIRD_PARTY_NOTICES.txt']"),
        ({tool.OPS: fatbin("80", "90")}, "it has machine code {'80': 1, '90': 1}, expected {'80': "),
        ({tool.OPS: None}, "it lacks ['kda_cuda/_ops.so']"),
        ({"kda_cuda-1.dist-info/x": bytes(tool.MOST_BYTES)}, "bytes, expected at most 40000000"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_with_a_wheel_is_said(changed, message, tmp_path):
    assert any(message in fault for fault in tool.faults(wheel_of(tmp_path, **changed)))


@needs_ops
def test_the_ops_library_has_every_variant_for_every_architecture():
    architectures = tuple(kda_cuda.build_info()["architectures"])
    assert tool.machine_code(ops_library().read_bytes()) == tool.expected_code(architectures)


@needs_ops
def test_a_wheel_for_every_gpu_stays_small_enough():
    """As large as those architectures that were built here make it expect."""
    per_architecture = len(zlib.compress(ops_library().read_bytes(), 1)) / len(kda_cuda.build_info()["architectures"])
    assert per_architecture * len(tool.ARCHITECTURES) <= tool.MOST_BYTES
