"""fla's own KDA tests with this package in place of fla's kernels.

python -m kda_cuda.integrations.fla_tests DIR [--context-parallel] [pytest arguments]

DIR is a checkout of flash-linear-attention: its sdist has no ``tests``. The installed fla runs; DIR's own is used if
none is installed. It must be a version that :func:`kda_cuda.integrations.fla.register` knows, and should be that of the
tests. Needs pytest. The end says what was served, and what was declined and why: declined calls ran in fla. Without a
GPU every call is served by the PyTorch reference, on CPU tensors.

``--context-parallel`` runs the tests of one sequence on several GPUs instead. Without a GPU a copy of that file runs,
in which gloo and the CPU stand for NCCL and the GPUs. It has one head, because fla's recurrence keeps every state.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from . import fla

__all__ = ["main"]

TESTS = Path("tests") / "ops" / "test_kda.py"
RANKS_TESTS = Path("tests") / "context_parallel" / "test_cp_kda.py"
RANKS_OPTION, REPORTS_VAR = "--context-parallel", "KDA_CUDA_FLA_REPORTS"
PRELUDE = "from kda_cuda.integrations import fla_tests as _kda_cuda\n\n_kda_cuda.enter_process()\n\n"
ON_CPUS = {
    'backend="nccl"': 'backend="gloo"',
    "torch.device(f'cuda:{rank}')": "torch.device('cpu')",
    "torch.cuda.set_device(rank)": "torch.set_num_threads(1)",
    "torch.cuda.device_count()": "8",
    "H=12, D=128": "H=1, D=128",
}


def enter_process() -> None:
    """What a test file of several ranks begins with, in each of its processes: registers, and reports at the end."""
    fla.register()
    atexit.register(_leave_report, Path(os.environ[REPORTS_VAR]))


def _leave_report(folder: Path) -> None:
    if folder.is_dir():  # it is gone when the process that runs pytest ends
        (folder / f"{os.getpid()}.json").write_text(json.dumps(fla.report()))


class Served:
    """A pytest plugin that says at the end what ran where, in this process and in those of ``reports``."""

    def __init__(self, reports: Path):
        self.reports = reports

    def counts(self) -> dict[str, Counter]:
        found = [fla.report(), *(json.loads(file.read_text()) for file in self.reports.glob("*.json"))]
        return {verdict: sum((Counter(x[verdict]) for x in found), Counter()) for verdict in ("served", "declined")}

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.section("fla's functions on kda_cuda")
        for verdict, counts in self.counts().items():
            for what, count in sorted(counts.items()):
                terminalreporter.write_line(f"{verdict} {count:6} x {what}")


def ranks_tests(folder: Path, to: Path, on_cpus: bool) -> Path:
    """A copy of the context-parallel tests whose processes register, with gloo and CPUs if asked for."""
    source = (folder / RANKS_TESTS).read_text()
    for text, instead in ON_CPUS.items() if on_cpus else ():
        if text not in source:
            raise SystemExit(f"fla_tests: {RANKS_TESTS} has no {text!r}, expected the file of fla 0.5 or 0.6")
        source = source.replace(text, instead)
    copy = to / RANKS_TESTS.name
    copy.write_text(PRELUDE + source)
    return copy


def main(arguments: list[str] | None = None) -> int:
    """Runs the tests; returns pytest's exit status, or 1 if all passed but not one call was served here."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    ranks = RANKS_OPTION in given
    given = [x for x in given if x != RANKS_OPTION]
    if not given or given[0].startswith("-"):
        raise SystemExit(f"usage: python -m kda_cuda.integrations.fla_tests DIR [{RANKS_OPTION}] [pytest arguments]")
    folder = Path(given[0]).resolve()
    tests = RANKS_TESTS if ranks else TESTS
    if not (folder / tests).is_file():
        raise SystemExit(f"fla_tests: there is no {tests} in {folder}, expected a checkout of fla")
    import pytest

    if importlib.util.find_spec("fla") is None:
        sys.path.insert(0, str(folder))
    fla.register()
    with tempfile.TemporaryDirectory() as temporary:
        # importlib keeps DIR itself off the path, where its own fla would hide the installed one. Processes of ranks
        # import the copy by its name, so its folder is on the path.
        file, mode = str(folder / tests), "importlib"
        if ranks:
            file, mode = str(ranks_tests(folder, Path(temporary), not torch.cuda.is_available())), "prepend"
            os.environ[REPORTS_VAR] = temporary
            os.environ["PYTHONPATH"] = os.pathsep.join(x for x in sys.path if x)
        os.chdir(folder if not ranks else temporary)
        served = Served(Path(temporary))
        status = pytest.main([file, f"--import-mode={mode}", f"--rootdir={folder}", *given[1:]], plugins=[served])
        if status == 0 and not served.counts()["served"]:
            print("fla_tests: no call was served by kda_cuda")
            return 1
        os.chdir(folder)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
