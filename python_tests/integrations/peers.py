"""Where the libraries are that tests put this package into: each in a folder of its own, on nobody else's path.

An installed fla changes what transformers does on the CPU, so no other test may see it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("KDA_CUDA_PEERS", ROOT / ".venv" / "peers"))


def documented(word: str) -> list[str]:
    """The Python blocks of docs/integrations.md that import ``word``."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "integrations.md").read_text(), re.M | re.S)
    return [block for block in blocks if f"import {word}" in block]


def environment_with(peers: tuple[str, ...]) -> dict[str, str]:
    """The environment of a process that can import these peers."""
    missing = [peer for peer in peers if not (FOLDER / peer).is_dir()]
    if missing:
        pytest.skip(f"no {', '.join(missing)} in {FOLDER}: make venv installs them")
    path = os.pathsep.join([str(ROOT), *(str(FOLDER / peer) for peer in peers), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def run_with(peers: tuple[str, ...], module: str, *arguments: str, **environment: str) -> dict:
    """What a program of this folder prints as JSON in its last line, with these peers to import."""
    environment = {**environment_with(peers), "OMP_NUM_THREADS": "2", **environment}
    command = [sys.executable, "-W", "ignore", "-m", f"python_tests.integrations.{module}", *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
