"""fla's own KDA tests with this package in place of fla's kernels.

python -m kda_cuda.integrations.fla_tests DIR [pytest arguments]

DIR is a checkout of flash-linear-attention: its sdist has no ``tests/ops/test_kda.py``. The installed fla runs; DIR's
own is used if none is installed. It must be a version that :func:`kda_cuda.integrations.fla.register`
knows, and should be that of the tests. Needs pytest. The end says what was served, and what was declined and why:
declined calls ran in fla. Without a GPU every call is served by the PyTorch reference, on CPU tensors.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from . import fla

__all__ = ["main"]

TESTS = Path("tests") / "ops" / "test_kda.py"


class Served:
    """A pytest plugin that says at the end what ran where."""

    def pytest_terminal_summary(self, terminalreporter) -> None:
        terminalreporter.section("fla's functions on kda_cuda")
        for verdict, counts in fla.report().items():
            for what, count in sorted(counts.items()):
                terminalreporter.write_line(f"{verdict} {count:6} x {what}")


def main(arguments: list[str] | None = None) -> int:
    """Runs the tests; returns pytest's exit status, or 1 if all passed but not one call was served here."""
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0].startswith("-"):
        raise SystemExit("usage: python -m kda_cuda.integrations.fla_tests DIR [pytest arguments]")
    folder = Path(given[0]).resolve()
    if not (folder / TESTS).is_file():
        raise SystemExit(f"fla_tests: there is no {TESTS} in {folder}, expected a checkout of fla")
    import pytest

    if importlib.util.find_spec("fla") is None:
        sys.path.insert(0, str(folder))
    fla.register()
    os.chdir(folder)
    # importlib keeps DIR itself off the path, where its own fla would hide the installed one.
    status = pytest.main([str(TESTS), "--import-mode=importlib", *given[1:]], plugins=[Served()])
    if status == 0 and not fla.report()["served"]:
        print("fla_tests: no call was served by kda_cuda")
        return 1
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
