"""Draws what was measured: tables in Markdown and figures, from the JSON files of the benchmarks alone.

python -m bench.python.report FILE.json ... --out FILE    a report, and a figure of every table beside it
python -m bench.python.report --page                           docs/performance.md, from bench/results

Needs neither torch nor a GPU. Without matplotlib there are no figures.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "bench" / "results"
TITLES = {
    "chunk_fwd": "The forward, without gradients",
    "chunk_bwd": "Training",
    "decode": "Decoding",
    "layer": "A training step of one layer",
    "surround": "Convolution and gated norm",
}
MEASURED = {"step": "forward and backward", "core": "backward", "decode": "a step"}
OURS = "kda_cuda"
GROUPS = {  # by form, op or host
    "fused": "everything fused",
    "core": "the core alone",
    "general": "the core beside a general diagonal-plus-low-rank transition",
}
LABELS = ("shape", "batch", "heads", "tokens", "state", "regime", "gradients")
MACHINE = {"driver": "driver", "torch": "torch", "cuda": "CUDA", "triton": "Triton", "commit": "commit"}
NOT_PEERS = ("reference", "sdpa", "copy")  # beside them nobody chooses
HOW_TO_READ = """\
* Outputs and gradients of every provider are verified before anything is timed. What is wrong has no time.
* **GPU time** is that of a call inside a CUDA graph: the median of rounds in which all providers take turns.
* In brackets: how many times the time of the first provider.
* The **floor** is what a copy of as many bytes takes on that machine.
* **Of copy** is the share of the copy's speed that the first provider reaches.
* **Host time** passes until an eager call returns.
* **Peak** is the memory that a warmed-up call takes, results included.
* Of a layer, GPU time is the sum of its kernels. On a CPU every time is the host's.
* Two gate regimes: with `fast` gates no channel remembers for 16 tokens, with `long` ones most remember for hundreds.
* **Everything fused** computes the gate, the norms of q and k and the sigmoid of beta too.
* **The core alone** gets them computed.
* `fla` is flash-linear-attention, `flash_kda` FlashKDA and `cudnn` NVIDIA's cuDNN frontend.
* `sdpa` is PyTorch's `scaled_dot_product_attention` at the same shape, which computes another function.
* `copy` moves as many bytes by PyTorch's copy, as one more provider.
* A shape such as T8192_H64_N1 has 8192 tokens, 64 heads and one sequence.
"""
INTRODUCTION = """\
# Performance

`make bench` measures this on your machine, and draws such a report. This page is drawn from `bench/results` by
`python -m bench.python.report --page`. `bench/log` says what was expected and why things are as they are.
"""
IN_SHORT = """\
## In short

