"""Starts the processes of a test on several ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def run_ranks(run_rank: Callable[..., None], ranks: int, folder: Path, seconds: int, *arguments: object) -> None:
    """``run_rank(rank, folder, *arguments)`` in a process for each rank. They meet through a file in ``folder``, so no
    port is taken. Whoever is still there after ``seconds`` is ended, and the test fails."""
    if not torch.distributed.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    end = time.monotonic() + seconds
    given = (str(folder), *arguments)
    context = torch.multiprocessing.start_processes(run_rank, given, ranks, join=False, start_method="spawn")
    try:
        while not context.join(max(0.1, end - time.monotonic())):
            assert time.monotonic() < end, f"the ranks did not end within {seconds} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
