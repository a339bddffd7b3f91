"""The cost model of the chunk forward: what each shape should take, beside what it took, the floor and the peers.

python -m bench.python.cost_model [--measured FILE] [--variants FILE] [--markdown FILE]

writes ``bench/results/chunk_fwd_cost.md`` from ``chunk_fwd_h100.json``, ``chunk_fwd_cpp_h100.json`` and the constants,
which are all that the model knows. A call is, in each of its parts, two launches: prepare (every chunk of every head
at once, in waves), then scan (chunk after chunk of a sequence; its blocks are a sequence, a head and 64 columns of V).
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

from .shapes import ALL, TEN, Shape, traffic_bytes

RESULTS = Path(__file__).parent.parent / "results"
VALUE_TILE = 64
WORKSPACE_SHARE, SMALL_WORKSPACE = 1.5, 16 << 20  # csrc/kda/chunk_fwd/launch.h, csrc/platform/device.h


@dataclass(frozen=True)
class Gpu:
    multiprocessors: int
    copy_tb_s: float  # measured, read plus written


H100, H200 = Gpu(132, 3.0), Gpu(132, 4.3)


@dataclass(frozen=True)
class Constants:
    """Of one variant; measured on an H100 at the commit named, or predicted."""

    commit: str
    chunk: int
    record_bytes: int  # workspace of a chunk of a head, V included: a test asks the library
    blocks_per_sm: int  # of prepare
    prepare_us: float  # a wave: one chunk-head in every block that an SM holds
    scan_us: float  # a chunk of the chain
    part_us: float  # the two launches of a part, and their ramps
    head_dim: int = 128  # K and V
    element_bytes: int = 2

    def parts(self, shape: Shape) -> int:
        inputs = 2 * shape.tokens * shape.heads * self.head_dim * self.element_bytes
        most = max(WORKSPACE_SHARE * inputs, SMALL_WORKSPACE) // (self.record_bytes * shape.heads)
        return math.ceil(self.slots(shape) / most)

    def slots(self, shape: Shape) -> int:
        sequences = len(shape.lengths)
        return shape.tokens // self.chunk + sequences if sequences > 1 else math.ceil(shape.tokens / self.chunk)

    def prepare(self, shape: Shape, gpu: Gpu) -> float:
        """Instructions, or the traffic of inputs and records, whichever is slower."""
        at_once = gpu.multiprocessors * self.blocks_per_sm
        waves = math.ceil(self.slots(shape) * shape.heads / at_once)
        moved = at_once * (self.chunk * (4 * self.head_dim + 1) * self.element_bytes + self.record_bytes)
        return waves * max(self.prepare_us, moved / gpu.copy_tb_s * 1e-6)

    def scan(self, shape: Shape, gpu: Gpu) -> float:
        """Blocks start as SMs fall free, in the order of the grid: sequences first, then heads, then columns of V. Or
        the traffic of records and outputs, if that is slower."""
        free = [0.0] * gpu.multiprocessors
        chains = [math.ceil(length / self.chunk) for length in shape.lengths]
        for _ in range(shape.heads * self.head_dim // VALUE_TILE):
            for chunks in chains:
                first = free.index(min(free))
                free[first] += chunks * self.scan_us
        moved = self.slots(shape) * shape.heads * (self.record_bytes + self.chunk * self.head_dim * self.element_bytes)
        return max(*free, moved / gpu.copy_tb_s * 1e-6)

    def call(self, shape: Shape, gpu: Gpu) -> float:
        return self.parts(shape) * self.part_us + self.prepare(shape, gpu) + self.scan(shape, gpu)


MAIN = "bf16_k128_sm90"
VARIANTS = {
    MAIN: Constants("fca4c26", 64, 74752, 2, 15.5, 1.1, 8.0),
    # from two shapes each (chunk_fwd_cpp_h100.json); in fp16 the gates of both regimes are too steep for block anchors
    "fp16_k128_sm90": Constants("c49503c", 64, 74752, 2, 39.0, 1.1, 8.0),
    # predicted (NOTES.md, "fp32"); the measurement in square brackets is of c49503c, before
    "fp32_k128": Constants("not measured", 16, 34816, 4, 25.0, 1.7, 8.0, element_bytes=4),
    "bf16_k64_sm90": Constants("c49503c", 64, 41984, 3, 16.0, 0.85, 8.0, head_dim=64),
    "bf16_k256": Constants("c49503c", 16, 34816, 4, 18.5, 1.13, 8.0, head_dim=256),
}

# peers.md: attributed, each on the GPU its authors had, fast regime.
PUBLISHED = {
    "T8192_H64_N1": "FlashKDA 1620 (H20), cuLA 1760 (H200), fla 1820 (H200)",
    "T8192_H96_N1": "FlashKDA 2620 (H20), fla 4840 (H20)",
}
PUBLISHED_TEN = "cudnn-frontend 53.9 (kernel), FlashKDA 438 (H100)"


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def floor_us(shape: Shape, gpu: Gpu, model: Constants = VARIANTS[MAIN]) -> float:
    return traffic_bytes(shape, model.head_dim, model.element_bytes) / gpu.copy_tb_s * 1e-6


COLUMNS = {
    "shape": "---",
    "parts": "---:",
    "prepare": "---:",
    "scan": "---:",
    "H100": "---:",
    "measured, fast": "---:",
    "long": "---:",
    "measured / predicted": "---:",
    "H200": "---:",
    "floor, H200": "---:",
    "x floor": "---:",
    "sequences split": "---",
    "published": "---",
}


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


def variants_table(measured: dict) -> str:
    """Every variant on every shape: predicted for an H200, its floor, and what an H100 took where it was measured."""
    took = {}
    for row in measured["benchmarks"]:
        _, cell, shape, regime, *_ = row["name"].split("/")
        took[cell, shape, regime] = row["us"]
    lines = [
        "",
        "Every variant, K = V as in its name: predicted for an H200, in brackets the floor. Where it was measured,",
        f"also for an H100, in square brackets what one took (long, C++, {measured['context']['commit'][:7]}).",
        "",
        line(["shape", *VARIANTS]),
        line(["---", *["---:"] * len(VARIANTS)]),
    ]
    for shape in ALL:
        cells = []
        for name, model in VARIANTS.items():
            h100, h200 = (f"{model.call(shape, gpu):.0f}" for gpu in (H100, H200))
            us = took.get((name.removesuffix("_sm90"), str(shape), "long"))
            cells.append(f"{h200} ({floor_us(shape, H200, model):.0f})" + (f"; {h100} [{us:.0f}]" if us else ""))
        lines.append(line([str(shape), *cells]))
    return "\n".join(lines) + "\n"


def report(measured: dict, every_variant: dict) -> str:
    return table(MAIN, measured) + variants_table(every_variant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=RESULTS / "chunk_fwd_h100.json")
    parser.add_argument("--variants", type=Path, default=RESULTS / "chunk_fwd_cpp_h100.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "chunk_fwd_cost.md")
    args = parser.parse_args()
    args.markdown.write_text(report(json.loads(args.measured.read_text()), json.loads(args.variants.read_text())))


if __name__ == "__main__":
    main()
