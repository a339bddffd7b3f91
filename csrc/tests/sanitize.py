"""Runs what AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer must judge, and says what ran.

    sanitize.py BUILD_DIRECTORY [--full]

Planted bugs: each mark ``PLANT sanitizer name: words`` in plants.cpp must be found, with these words and its line. So
must those of product_plants.py in the kernels of the backward; without one, the same program finds nothing.
Primitives: every program of csrc/tests/programs and the kernels that overlap as they may, under some schedules.
Cases: the kernels on case files (python_tests/support/case_files.py), within the error budget and with the same bits
under every schedule. Without --full a few variants on small cases; with it every kernel. ASan then judges each case
under eight schedules. TSan takes some five times as long and judges each case under three of the eight, in turns.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

import product_plants  # noqa: E402

from python_tests.support import case_files  # noqa: E402
from python_tests.support.bwd_cases import GRID, REGIMES  # noqa: E402
from python_tests.support.cases import CASES, Case  # noqa: E402

MARK = re.compile(r"// PLANT (\w+) (\w+): (.+)$")
TIMEOUT_SECONDS = 600
SANITIZERS = {"asan": "ASan + UBSan", "tsan": "TSan"}
NAMES = SANITIZERS | {"plain": "none"}

# Of at most three chunks, and together for every variant; three for those that no named case has. Those of the grid
# have what the backward must take: states or none, a gradient of the final one or none, both layouts, heads in groups,
# empty sequences. The last one has segments that are long enough to forget before they end.
FULL = [CASES[name] for name in ("fast", "violent", "varlen_v_first", "gva", "varlen_ones", "dim_100", "dim_256")] + [
    Case("fp16_keys_128", 12, key_dim=100, value_dim=40, heads=1, dtype=torch.float16, gate="fast", initial_state=True),
    Case("fp16_keys_256", 20, key_dim=200, value_dim=24, heads=1, dtype=torch.float16, chunk_size=32),
    Case("fp32_keys_256", 5, key_dim=256, value_dim=16, heads=1, gate="long", beta_sigmoid=True, initial_state=True),
    *(GRID[f"{regime}_{tokens}"] for regime in REGIMES for tokens in (1, 17)),
    Case("forgets", 577, heads=1, value_dim=8, dtype=torch.bfloat16, gate="all_steep", initial_state=True),
]
SLICE = [CASES[name] for name in ("one_token", "varlen_ones", "tail_of_one")] + [
    Case("gated", 20, heads=1, gate="long", beta_sigmoid=True, dtype=torch.bfloat16),
    Case("drafts_v_first", 9, heads=1, gate="long", beta_sigmoid=True, state_v_first=True),
]
# Where each bug of product_plants.py shows: two heads of one group in rounds of their own, two tiles of V, chunks for
# more than one turn of the sums, in the first sequence more chunks than the scan has stages, two slices of channels.
PLANTED = Case(
    "bugs", 241, key_dim=128, value_dim=136, heads=1, value_heads=2, dtype=torch.bfloat16, gate="long",
    beta_sigmoid=True, lengths=(200, 1, 1, 1, 1, 37), initial_state=True,
)  # fmt: skip


def run(command: list[str | Path]) -> tuple[int, str]:
    """A report of a sanitizer is a failure of the process, whatever the process says."""
    options = {
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **options},
        timeout=TIMEOUT_SECONDS,
    )
    return done.returncode, done.stdout


class Job:
    """One process: what it runs, and what is wrong with its outcome (None: nothing)."""

    def __init__(self, kernels: str, sanitizer: str, schedules: str, command: list[str | Path]):
        self.kernels, self.sanitizer, self.schedules, self.command = kernels, sanitizer, schedules, command

    def fault(self, code: int, output: str) -> str | None:
        return f"exit code {code}\n{output[-4000:]}" if code else None

    def ran(self) -> list[str]:
        """The rows of the table that it belongs to."""
        return [self.kernels]

    def __call__(self) -> str | None:
        return self.fault(*run(self.command))


class Plant(Job):
    """A bug that must be found: `words` are in the report."""

    def __init__(self, kernels: str, sanitizer: str, name: str, command: list[str | Path], words: tuple[str, ...]):
        super().__init__(f"{kernels}, each found", sanitizer, name, command)
        self.words = words

    def fault(self, code: int, output: str) -> str | None:
        missing = [text for text in self.words if text not in output]
        if code and not missing:
            return None
        return f"exit code {code}, not in the report: {missing}\n{output[-4000:]}"


class Cases(Job):
    def __init__(self, executable: Path, sanitizer: str, seeds: range, file: Path):
        command = [executable, str(seeds.start), str(len(seeds)), file]
        super().__init__(f"kernels on {file.stem}", sanitizer, f"{len(seeds)} on {file.stem}", command)
        self.kernels_seen: list[str] = []

    def fault(self, code: int, output: str) -> str | None:
        self.kernels_seen = [line.removeprefix("ran ") for line in output.splitlines() if line.startswith("ran ")]
        return super().fault(code, output) or (None if self.kernels_seen else "no kernel ran")

    def ran(self) -> list[str]:
        return self.kernels_seen


def cases(build: Path, full: bool) -> list[Job]:
    jobs: list[Job] = []
    for number, case in enumerate(FULL if full else SLICE):
        file = written(build, case)
        seeds = {"asan": range(8), "tsan": range(3 * number % 8, 3 * number % 8 + 3)} if full else {}
        for sanitizer in SANITIZERS:
            executable = build / f"{'run_cases' if full else 'run_slice'}_{sanitizer}"
            jobs.append(Cases(executable, sanitizer, seeds.get(sanitizer, range(2)), file))
    return jobs


def plants(build: Path) -> list[Job]:
    jobs: list[Job] = []
    for number, line in enumerate((HERE / "plants.cpp").read_text().splitlines(), 1):
        if mark := MARK.search(line):
            sanitizer, name, words = mark.groups()
            command, said = [build / f"plants_{sanitizer}", name], (words, f"plants.cpp:{number}")
            jobs.append(Plant("planted bugs", sanitizer, name, command, said))
    if len(jobs) < 20:
        raise SystemExit(f"only {len(jobs)} marks in plants.cpp")
    return jobs


def plants_of_product(build: Path) -> list[Job]:
    file = written(build, PLANTED)
    executables = {name: build / f"product_plants_{name}" for name in ("plain", "tsan")}
    jobs: list[Job] = [
        Job("chunk_bwd without a bug", x, "no bug", [path, "none", file]) for x, path in executables.items()
    ]
    for plant in product_plants.PLANTS:
        command = [executables[plant.build], plant.name, file]
        jobs.append(Plant("bugs in chunk_bwd", plant.build, plant.name, command, plant.found))
    return jobs


def written(build: Path, case: Case) -> Path:
    file = build / "cases" / f"{case.name}.case"
    file.parent.mkdir(exist_ok=True)
    case_files.write(file, case_files.entries(case))
    return file


def primitives(build: Path, seeds: list[int]) -> list[Job]:
    return [
        Job(
            "primitives",
            sanitizer,
            f"seed {seed}",
            [build / f"primitives_{sanitizer}", f"--seed={seed}", "--gtest_filter=-*Misuse*"],
        )
        for sanitizer in SANITIZERS
        for seed in seeds
    ]


def report(jobs: list[Job]) -> None:
    """Kernel x sanitizer x schedules."""
    schedules: dict[tuple[str, str], list[str]] = defaultdict(list)
    for job in jobs:
        for kernels in job.ran():
            schedules[kernels, NAMES[job.sanitizer]].append(job.schedules)
    print("\nwhat ran where: kernel x sanitizer x schedules")
    for (kernels, sanitizer), which in sorted(schedules.items()):
        print(f"  {kernels:<28} {sanitizer:<12} {', '.join(dict.fromkeys(which))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="where CMake put the executables of csrc/tests")
    parser.add_argument("--full", action="store_true", help="every kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    start = time.monotonic()
    jobs = plants(args.build) + plants_of_product(args.build)
    jobs += primitives(args.build, list(range(8)) if args.full else [1])
    jobs += cases(args.build, args.full)
    failures = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for job, fault in zip(jobs, pool.map(lambda job: job(), jobs), strict=True):
            if fault:
                failures += 1
                print(f"FAILED {job.kernels}, {NAMES[job.sanitizer]}, {job.schedules}: {fault}\n")
    report(jobs)
    print(f"{len(jobs)} processes, {failures} failed, {time.monotonic() - start:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