A cell says how many times as much another library takes as kda_cuda: the median of all rows, the least and the most.
Below 1 the other library is ahead. The section *How to read it* explains the words. After it come all rows.
"""
FIGURE = "![GPU time of a training step, everything fused](performance.png)"
INTRODUCTION_OF_REPORT = f"# Benchmarks\n\n{HOW_TO_READ.strip()}"


@dataclass(frozen=True)
class Table:
    title: str
    what: str  # the measurement
    rows: list[dict]

    def labels(self) -> list[str]:
        """Those that tell rows apart, and the shape always."""
        return [x for x in LABELS if len({str(row.get(x)) for row in self.rows}) > 1 or (x == "shape" and self.has(x))]

    def has(self, label: str) -> bool:
        return any(label in row for row in self.rows)

    def providers(self) -> list[str]:
        """Those with a time in any row, in the order of the rows."""
        names = dict.fromkeys(name for row in self.rows for name in row.get("providers", {}))
        return [name for name in names if any(self.columns(row, name) for row in self.rows)]

    def columns(self, row: dict, name: str) -> dict | None:
        columns = row.get("providers", {}).get(name, {}).get(self.what, {})
        return columns if "gpu_us" in columns else None

    def median(self, row: dict, name: str, column: str) -> float | None:
        columns = self.columns(row, name)
        return columns[column]["median"] if columns and column in columns else None

    def heading(self) -> str:
        """The title, with what all rows share."""
        told = {x: self.rows[0][x] for x in LABELS if x not in self.labels() and self.rows[0].get(x) is not None}
        told = {x: value for x, value in told.items() if (x, value) != ("gradients", "all")}
        common = ", ".join(f"{x} {value}" for x, value in told.items())
        return f"{self.title[:1].upper()}{self.title[1:]}{f' ({common})' if common else ''}"


def tables(result: dict) -> Iterator[Table]:
    """One for each form, op or host and each measurement."""
    groups: dict[tuple, list[dict]] = {}
    for row in result["rows"]:
        groups.setdefault((row.get("form") or row.get("op") or row.get("host"), row.get("gradients")), []).append(row)
    for (group, _), rows in groups.items():
        for what in dict.fromkeys(what for row in rows for what in row.get("bytes", {})) or ("not measured",):
            name = GROUPS.get(group, f"`{group}`" if group else "")
            title = ", ".join(x for x in (name, MEASURED.get(what, what)) if x)
            yield Table(title, what, rows)


def number(x: float | None) -> str:
    if x is None:
        return "–"
    return f"{x:.3g}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def grid(head: list[str], left: int, rows: list[list[str]]) -> str:
    """A table of Markdown whose first columns are text."""
    lines = [head, ["---"] * left + ["---:"] * (len(head) - left), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def floor_us(result: dict, table: Table, row: dict) -> float | None:
    moved = row.get("bytes", {}).get(table.what)
    return moved / (1e6 * result["copy_bandwidth_tb_s"]) if moved else None


def times(result: dict, table: Table) -> str:
    """GPU times, with bytes and floor."""
    labels, names = table.labels(), table.providers()
    rows = []
    for row in table.rows:
        floor, cells = floor_us(result, table, row), [str(row.get(x, "")) for x in labels]
        first = table.median(row, names[0], "gpu_us")
        moved = row.get("bytes", {}).get(table.what)
        cells += [number(moved / 1e6 if moved else None), number(floor)]
        cells.append(f"{floor / first:.0%}" if floor and first else "–")
        for name in names:
            us = table.median(row, name, "gpu_us")
            ratio = f" ({us / first:.2f})" if us is not None and first and name != names[0] else ""
            cells.append(number(us) + ratio)
        rows.append(cells)
    return grid([*labels, "MB", "floor µs", "of copy", *(f"{name} µs" for name in names)], len(labels), rows)


def peak(row: dict, name: str) -> float | None:
    return row.get("providers", {}).get(name, {}).get("peak_mib")


def host_and_memory(table: Table) -> str:
    labels, names = table.labels(), table.providers()
    measured = [x for x in names if any(table.median(row, x, "host_us") for row in table.rows)]
    weighed = [x for x in names if any(peak(row, x) is not None for row in table.rows)]
    rows = []
    for row in table.rows:
        peaks = (peak(row, name) for name in weighed)
        hosts = [number(table.median(row, name, "host_us")) for name in measured]
        rows.append([*(str(row.get(x, "")) for x in labels), *hosts, *(number(x) for x in peaks)])
    head = [*labels, *(f"{name} host µs" for name in measured), *(f"{name} peak MiB" for name in weighed)]
    return grid(head, len(labels), rows) if measured else ""


def reasons(table: Table) -> list[str]:
    """Why a row or a provider has no time, and in how many rows."""
    found: Counter[tuple[str, str]] = Counter()
    for row in table.rows:
        if why := row.get("failed") or row.get("left_out"):
            found[" ".join(str(row[x]) for x in LABELS if x in row), why] += 1
        for name, said in row.get("providers", {}).items():
            columns = said.get(table.what, said)
            if why := columns.get("failed") or columns.get("unsupported"):
                found[name, why] += 1
    rows = len(table.rows)
    lines = [(who, " ".join(why.replace("`", "'").split()), n) for (who, why), n in found.items()]
    return [f"* {who}{f' in {n} of {rows} rows' if rows > 1 else ''}: `{why}`" for who, why, n in lines]


def title(result: dict, source: str) -> str:
    """Of the benchmark, with what the name of the file says beside it and the GPU."""
    words, gpu = Path(source).stem.removeprefix(result["benchmark"]).split("_"), (result.get("gpu") or "").lower()
    more = " ".join(word for word in words if word not in gpu)
    return TITLES[result["benchmark"]] + (f" ({more})" if more else "")


def section(result: dict, source: str, level: str = "##") -> str:
    """All tables of one result, with where they were measured."""
    machine = ", ".join(f"{name} {result[key]}" for key, name in MACHINE.items() if result.get(key))
    place = result.get("gpu") or f"a CPU, device {result['device']}"
    head = f"{level} {title(result, source)}: {place}, {result['date']}"
    copied = f"a copy moves {result['copy_bandwidth_tb_s']} TB/s"
    parts = [head, f"`{source}`. {machine[:1].upper()}{machine[1:]}; {result['dtype']}, {copied}."]
    missing = [f"* {name}: `{why}`" for name, why in peers_of(result) if why.startswith(("missing", "not there"))]
    there = [f"* {name}: {why}" for name, why in peers_of(result) if not why.startswith(("missing", "not there"))]
    parts += ["\n".join([*there, *missing])] if there or missing else []
    for table in tables(result):
        parts.append(f"{level}# {table.heading()}")
        if table.providers():
            parts += [times(result, table), host_and_memory(table)]
        parts.append("\n".join(reasons(table)))
    return "\n\n".join(part for part in parts if part)


def peers_of(result: dict) -> list[tuple[str, str]]:
    """Peers by name, in older files by operation first."""
    flat = []
    for name, said in result.get("peers", {}).items():
        flat += [(f"{peer} ({name})", why) for peer, why in said.items()] if isinstance(said, dict) else [(name, said)]
    return flat


def load(files: list[Path]) -> list[tuple[Path, dict]]:
    """Results of the benchmarks, in the order of the titles."""
    loaded = [(path, json.loads(path.read_text())) for path in files]
    results = [(path, x) for path, x in loaded if isinstance(x, dict) and x.get("benchmark") in TITLES]
    order = list(TITLES)
    return sorted(results, key=lambda x: (order.index(x[1]["benchmark"]), str(x[0])))


def measured_on_gpus(folder: Path = RESULTS) -> list[tuple[Path, dict]]:
    return [(path, result) for path, result in load(sorted(folder.glob("*.json"))) if result["gpu"]]


def spread(ratios: list[float]) -> str:
    """Median, least and most."""
    if not ratios:
        return "–"
    least, most = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return f"{median(ratios):.2f}" + (f" ({least} to {most})" if least != most else "")


def beside(table: Table, rows: list[dict], name: str) -> list[str]:
    """How many rows both have, and GPU time, host time and peak memory of ``name`` over ours."""

    def ratios(of: Callable[[dict, str], float | None]) -> list[float]:
        pairs = [(of(row, OURS), of(row, name)) for row in rows]
        return [theirs / ours for ours, theirs in pairs if ours and theirs]

    gpu, host = (ratios(lambda row, x, c=column: table.median(row, x, c)) for column in ("gpu_us", "host_us"))
    return [str(len(gpu)), spread(gpu), spread(host), spread(ratios(peak))] if gpu else []


def in_short(results: list[dict]) -> str:
    """Every table with peers: a line for each of them and each regime."""
    lines = []
    for result in results:
        for table in tables(result):
            what = ": ".join(x for x in (TITLES[result["benchmark"]], table.title) if x != "forward")
            for name in (x for x in table.providers() if x != OURS and x not in NOT_PEERS):
                for regime in dict.fromkeys(row.get("regime") for row in table.rows):
                    rows = [row for row in table.rows if row.get("regime") == regime]
                    if cells := beside(table, rows, name):
                        lines.append([what, " ".join(result["gpu"].split()[:2]), regime or "–", name, *cells])
    return grid(["measured", "GPU", "regime", "beside", "rows", "GPU time", "host time", "peak memory"], 4, lines)


def page() -> str:
    """docs/performance.md: what was measured on GPUs, the essential first."""
    measured = measured_on_gpus()
    sections = [section(x, path.relative_to(ROOT).as_posix()) for path, x in measured]
    first = [INTRODUCTION.strip(), IN_SHORT.strip(), in_short([x for _, x in measured]), FIGURE]
    return "\n\n".join([*first, f"## How to read it\n\n{HOW_TO_READ.strip()}", *sections]) + "\n"


def draw_page() -> None:
    """The page and its figure: a training step with everything fused, of the first result that has one."""
    PAGE.write_text(page())
    steps = ((x, table) for _, x in measured_on_gpus() for table in tables(x) if table.what == "step")
    if find_spec("matplotlib"):
        figure(*next(steps), PAGE.with_suffix(".png"))


def figure(result: dict, table: Table, path: Path) -> None:
    """GPU times: a mark for every provider and row, on a logarithmic axis."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(max(6, 0.4 * len(table.rows)), 4.5), layout="constrained")
    axes = drawing.subplots()
    for mark, name in zip("osD^vP*X<>" * 2, table.providers(), strict=False):
        us = [table.median(row, name, "gpu_us") for row in table.rows]
        axes.plot(range(len(us)), [x or float("nan") for x in us], mark, label=name, alpha=0.8)
    labels = [" ".join(str(row.get(x, "")) for x in table.labels()) for row in table.rows]
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right")
    place = f"{result.get('gpu') or result['device']}, {result['date']}"
    axes.set_title(f"{table.heading().replace('`', '')}\n{place}", fontsize="medium")
    axes.set(yscale="log", ylabel="µs")
    axes.grid(axis="y", which="both", alpha=0.3)
    axes.legend()
    drawing.savefig(path, dpi=120)


