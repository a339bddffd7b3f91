"""Looks into the machine code of a built library for what a kernel is built on.

check_sass.py LIBRARY REPORT...    the reports of ptxas name the kernels and architectures that have to be there

* Kernels by warpgroups multiply with HGMMA.
* The loops that multiply, chunk after chunk, touch no local memory: nothing that should be in registers was spilled.

cuobjdump and nvdisasm are taken from PATH or PyPI (nvidia-cuda-cuobjdump, nvidia-cuda-nvdisasm); without them nothing
is checked, which is said and is no failure.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from resource_table import demangle, kernels_of

HAVE_HGMMA = re.compile(r"chunk_(fwd_scan|fwd_summarise|bwd_scan)_kernel<\w+Sm90>")
# To demand it of more kernels, add them here.
NO_LOCAL_MEMORY_IN_LOOPS = [
    re.compile(r"chunk_fwd_scan_kernel<((Bf|Fp)16|Fp32)\w+>"),
    re.compile(r"chunk_bwd_scan_kernel<((Bf|Fp)16\w+|Fp32K64)>"),
    re.compile(r"chunk_fwd_summarise_kernel<((Bf|Fp)16\w+(C32|Sm90)|(Bf|Fp)16K(64|256)|Fp32K(64|128))>"),
]
NOT_CHECKED = "NOT CHECKED: the machine code of the kernels, as there is no {} on PATH or from PyPI"


class Instruction(NamedTuple):
    address: int
    predicate: str  # "" or such as "!P0"
    opcode: str  # without modifiers
    operands: str

    @property
    def target(self) -> int | None:
        """Of a branch."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.operands)
        return int(found[1], 16) if found else None

    @property
    def always_leaves(self) -> bool:
        """Whether it never goes on to the next instruction."""
        if self.predicate or self.opcode not in ("BRA", "BRX", "EXIT", "RET"):
            return False
        return self.opcode != "BRA" or bool(re.fullmatch("0x[0-9a-f]+", self.operands))


_LINE = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z0-9]+)\S*\s*(.*?)\s*;")


def functions(lines: Iterator[str]) -> Iterator[tuple[str, str, list[Instruction]]]:
    """Symbol, architecture and instructions of each function that `cuobjdump -sass` prints."""
    arch, symbol, code = "", "", []
    for line in lines:
        if m := _LINE.match(line):
            code.append(Instruction(int(m[1], 16), m[2] or "", m[3], m[4]))
        elif m := re.search(r"Function : (\w+)|code for sm_(\w+)", line):
            if code:
                yield symbol, arch, code
            arch, symbol, code = m[2] or arch, m[1] or "", []
    if code:
        yield symbol, arch, code


def successors(code: list[Instruction]) -> list[list[int]]:
    """Where each instruction may lead. A call also to what follows it, a return nowhere, as some calls are jumps out of
    loops. A table (BRX) leads forward, to what nothing else leads to."""
    at = {x.address: i for i, x in enumerate(code)}
    following = [[] if x.always_leaves else [i + 1] for i, x in enumerate(code)]
    for x, to in zip(code, following, strict=True):
        if x.opcode in ("BRA", "CALL"):
            to.append(at[x.target])
    following = [[i for i in to if i < len(code)] for to in following]
    reached = {i for to in following for i in to}
    for i, x in enumerate(code):
        if x.opcode == "BRX":
            following[i] += [j for j in range(i + 1, len(code)) if j not in reached]
    return following


def reach(following: list[list[int]], start: int) -> set[int]:
    """What may run after `start`, which belongs to it only if it may run again."""
    seen: set[int] = set()
    ahead = list(following[start])
    while ahead:
        if (i := ahead.pop()) not in seen:
            seen.add(i)
            ahead += following[i]
    return seen


def multiplying_loops(code: list[Instruction]) -> set[int]:
    """Instructions that may run between a matrix product and the same product again, subroutines with them."""
    after = successors(code)
    before: list[list[int]] = [[] for _ in code]
    for i, to in enumerate(after):
        for j in to:
            before[j].append(i)
    at = {x.address: i for i, x in enumerate(code)}
    loops: set[int] = set()
    for i, x in enumerate(code):
        if x.opcode in ("HMMA", "HGMMA") and i not in loops:
            loop = reach(after, i) & reach(before, i)
            loops |= loop
            for start in {at[code[j].target] for j in loop if code[j].opcode == "CALL"}:
                body = {start, *reach(after, start)}
                if all(code[j].opcode != "EXIT" for j in body):  # it returns
                    loops |= body
    return loops


def faults(kernel: str, code: list[Instruction]) -> list[str]:
    """What is wrong with a kernel, as far as anything is demanded of it."""
    found = []
    if HAVE_HGMMA.fullmatch(kernel) and not any(x.opcode == "HGMMA" for x in code):
        found.append("has no HGMMA: its products are not by warpgroups")
    if any(pattern.fullmatch(kernel) for pattern in NO_LOCAL_MEMORY_IN_LOOPS):
        loops = multiplying_loops(code)
        local = [code[i] for i in sorted(loops) if code[i].opcode in ("LDL", "STL")]
        if not loops:
            found.append("has no loop that multiplies: nothing could be checked")
        if local:
            places = ", ".join(f"{x.opcode} at {x.address:#x}" for x in local[:3])
            found.append(f"has {len(local)} accesses to local memory in the loop that multiplies ({places} ...)")
    return found


def is_demanding(kernel: str) -> bool:
    return any(pattern.fullmatch(kernel) for pattern in (HAVE_HGMMA, *NO_LOCAL_MEMORY_IN_LOOPS))


def search_path() -> str:
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    return os.pathsep.join([os.environ.get("PATH", ""), str(wheels)])


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    path = search_path()
    for tool in ("cuobjdump", "nvdisasm"):
        if not shutil.which(tool, path=path):
            print(NOT_CHECKED.format(tool))
            return
    library, *reports = map(Path, sys.argv[1:])
    names = {}  # (symbol, architecture) -> kernel
    built = [key for report in reports for key in kernels_of(report.read_text())]
    for key, kernel in zip(built, demangle([symbol for symbol, _ in built]), strict=True):
        if is_demanding(kernel.replace("kda::", "")):
            names[key] = kernel.replace("kda::", "")
    command = [
        shutil.which("cuobjdump", path=path),
        "-sass",
        "-fun",
        ",".join(sorted({x for x, _ in names})),
        str(library),
    ]
    wrong, missing = [], dict(names)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PATH": path}
    ) as process:
        for symbol, arch, code in functions(process.stdout):
            if kernel := missing.pop((symbol, arch), None):
                wrong += [f"{kernel} (sm_{arch}) {fault}" for fault in faults(kernel, code)]
    wrong += [f"{kernel} (sm_{arch}) is not in {library}" for (_, arch), kernel in missing.items()]
    hopper = sum(bool(HAVE_HGMMA.fullmatch(kernel)) for kernel in names.values())
    print(f"machine code of {len(names)} kernels looked at, {hopper} of them built on HGMMA: {len(wrong)} faults")
    if wrong or not names:
        sys.exit("\n".join(wrong or ["the reports of ptxas name no kernel of which anything is demanded"]))


if __name__ == "__main__":
    main()
