"""Checks a wheel: its tag, its size, what lies in it, and for which GPUs it has machine code.

check_wheel.py WHEEL [--torch VERSION ...] [--python PROGRAM ...]

With --torch the wheel is also installed beside each of these versions, for each Python, into an environment of its own
that is thrown away. There the CPU ops and a layer run, forward and backward. That takes minutes and gigabytes.
"""

from __future__ import annotations

import argparse
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90a", "100", "120")
MOST_BYTES = 40_000_000
OPS = "kda_cuda/_ops.so"
LICENCES = {"LICENSE", "THIRD_PARTY_NOTICES.txt"}  # the second is of what _ops.so and _C are linked with
TAG = re.compile(r"kda_cuda-[^-]+-py3-none-manylinux_2_\d+_x86_64(\.manylinux\w+)*\.whl")


FATBIN = struct.pack("<I", 0xBA55ED50)  # begins every container of device code; then entries, each with a header
ELF_KIND, ARCHITECTURE_SPECIFIC = 2, 0x100000


def machine_code(library: bytes) -> Counter[str]:
    """How many pieces of machine code a library has for each architecture, such as 45 for "80" and 53 for "90a"."""
    found: Counter[str] = Counter()
    at = library.find(FATBIN)
    while at >= 0:
        header, size = struct.unpack_from("<HQ", library, at + 6)
        entry, end = at + header, at + header + size
        while entry < end:
            kind, _, header, payload = struct.unpack_from("<HHIQ", library, entry)
            (arch,), (flags,) = (
                struct.unpack_from("<I", library, entry + 28),
                struct.unpack_from("<Q", library, entry + 40),
            )
            if kind == ELF_KIND:
                found[f"{arch}a" if flags & ARCHITECTURE_SPECIFIC else str(arch)] += 1
            entry += header + payload
        at = library.find(FATBIN, end)
    return found


def expected_code(architectures: tuple[str, ...]) -> dict[str, int]:
    """A piece for each variant; those for warpgroups are for 90a alone."""
    variants = [path.name for path in (ROOT / "csrc/kda").glob("*/variants/*.cu")]
    everywhere = sum(not name.endswith("_sm90.cu") for name in variants)
    return {arch: len(variants) if arch == "90a" else everywhere for arch in architectures}


def faults(wheel: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> Iterator[str]:
    """What is wrong with a wheel, without installing it."""
    if not TAG.fullmatch(wheel.name):
        yield f"the name is {wheel.name}, expected it to match {TAG.pattern}"
    if (size := wheel.stat().st_size) > MOST_BYTES:
        yield f"it has {size} bytes, expected at most {MOST_BYTES}"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        code = machine_code(archive.read(OPS)) if OPS in names else Counter()
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "kda_cuda").rglob("*.py")} | {OPS}
    if missing := wanted - names:
        yield f"it lacks {sorted(missing)}"
    allowed = re.compile(r"kda_cuda/_C\.[\w-]+\.so|kda_cuda-[^/]+\.dist-info/.*")
    if added := {name for name in names - wanted if not allowed.fullmatch(name)}:
        yield f"it has {sorted(added)}, which nothing needs"
    licences = {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name}
    if missing := LICENCES - licences:
        yield f"it lacks the licences {sorted(missing)}"
    if code != expected_code(architectures):
        yield f"it has machine code {dict(code)}, expected {expected_code(architectures)}"


PROGRAM = """
import torch, kda_cuda
from kda_cuda import variants
from kda_cuda.layers import KimiDeltaAttention

kernels = variants.kernels("kda_cuda")
assert {"chunk_fwd", "chunk_bwd", "decode"} <= set(kernels), kernels
torch.manual_seed(0)
q, k, v, g = (torch.randn(1, 70, 2, 16, requires_grad=True) for _ in range(4))
beta, options = torch.rand(1, 70, 2), dict(use_qk_l2norm_in_kernel=True)
o, state = kda_cuda.chunk_kda(q, k, v, -g.exp(), beta, output_final_state=True, **options)
o.square().sum().backward()
assert all(x.grad.isfinite().all() and x.grad.any() for x in (q, k, v, g))
with torch.no_grad():
    steps, end = kda_cuda.fused_recurrent_kda(q, k, v, -g.exp(), beta, output_final_state=True, **options)
    torch.testing.assert_close(steps, o, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(end, state, rtol=1e-4, atol=1e-5)
    pool = torch.zeros(3, 2, 16, 16)
    filled = kda_cuda.prefill(q, k, v, -g.exp(), beta, state_pool=pool, slot_of=torch.tensor([2]), **options)
    torch.testing.assert_close(filled, o, rtol=1e-4, atol=1e-5)
    assert pool[2].any() and not pool[:2].any()
layer = KimiDeltaAttention(hidden_size=32, num_heads=2, head_dim=16)
layer(torch.randn(2, 20, 32)).sum().backward()
extension = kda_cuda.build_info()["c_extension"]
print(f"torch {torch.__version__}, {len(kernels)} kernels, {'with' if extension else 'without'} _C: right")
"""


def check_installed(wheel: Path, torch: str, python: str) -> str:
    """Installs into a new environment and runs PROGRAM there; returns what it says."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        own = Path(folder) / "bin" / "python"
        subprocess.run([own, "-m", "pip", "install", "-q", f"torch=={torch}", wheel.resolve()], check=True)
        done = subprocess.run(
            [own, "-W", "error::UserWarning", "-c", PROGRAM], cwd=folder, text=True, capture_output=True
        )
    if done.returncode:
        raise SystemExit(f"{wheel.name} fails beside torch {torch} on {python}:\n{done.stderr}")
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="*", default=[], metavar="VERSION")
    parser.add_argument("--python", nargs="*", default=[sys.executable], metavar="PROGRAM")
    parser.add_argument("--architectures", nargs="*", default=ARCHITECTURES, metavar="CAPABILITY")
    options = parser.parse_args()
    if found := list(faults(options.wheel, tuple(options.architectures))):
        raise SystemExit("\n".join(f"{options.wheel.name}: {fault}" for fault in found))
    print(f"{options.wheel.name}: {options.wheel.stat().st_size / 1e6:.1f} MB, {', '.join(options.architectures)}")
    for python in options.python:
        for torch in options.torch:
            print(f"{python}: {check_installed(options.wheel, torch, python)}", flush=True)


if __name__ == "__main__":
    main()
