"""The cost model of the chunk forward: what each shape should take, beside what it took, the floor and the peers.

python -m bench.python.cost_model [--measured FILE] [--variants FILE] [--markdown FILE]

writes ``bench/results/chunk_fwd_cost.md`` from ``chunk_fwd_h100.json``, ``chunk_fwd_cpp_h100.json`` and what the
library (the emulated one, or else the built one) predicts, by the costs that decide how it launches a call.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from kda_cuda import library, plans, testing
from kda_cuda.plans import PlannedGpu

from .shapes import ALL, TEN, Shape, traffic_bytes

RESULTS = Path(__file__).parent.parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


H100, H200 = PlannedGpu(132, 3.0), PlannedGpu(132, 4.3)  # what a copy was measured to reach


@dataclass(frozen=True)
class Variant:
    """The one that serves K = V = head_dim on a Hopper GPU."""

    name: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name.partition("_")[0]]

    @property
    def head_dim(self) -> int:
        return int(re.search(r"_k(\d+)", self.name)[1])

    def call(self, shape: Shape) -> plans.ChunkShape:
        sequences = len(shape.lengths) if len(shape.lengths) > 1 else None
        sizes = (1, shape.tokens, sequences, shape.heads, shape.heads, self.head_dim, self.head_dim)
        return plans.ChunkShape(self.dtype, *sizes)

    @functools.cache  # noqa: B019  variants live as long as the module
    def plan(self, shape: Shape, gpu: PlannedGpu) -> dict[str, str]:
        """What the library says of the call on such a GPU."""
        namespace = library.NAMESPACE_EMULATED if testing.emulator_path().exists() else library.NAMESPACE
        plan = self.call(shape).forward_plan(namespace, planned=gpu)
        assert plan["variant"] == self.name, plan
        return plan

    def us(self, shape: Shape, gpu: PlannedGpu, of: str = "") -> float:
        """Predicted, of the call or of its kernels ``prepare`` or ``scan``."""
        return float(self.plan(shape, gpu)[f"predicted_{of}_us" if of else "predicted_us"])


MAIN = Variant("bf16_k128_sm90")
# Those that the costs were fitted to.
VARIANTS = (MAIN, *map(Variant, ("fp16_k128_sm90", "fp32_k128", "bf16_k64_sm90", "bf16_k256")))

# By the projects named, each on the GPU its authors had, fast regime.
PUBLISHED = {
    "T8192_H64_N1": "FlashKDA 1620 (H20), cuLA 1760 (H200), fla 1820 (H200)",
    "T8192_H96_N1": "FlashKDA 2620 (H20), fla 4840 (H20)",
}
PUBLISHED_TEN = "cudnn-frontend 53.9 (kernel), FlashKDA 438 (H100)"


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def floor_us(shape: Shape, gpu: PlannedGpu, variant: Variant = MAIN) -> float:
    return traffic_bytes(shape, variant.head_dim, variant.dtype.itemsize) / gpu.copy_tb_s * 1e-6


COLUMNS = {
    "shape": "---",
    "rounds": "---:",
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


def measured_us(row: dict) -> float:
    return row["providers"]["kda_cuda"]["forward"]["gpu_us"]["median"]


def predictions(shape: Shape, rows: dict) -> dict[str, float]:
    return {
        "H100": MAIN.us(shape, H100),
        "fast": measured_us(rows[str(shape), "fast"]),
        "long": measured_us(rows[str(shape), "long"]),
        "H200": MAIN.us(shape, H200),
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
    return row["split"].partition("; ")[2].split(",")[0] if "split" in row else "not recorded"


def table(measured: dict) -> str:
    rows = {(row["shape"], row["regime"]): row for row in measured["rows"]}
    lines = [
        f"Written by `python -m bench.python.cost_model`; do not edit. Variant `{MAIN.name}`, K = V = 128, µs of",
        "GPU time. Predicted by the library (`ScanCost`, csrc/kda/chunk_fwd/cost.h), once for both regimes; measured",
        f"at {measured['commit']} on an {measured['gpu']}.",
        "Published: fast regime, by the projects named, on the GPU named here.",
        "",
        line(COLUMNS),
        line(COLUMNS.values()),
    ]
    every = {shape: predictions(shape, rows) for shape in ALL}
    for shape, x in every.items():
        kernels = [f"{MAIN.us(shape, H100, of):.0f}" for of in ("prepare", "scan")]
        last = [split_of(rows[str(shape), "long"]), PUBLISHED.get(str(shape), "")]
        lines.append(line([str(shape), MAIN.plan(shape, H100)["rounds"], *kernels, *comparison(x), *last]))
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
        line(["shape", *(variant.name for variant in VARIANTS)]),
        line(["---", *["---:"] * len(VARIANTS)]),
    ]
    for shape in ALL:
        cells = []
        for variant in VARIANTS:
            h100, h200 = (f"{variant.us(shape, gpu):.0f}" for gpu in (H100, H200))
            us = took.get((variant.name.removesuffix("_sm90"), str(shape), "long"))
            cells.append(f"{h200} ({floor_us(shape, H200, variant):.0f})" + (f"; {h100} [{us:.0f}]" if us else ""))
        lines.append(line([str(shape), *cells]))
    return "\n".join(lines) + "\n"


def report(measured: dict, every_variant: dict) -> str:
    return table(measured) + variants_table(every_variant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=RESULTS / "chunk_fwd_h100.json")
    parser.add_argument("--variants", type=Path, default=RESULTS / "chunk_fwd_cpp_h100.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "chunk_fwd_cost.md")
    args = parser.parse_args()
    args.markdown.write_text(report(json.loads(args.measured.read_text()), json.loads(args.variants.read_text())))


if __name__ == "__main__":
    main()
