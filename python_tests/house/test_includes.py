"""What C++ files may include: only what lies below them (docs/architecture.md)."""

from __future__ import annotations

import re
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
FLOORS = ("platform", "tile", "kda", "kda/chunk", "kda/operation", "torch")  # from below; platform has the emulator

ABOVE = {("decode_layer", "decode")}  # operations that are built on another one


def floor(path: str) -> int:
    parts = path.split("/")
    if parts[0] in ("platform", "emulator"):
        return 0
    if parts[0] != "kda":
        return FLOORS.index(parts[0])
    if len(parts) == 2:
        return FLOORS.index("kda")
    return FLOORS.index("kda/chunk" if parts[1] == "chunk" else "kda/operation")


def faults(includes: dict[str, list[str]]) -> list[str]:
    """Includes that lead upward, or from one operation to another."""
    found = []
    for path, others in includes.items():
        for other in others:
            operations = floor(path) == floor(other) == FLOORS.index("kda/operation")
            pair = path.split("/")[1], other.split("/")[1]
            sideways = operations and pair[0] != pair[1] and pair not in ABOVE
            if floor(other) > floor(path) or sideways:
                found.append(f"{path} includes {other}")
    return found


def includes() -> dict[str, list[str]]:
    found = {}
    for path in sorted(CSRC.rglob("*")):
        name = path.relative_to(CSRC).as_posix()
        if path.suffix in (".h", ".cpp", ".cu") and name.split("/")[0] in (
            "platform",
            "emulator",
            "tile",
            "kda",
            "torch",
        ):
            mine = re.findall(r'^#include "((?:platform|emulator|tile|kda|torch)/[^"]+)"', path.read_text(), re.M)
            found[name] = mine
    return found


def test_nothing_includes_upward():
    found = includes()
    assert "kda/chunk/inputs.h" in found["kda/chunk_fwd/params.h"]
    assert faults(found) == []


def test_a_fault_is_found():
    assert faults({"kda/chunk/scan.h": ["kda/chunk_fwd/params.h"]})
    assert faults({"kda/decode/kernel.h": ["kda/chunk_fwd/params.h"]})
    assert faults({"kda/decode/kernel.h": ["kda/decode_layer/params.h"]})
    assert faults({"tile/solve.h": ["kda/gate.h"]})
    assert faults({"kda/chunk_bwd/launch.h": ["kda/chunk_fwd/launch.h"]})
    assert not faults({"kda/decode_layer/kernel.h": ["kda/decode/kernel.h"]})
    assert not faults({"kda/chunk_bwd/launch.h": ["kda/chunk/launch_prepare.h"], "torch/plans.cpp": ["kda/gate.h"]})


def test_inline_ptx_is_in_the_platform_alone():
    sources = [p for folder in (CSRC, CSRC.parent / "bench") for p in sorted(folder.rglob("*.*"))]
    outside = [p for p in sources if p.suffix in (".h", ".cpp", ".cu") and "platform" not in p.parts]
    pattern = re.compile(r"\basm( volatile)?\s*\(|\b__shared__\b")
    named = [p.relative_to(CSRC.parent).as_posix() for p in outside if pattern.search(p.read_text())]
    assert [name for name in named if not name.startswith("csrc/emulator/")] == []
    assert any(path.name == "handover.cu" for path in outside)
    assert any(pattern.search(p.read_text()) for p in (CSRC / "platform").glob("*.h"))