def write(files: list[Path], out: Path, failed: dict[str, str] | None = None, figures: bool = True) -> None:
    """The report, with a figure of every table if matplotlib is there, and with what ``failed`` by name."""
    parts = [INTRODUCTION_OF_REPORT, "\n".join(f"* {name} failed: `{why}`" for name, why in (failed or {}).items())]
    figures = figures and bool(find_spec("matplotlib"))
    if not figures:
        parts.append("There are no figures: no matplotlib, or the run has not ended.")
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, result in load(files):
        parts.append(section(result, path.name))
        for place, table in enumerate(tables(result)):
            if figures and table.providers():
                name = f"{path.stem}_{place}_{table.what}.png"
                figure(result, table, out.parent / name)
                parts.append(f"![{table.heading()}]({name})")
    out.write_text("\n\n".join(part for part in parts if part) + "\n")


def problem(path: Path) -> str | None:
    """Why a file cannot be reported."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        return f"{type(e).__name__}: {e}"
    if isinstance(result, dict) and result.get("benchmark") in TITLES:
        return None
    return f"it is of no benchmark that has a report: {', '.join(TITLES)}"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", action="store_true")
    args = parser.parse_args(given)
    if args.page == bool(args.files) or bool(args.files) != bool(args.out):
        parser.error("expected files and --out, or --page")
    for path in args.files:
        if why := problem(path):
            parser.error(f"{path}: {why}")
    if args.page:
        draw_page()
    else:
        write(args.files, args.out)


if __name__ == "__main__":
    main()
