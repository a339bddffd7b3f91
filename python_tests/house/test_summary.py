"""The summary of a run says what ran where, also when workers ran the tests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHOSEN = ["python_tests/kda_gate/test_kda_gate.py", "-k", "steep_values or no_tokens"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_ran_where(workers):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers, *CHOSEN]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    summary = done.stdout[done.stdout.index("what ran where") :]
    assert re.search(r"^ +cpu: [1-9][0-9]* passed$", summary, re.M), summary
    assert re.search(r"^ +emulator: [1-9][0-9]* passed; kernels .*kda_gate_fwd x[1-9]", summary, re.M), summary
