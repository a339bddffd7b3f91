"""What compute-sanitizer's racecheck says of our kernels, sorted: hazards of a known limit of the tool, and others.

python -m bench.device.racecheck LOG

racecheck does not follow bar.arrive everywhere: it reports hazards in kernels of bench/device/handover.cu, which have
none. The scans of portable variants hand their records and outputs over in that way, and so they are known.
What the tool cannot see there, ThreadSanitizer judges on the emulator. Exits with 1 where another kernel is named.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

REPORT = re.compile(r"Race reported between .* access at (?:void )?(?:kda::)?(\w+)(?:<kda::(\w+)>)?")
BY_NAMED_BARRIERS = re.compile(r"chunk_(fwd_scan|fwd_summarise|bwd_scan)_kernel")


def hazards(log: str) -> Counter[tuple[str, str]]:
    """Reports of each kernel and variant."""
    return Counter((kernel, variant) for kernel, variant in REPORT.findall(log))


def is_known(kernel: str, variant: str) -> bool:
    return bool(BY_NAMED_BARRIERS.fullmatch(kernel)) and not variant.endswith("Sm90")


def main(log: str) -> int:
    found = hazards(Path(log).read_text(errors="replace"))
    for (kernel, variant), count in found.most_common():
        verdict = "known: bar.arrive" if is_known(kernel, variant) else "HAZARD"
        print(f"  {kernel}<{variant}>: {count} reports, {verdict}")
    return int(not all(is_known(*name) for name in found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
