"""Runs what AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer must judge, and says what ran.

    sanitize.py BUILD_DIRECTORY

Planted bugs: each mark ``PLANT sanitizer name: words`` in plants.cpp must be found, with these words and its line.
Primitives: every program of csrc/tests/programs, under some schedules.
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

HERE = Path(__file__).parent
MARK = re.compile(r"// PLANT (\w+) (\w+): (.+)$")
TIMEOUT_SECONDS = 600
SANITIZERS = {"asan": "ASan + UBSan", "tsan": "TSan"}


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

    def __call__(self) -> str | None:
        return self.fault(*run(self.command))


class Plant(Job):
    def __init__(self, executable: Path, sanitizer: str, name: str, words: str, line: int):
        super().__init__(f"planted: {name}", sanitizer, "in order", [executable, name])
        self.words, self.place = words, f"plants.cpp:{line}"

    def fault(self, code: int, output: str) -> str | None:
        missing = [text for text in (self.words, self.place) if text not in output]
        if code and not missing:
            return None
        return f"exit code {code}, not in the report: {missing}\n{output[-4000:]}"


def plants(build: Path) -> list[Job]:
    jobs: list[Job] = []
    for number, line in enumerate((HERE / "plants.cpp").read_text().splitlines(), 1):
        if mark := MARK.search(line):
            sanitizer, name, words = mark.groups()
            jobs.append(Plant(build / f"plants_{sanitizer}", sanitizer, name, words, number))
    if len(jobs) < 20:
        raise SystemExit(f"only {len(jobs)} marks in plants.cpp")
    return jobs


def primitives(build: Path, seeds: list[int]) -> list[Job]:
    return [
        Job("primitives", sanitizer, f"seed {seed}", [build / f"primitives_{sanitizer}", f"--seed={seed}"])
        for sanitizer in SANITIZERS
        for seed in seeds
    ]


def report(jobs: list[Job]) -> None:
    """Kernel x sanitizer x schedules."""
    schedules: dict[tuple[str, str], list[str]] = defaultdict(list)
    for job in jobs:
        planted = job.kernels.startswith("planted")
        key = ("planted bugs, each found" if planted else job.kernels, SANITIZERS[job.sanitizer])
        schedules[key].append(job.kernels.removeprefix("planted: ") if planted else job.schedules)
    print("\nwhat ran where: kernel x sanitizer x schedules")
    for (kernels, sanitizer), which in sorted(schedules.items()):
        print(f"  {kernels:<28} {sanitizer:<12} {', '.join(dict.fromkeys(which))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="where CMake put the executables of csrc/tests")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    start = time.monotonic()
    jobs = plants(args.build) + primitives(args.build, [1])
    failures = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for job, fault in zip(jobs, pool.map(lambda job: job(), jobs), strict=True):
            if fault:
                failures += 1
                print(f"FAILED {job.kernels}, {SANITIZERS[job.sanitizer]}, {job.schedules}: {fault}\n")
    report(jobs)
    print(f"{len(jobs)} processes, {failures} failed, {time.monotonic() - start:.0f} s")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
