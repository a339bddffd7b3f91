"""The cost model of the chunk forward: what each shape should take, beside what it took, the floor and the peers.

python -m bench.python.cost_model [--measured FILE] [--markdown FILE]

writes ``bench/results/chunk_fwd_cost.md`` from ``bench/results/chunk_fwd_h100.json`` and the constants below, which are
all that the model knows. A call is, in each of its parts, two launches: prepare (every chunk of every head at once, in
waves), then scan (chunk after chunk of a sequence; its blocks are a sequence, a head and 64 columns of V).
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from .shapes import ALL, TEN, Shape, traffic_bytes

RESULTS = Path(__file__).parent.parent / "results"
HEAD_DIM, ELEMENT_BYTES, VALUE_TILE = 128, 2, 64
WORKSPACE_SHARE, SMALL_WORKSPACE = 1.5, 16 << 20  # csrc/kda/chunk_fwd/launch.h, csrc/platform/device.h


@dataclass(frozen=True)
class Gpu:
    multiprocessors: int
    copy_tb_s: float  # measured, read plus written


H100, H200 = Gpu(132, 3.0), Gpu(132, 4.3)


@dataclass(frozen=True)
class Constants:
    """Of one variant; measured on an H100 at the commit named."""

    commit: str
    chunk: int
    record_bytes: int  # workspace of a chunk of a head, V included: a test asks the library
    blocks_per_sm: int  # of prepare
    prepare_us: float  # a wave: one chunk-head in every block that an SM holds
    scan_us: float  # a chunk of the chain
    part_us: float  # the two launches of a part, and their ramps

    def parts(self, shape: Shape) -> int:
        inputs = 2 * shape.tokens * shape.heads * HEAD_DIM * ELEMENT_BYTES
        most = max(WORKSPACE_SHARE * inputs, SMALL_WORKSPACE) // (self.record_bytes * shape.heads)
        return math.ceil(self.slots(shape) / most)

    def slots(self, shape: Shape) -> int:
        sequences = len(shape.lengths)
        return shape.tokens // self.chunk + sequences if sequences > 1 else math.ceil(shape.tokens / self.chunk)

    def prepare(self, shape: Shape, gpu: Gpu) -> float:
        """Instructions, or the traffic of inputs and records, whichever is slower."""
        at_once = gpu.multiprocessors * self.blocks_per_sm
        waves = math.ceil(self.slots(shape) * shape.heads / at_once)
        moved = at_once * (self.chunk * (4 * HEAD_DIM + 1) * ELEMENT_BYTES + self.record_bytes)
        return waves * max(self.prepare_us, moved / gpu.copy_tb_s * 1e-6)

    def scan(self, shape: Shape, gpu: Gpu) -> float:
        """Blocks start as SMs fall free, in the order of the grid: sequences first, then heads, then columns of V. Or
        the traffic of records and outputs, if that is slower."""
        free = [0.0] * gpu.multiprocessors
        chains = [math.ceil(length / self.chunk) for length in shape.lengths]
        for _ in range(shape.heads * HEAD_DIM // VALUE_TILE):
            for chunks in chains:
                first = free.index(min(free))
                free[first] += chunks * self.scan_us
        moved = self.slots(shape) * shape.heads * (self.record_bytes + self.chunk * HEAD_DIM * ELEMENT_BYTES)
        return max(*free, moved / gpu.copy_tb_s * 1e-6)

    def call(self, shape: Shape, gpu: Gpu) -> float:
        return self.parts(shape) * self.part_us + self.prepare(shape, gpu) + self.scan(shape, gpu)


VARIANTS = {"bf16_k128_sm90": Constants("fca4c26", 64, 74752, 2, 15.5, 1.1, 8.0)}

# peers.md: attributed, each on the GPU its authors had, fast regime.
PUBLISHED = {
    "T8192_H64_N1": "FlashKDA 1620 (H20), cuLA 1760 (H200), fla 1820 (H200)",
    "T8192_H96_N1": "FlashKDA 2620 (H20), fla 4840 (H20)",
}
PUBLISHED_TEN = "cudnn-frontend 53.9 (kernel), FlashKDA 438 (H100)"


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def floor_us(shape: Shape, gpu: Gpu) -> float:
    return traffic_bytes(shape, HEAD_DIM, ELEMENT_BYTES) / gpu.copy_tb_s * 1e-6


COLUMNS = {
    "shape": "---", "parts": "---:", "prepare": "---:", "scan": "---:", "H100": "---:", "measured, fast": "---:",
    "long": "---:", "measured / predicted": "---:", "H200": "---:", "floor, H200": "---:", "x floor": "---:",
    "sequences split": "---", "published": "---",
}  # fmt: skip


def line(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def predictions(model: Constants, shape: Shape, rows: dict) -> dict[str, float]:
    return {
        "H100": model.call(shape, H100),
        "fast": rows[str(shape), "fast"]["kda_cuda_gpu_us"],
        "long": rows[str(shape), "long"]["kda_cuda_gpu_us"],
        "H200": model.call(shape, H200),
        "floor": floor_us(shape, H200),
    }


def comparison(x: dict[str, float]) -> list[str]:
    return [
        *(f"{x[name]:.0f}" for name in ("H100", "fast", "long")),
        f"{x['long'] / x['H100']:.2f}",
        f"{x['H200']:.0f}",
        f"{x['floor']:.1f}",
        f"{x['H200'] / x['floor']:.1f}",
    ]


def split_of(row: dict) -> str:
    """What `explain` said when the row was measured: "V into 2 of 64 columns; no sequence, ..."."""
    return row["kda_cuda_split"].partition("; ")[2].split(",")[0] if "kda_cuda_split" in row else "not recorded"


def table(variant: str, measured: dict) -> str:
    model = VARIANTS[variant]
    rows = {(row["shape"], row["regime"]): row for row in measured["rows"]}
    lines = [
        f"Written by `python -m bench.python.cost_model`; do not edit. Variant `{variant}`, K = V = 128, µs of GPU",
        f"time. Predicted with the constants of {model.commit}, one prediction for both regimes; measured at",
        f"{measured['commit']} on an {measured['gpu']}. Published: fast regime, by the authors named in peers.md, on",
        "the GPU named here.",
        "",
        line(COLUMNS),
        line(COLUMNS.values()),
    ]
    every = {shape: predictions(model, shape, rows) for shape in ALL}
    for shape, x in every.items():
        parts = [f"{model.parts(shape)}", f"{model.prepare(shape, H100):.0f}", f"{model.scan(shape, H100):.0f}"]
        last = [split_of(rows[str(shape), "long"]), PUBLISHED.get(str(shape), "")]
        lines.append(line([str(shape), *parts, *comparison(x), *last]))
    mean = {name: geomean([every[shape][name] for shape in TEN]) for name in every[TEN[0]]}
    lines.append(line(["geomean of the ten", "", "", "", *comparison(mean), "", PUBLISHED_TEN]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=RESULTS / "chunk_fwd_h100.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "chunk_fwd_cost.md")
    args = parser.parse_args()
    args.markdown.write_text(table("bf16_k128_sm90", json.loads(args.measured.read_text())))


if __name__ == "__main__":
    main()
