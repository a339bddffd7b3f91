"""Turns what `ptxas -v` said of the kernels into a table: registers, stack, spills, shared memory, occupancy.

resource_table.py --header FILE --info JSON REPORT...   a C++ string literal for csrc/python/module.cpp
resource_table.py --json FILE [--library LIBRARY] [--markdown FILE] REPORT...
                                                        the table alone; bench/results/registers.json is the baseline.
                                                        The library says with how many threads and how much dynamic
                                                        shared memory it launches: without it, there is no occupancy
resource_table.py --check BASELINE REPORT...            fails where a kernel spills more than the baseline says
resource_table.py --guard REPORT...                     fails where ptxas gave up what a kernel is built on
"""

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_FUNCTION = re.compile(r"Function properties for (\w+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_LOSS = re.compile(r"Potential Performance Loss: (.+)")
_IN_FUNCTION = re.compile(r"function '(\w+)'")
_WHAT_TO_DO = (
    "wgmma: between the first product of a group and its wait there may be no branch, no call and no access to the "
    "accumulators (bench/log); setmaxnreg: the registers at entry must be known from __launch_bounds__"
)
# Nothing but inner loops, and registers to spare: these may not spill, whatever the baseline says.
_NEVER_SPILLS = re.compile(r"chunk_fwd_scan_kernel<(Bf16|Fp16)K(64|128)(C32|Sm90)?>")


def demangle(names: list[str]) -> list[str]:
    if not names or not shutil.which("c++filt"):
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void ", "", line).split("(")[0] for line in text.splitlines()]


def kernels_of(report: str) -> list[tuple[str, str]]:
    """Symbol and architecture of each kernel."""
    return [(m[1], m[2]) for m in _ENTRY.finditer(report)]


def parse(report: str) -> list[dict]:
    """One row per kernel and architecture, in the order of the report. Functions that a kernel calls are functions of
    their own: what these spill is said beside it."""
    rows, function = [], ""
    for line in report.splitlines():
        if m := _ENTRY.search(line):
            rows.append({"kernel": m[1], "arch": m[2]})
            function = m[1]
        elif m := _FUNCTION.search(line):
            function = m[1]
        elif (m := _SPILLS.search(line)) and rows and function != rows[-1]["kernel"]:
            rows[-1]["called_spill_bytes"] = called_spills(rows[-1]) + int(m[2]) + int(m[3])
        elif m and rows:
            rows[-1].update(stack_bytes=int(m[1]), spill_store_bytes=int(m[2]), spill_load_bytes=int(m[3]))
        elif (m := _USED.search(line)) and rows:
            shared = _SHARED.search(line)
            rows[-1].update(registers=int(m[1]), static_shared_bytes=int(shared[1]) if shared else 0)
    for row, name in zip(rows, demangle([r["kernel"] for r in rows]), strict=True):
        row["kernel"] = name.replace("kda::", "")
    return rows


def losses(report: str) -> list[str]:
    """Each kernel that ptxas slowed down, with its reason, which it prints as a mere information."""
    found, kernel = [], "an unnamed kernel"
    for line in report.splitlines():
        if m := _ENTRY.search(line):
            kernel = m[1]
        if m := _LOSS.search(line):
            named = _IN_FUNCTION.search(m[1])
            found.append((named[1] if named else kernel, m[1]))
    names = demangle([kernel for kernel, _ in found])
    return list(dict.fromkeys(f"{name}: {loss}" for name, (_, loss) in zip(names, found, strict=True)))


def table(reports: list[Path]) -> list[dict]:
    rows = [row for report in reports for row in parse(report.read_text())]
    unique = {(row["kernel"], row["arch"]): row for row in rows}
    return [unique[key] for key in sorted(unique)]


def launches(library: Path) -> dict[str, tuple[int, int]]:
    """What `kda_kernels` of a built library says of each kernel: threads, bytes of dynamic shared memory."""
    import torch  # noqa: F401  the library is found to need it

    function = ctypes.CDLL(str(library.resolve())).kda_kernels
    text = ctypes.create_string_buffer(1 << 16)
    if not 0 < function(text, len(text)) < len(text):
        sys.exit(f"{library} does not say how it launches its kernels")
    lines = [line.split("\t") for line in text.value.decode().replace("kda::", "").splitlines()]
    return {kernel: (int(threads), int(shared)) for kernel, threads, shared in lines}


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one SM (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")."""

    warps: int
    blocks: int
    shared_bytes: int
    registers: int = 64 * 1024

    def blocks_at_once(self, threads: int, registers: int, shared_bytes: int) -> int:
        """Registers are given to warps in steps of 256 within a quarter of the SM, shared memory to blocks in steps of
        128 bytes with 1 KB on top."""
        block_warps = -(-threads // 32)
        warp_registers = -(-32 * registers // 256) * 256
        warps = self.registers // 4 // warp_registers * 4
        block_shared = -(-shared_bytes // 128) * 128 + 1024
        return min(self.blocks, min(self.warps, warps) // block_warps, self.shared_bytes // block_shared)


MULTIPROCESSORS = {
    "80": Multiprocessor(64, 32, 164 * 1024),
    "90": Multiprocessor(64, 32, 228 * 1024),
    "100": Multiprocessor(64, 32, 228 * 1024),
    "120": Multiprocessor(48, 24, 100 * 1024),
}


def add_occupancy(kernels: list[dict], launched: dict[str, tuple[int, int]]) -> None:
    """Every kernel has to be known to the library, every architecture to `MULTIPROCESSORS`."""
    for row in kernels:
        threads, dynamic = launched[row["kernel"]]
        sm = MULTIPROCESSORS[row["arch"].rstrip("af")]
        blocks = sm.blocks_at_once(threads, row["registers"], row["static_shared_bytes"] + dynamic)
        occupancy = round(blocks * -(-threads // 32) / sm.warps, 3)
        row.update(threads=threads, dynamic_shared_bytes=dynamic, blocks_per_sm=blocks, occupancy=occupancy)


COLUMNS = {
    "variants": "---",
    "sm": "---",
    "threads": "---:",
    "shared memory, KB": "---:",
    "blocks per SM": "---:",
    "occupancy": "---:",
    "spills": "---:",
    "registers": "---:",
}


def cells(row: dict) -> tuple[str, ...]:
    shared = (row["static_shared_bytes"] + row["dynamic_shared_bytes"]) / 1024
    occupancy = f"{100 * row['occupancy']:.0f} %"
    return str(row["threads"]), f"{shared:.1f}", str(row["blocks_per_sm"]), occupancy, str(spilled(row))


def lines_of(kernels: list[dict]) -> list[str]:
    """One for variants and architectures that differ in no more than registers."""
    architectures: dict[tuple, list[str]] = {}
    for row in kernels:
        architectures.setdefault((row["kernel"], cells(row)), []).append(row["arch"])
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in kernels:
        groups.setdefault((", ".join(architectures[row["kernel"], cells(row)]), *cells(row)), []).append(row)
    lines = []
    for shown, rows in groups.items():
        variants = dict.fromkeys(row["kernel"].partition("<")[2].removesuffix(">").strip() for row in rows)
        registers = sorted({row["registers"] for row in rows})
        span = f"{registers[0]} to {registers[-1]}" if len(registers) > 1 else f"{registers[0]}"
        lines.append(line([", ".join(f"`{name}`" for name in variants if name), *shown, span]))
    return lines


def markdown(kernels: list[dict]) -> str:
    """Every kernel, to be read."""
    lines = [
        "Written by `make registers` from what `registers.json` gets; do not edit. Shared memory: dynamic and static,",
        "of decode and decode_commit for sequences of several tokens. Spills: bytes stored + loaded; those of",
        "functions that a kernel calls (steep chunks of `chunk_bwd_keys`) are in `registers.json`. Variants of the",
        "decoding kernels: layout of the states, element, tile of K, whether they move 16 bytes at a time, warps.",
    ]
    for family in dict.fromkeys(row["kernel"].partition("<")[0] for row in kernels):
        lines += ["", f"## {family}", "", line(COLUMNS), line(COLUMNS.values())]
        lines += lines_of([row for row in kernels if row["kernel"].partition("<")[0] == family])
    return "\n".join(lines) + "\n"


def line(texts) -> str:
    return "| " + " | ".join(texts) + " |"


def spilled(row: dict) -> int:
    return row["spill_store_bytes"] + row["spill_load_bytes"]


def called_spills(row: dict) -> int:
    return row.get("called_spill_bytes", 0)


def faults(kernels: list[dict], baseline: list[dict]) -> list[str]:
    """What is worse than the baseline; a kernel that the baseline does not know may not spill at all."""
    known = {(row["kernel"], row["arch"]): row for row in baseline}
    found = []
    for row in kernels:
        before = known.get((row["kernel"], row["arch"]))
        allowed = spilled(before) if before else 0
        if spilled(row) > allowed:
            limit = f"the baseline has {allowed}" if before else "the baseline does not know it"
            found.append(f"{row['kernel']} (sm_{row['arch']}) spills {spilled(row)} bytes, {limit}")
        elif called_spills(row) > (allowed := called_spills(before) if before else 0):
            found.append(
                f"{row['kernel']} (sm_{row['arch']}): what it calls spills {called_spills(row)} bytes, not {allowed}"
            )
        elif spilled(row) and _NEVER_SPILLS.fullmatch(row["kernel"]):
            found.append(f"{row['kernel']} (sm_{row['arch']}) spills {spilled(row)} bytes in its inner loop")
    return found


def check(kernels: list[dict], baseline: list[dict]) -> None:
    names = [{(row["kernel"], row["arch"]) for row in rows} for rows in (kernels, baseline)]
    better = sum(
        spilled(row) < spilled(before)
        for row in kernels
        for before in baseline
        if (row["kernel"], row["arch"]) == (before["kernel"], before["arch"])
    )
    print(
        f"{len(kernels)} kernels: {sum(map(spilled, kernels))} bytes of spills; against the baseline "
        f"{better} spill less, {len(names[0] - names[1])} are new, {len(names[1] - names[0])} are gone"
    )
    if found := faults(kernels, baseline):
        sys.exit("\n".join([*found, "if that is meant: make registers"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--header", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", type=Path, metavar="BASELINE")
    parser.add_argument("--guard", action="store_true")
    parser.add_argument("--library", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--info", default="{}")
    parser.add_argument("reports", nargs="*", type=Path)
    args = parser.parse_args()
    if args.guard:
        if found := [loss for report in args.reports for loss in losses(report.read_text())]:
            sys.exit("\n".join(["ptxas made these kernels slow:", *found, _WHAT_TO_DO]))
        return
    kernels = table(args.reports)
    if args.library:
        add_occupancy(kernels, launches(args.library))
    if args.markdown:
        args.markdown.write_text(markdown(kernels))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join("  " + json.dumps(row) for row in kernels)
        args.json.write_text(f"[\n{lines}\n]\n")
    if args.check:
        if not kernels:
            sys.exit("no reports of ptxas were given: is there a build of the kernels?")
        check(kernels, json.loads(args.check.read_text()))
    if args.header:
        text = json.dumps({**json.loads(args.info), "kernels": kernels})
        pieces = [text[i : i + 8000] for i in range(0, len(text), 8000)]  # compilers limit one literal
        args.header.parent.mkdir(parents=True, exist_ok=True)
        args.header.write_text("\n".join(f'R"kda({piece})kda"' for piece in pieces) + "\n")


if __name__ == "__main__":
    main()
