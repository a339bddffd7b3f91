"""A line for each kernel from what `ncu --csv --page raw` printed: time, throughputs, tensor pipe, issue slots, stalls.

python -m bench.device.profile_table FILE

A metric that this version of ncu calls otherwise is shown as "-".
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

PERCENT = r"\.avg\.pct_of_peak_sustained_(active|elapsed)$"
COLUMNS = {  # heading: the metrics that it may be; the largest counts
    "us": r"^gpu__time_duration\.sum$",
    "dram %": rf"^(gpu__)?dram(__|_)throughput{PERCENT}",
    "L2 %": rf"^lts__(t_sectors|throughput){PERCENT}",
    "tensor %": rf"^sm__(pipe|inst_executed_pipe)_tensor\w*{PERCENT}",
    "issue %": r"^(sm|smsp)__(inst_issued|issue_active)\.avg\.pct_of_peak_sustained_active$",
    "warps %": r"^sm__warps_active\.avg\.pct_of_peak_sustained_active$",
    "regs": r"^launch__registers_per_thread$",
    "smem KB": r"^launch__shared_mem_per_block(_dynamic)?$",
    "blocks": r"^launch__grid_size$",
}
STALL = re.compile(r"^smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio$")
TO_MICROSECONDS = {
    "nsecond": 1e-3,
    "ns": 1e-3,
    "usecond": 1,
    "us": 1,
    "msecond": 1e3,
    "ms": 1e3,
    "second": 1e6,
    "s": 1e6,
}
TO_KILOBYTES = {"byte": 1e-3, "Kbyte": 1, "Mbyte": 1e3}


def number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def value(row: dict[str, str], units: dict[str, str], heading: str) -> float | None:
    """The metric of a heading; times in microseconds, shared memory in kilobytes."""
    found = []
    for name, text in row.items():
        if (x := number(text)) is not None and re.search(COLUMNS[heading], name):
            unit = units[name].split("/")[0]
            found.append(x * TO_MICROSECONDS.get(unit, 1) * TO_KILOBYTES.get(unit, 1))
    return max(found, default=None)


def stalls(row: dict[str, str], most: int = 3) -> str:
    """The reasons for which warps wait most, in warps per issued instruction."""
    found = {m[1]: x for name, text in row.items() if (m := STALL.match(name)) and (x := number(text)) is not None}
    found.pop("selected", None)
    largest = sorted(found.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {x:.1f}" for name, x in largest)


def short_name(kernel: str) -> str:
    """Without return type, namespaces and arguments: ``chunk_fwd_scan_kernel<Bf16K128>``."""
    plain = re.sub(r"\w+::|^void ", "", kernel.partition("(")[0])
    return plain if len(plain) <= 48 else plain[:45] + "..."


def table(text: str) -> list[str]:
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError(
            'profile_table: no line of the file begins with "ID", expected what ncu --csv --page raw prints'
        )
    units, *rows = csv.DictReader(lines[start:])
    out = [f"{'kernel':48} " + " ".join(f"{heading:>8}" for heading in COLUMNS) + "  waiting warps an instruction"]
    for row in rows:
        numbers = (value(row, units, heading) for heading in COLUMNS)
        cells = " ".join(f"{'-':>8}" if x is None else f"{x:8.1f}" for x in numbers)
        out.append(f"{short_name(row['Kernel Name']):48} {cells}  {stalls(row)}")
    return out


if __name__ == "__main__":
    print("\n".join(table(Path(sys.argv[1]).read_text())))
