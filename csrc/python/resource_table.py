"""Turns what `ptxas -v` said of the kernels into a table: registers, stack, spills, static shared memory.

resource_table.py --header FILE --info JSON REPORT...   a C++ string literal for csrc/python/module.cpp
resource_table.py --json FILE REPORT...                 the table alone; bench/results/registers.json is the baseline
resource_table.py --check BASELINE REPORT...            fails where a kernel spills more than the baseline says
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def demangle(names: list[str]) -> list[str]:
    if not names or not shutil.which("c++filt"):
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void ", "", line).split("(")[0] for line in text.splitlines()]


def parse(report: str) -> list[dict]:
    """One row per kernel and architecture, in the order of the report."""
    rows = []
    for line in report.splitlines():
        if m := _ENTRY.search(line):
            rows.append({"kernel": m[1], "arch": m[2]})
        elif (m := _SPILLS.search(line)) and rows:
            rows[-1].update(stack_bytes=int(m[1]), spill_store_bytes=int(m[2]), spill_load_bytes=int(m[3]))
        elif (m := _USED.search(line)) and rows:
            shared = _SHARED.search(line)
            rows[-1].update(registers=int(m[1]), static_shared_bytes=int(shared[1]) if shared else 0)
    for row, name in zip(rows, demangle([r["kernel"] for r in rows]), strict=True):
        row["kernel"] = name.replace("kda::", "")
    return rows


def table(reports: list[Path]) -> list[dict]:
    rows = [row for report in reports for row in parse(report.read_text())]
    unique = {(row["kernel"], row["arch"]): row for row in rows}
    return [unique[key] for key in sorted(unique)]


def spilled(row: dict) -> int:
    return row["spill_store_bytes"] + row["spill_load_bytes"]


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
    parser.add_argument("--info", default="{}")
    parser.add_argument("reports", nargs="*", type=Path)
    args = parser.parse_args()
    kernels = table(args.reports)
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
