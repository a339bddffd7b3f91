"""The tables of docs/performance.md, drawn from what bench/results holds: python -m bench.python.performance_tables"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean

RESULTS = Path(__file__).parents[1] / "results"
NAMES = {
    "kda_cuda": "this package",
    "fla": "flash-linear-attention",
    "cudnn": "cudnn-frontend",
    "flash_kda": "FlashKDA",
}
REGIMES = {"long": "long memory", "fast": "fast"}


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Names on the left, numbers on the right."""
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean(rows: list[dict], key: str) -> str:
    """Of the ten shapes that every file has."""
    return f"{geometric_mean(row[key] for row in rows[:10]):.0f} µs" if all(key in row for row in rows[:10]) else "-"


def forward() -> str:
    """Geometric means over the first ten shapes, from both files of the H100."""
    rows = []
    files = {
        "kda_cuda": "chunk_fwd_h100",
        "fla": "chunk_fwd_fla_h100",
        "cudnn": "chunk_fwd_h100",
        "flash_kda": "chunk_fwd_h100",
    }
    for provider, file in files.items():
        regimes = [[row for row in read(file)["rows"] if row["regime"] == regime] for regime in REGIMES]
        rows.append([NAMES[provider], *(mean(of_regime, f"{provider}_gpu_us") for of_regime in regimes)])
    return table(["forward", *(f"{name} gates" for name in REGIMES.values())], rows)


def training_step() -> str:
    rows = []
    for row in (row for row in read("chunk_bwd_h200")["rows"] if row["form"] == "fused"):
        both = [row["providers"][name] for name in ("kda_cuda", "fla")]
        times = [f"{x['step']['gpu_us']['median'] / 1e3:.2f} ms" for x in both]
        rows.append([row["shape"], REGIMES[row["regime"]], *times, *(f"{x['peak_mib']:.0f} MiB" for x in both)])
    return table(["shape", "gates", NAMES["kda_cuda"], NAMES["fla"], "memory", "memory of the other"], rows)


def core_backward() -> str:
    rows = []
    for row in (row for row in read("chunk_bwd_h200")["rows"] if row["form"] == "core"):
        times = [row["providers"][name]["core"]["gpu_us"]["median"] for name in ("kda_cuda", "cudnn")]
        rows.append([row["shape"], REGIMES[row["regime"]], *(f"{us:.0f} µs" for us in times)])
    return table(["shape", "gates", NAMES["kda_cuda"], NAMES["cudnn"]], rows)


def decoding() -> str:
    """A step of 32 heads for some sizes of the batch."""
    found = {row["name"].split("/iterations")[0]: row for row in read("decode_h100")["benchmarks"]}
    rows = []
    for batch in (1, 32, 256):
        steps = [found[f"decode/state:{state}/heads:32/tokens:1/batch:{batch}"] for state in ("fp32", "bf16")]
        rows.append([str(batch), *(f"{step[key]:.0f} µs" for step in steps for key in ("us", "copy_us"))])
    return table(["sequences", "fp32 states", "a copy of the bytes", "bf16 states", "a copy of the bytes"], rows)


TABLES = {"forward": forward, "training step": training_step, "core backward": core_backward, "decoding": decoding}

if __name__ == "__main__":
    for name, draw in TABLES.items():
        print(f"{name}\n\n{draw()}\n")
