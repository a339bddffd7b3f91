"""Context parallelism over gloo: four ranks on the CPU, started once for all checks, and groups of two to four."""

from __future__ import annotations

import json
import time

import pytest
import torch

from ..support.cp_checks import CHECKS, RANKS, run_rank

TIMEOUT = 240  # seconds; all of it takes about thirty


@pytest.fixture(scope="module")
def results(tmp_path_factory, request) -> list[dict]:
    """What passed and what failed, of each rank that lives on. They meet through a file: no port to be taken."""
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not available")
    folder, end = tmp_path_factory.mktemp("ranks"), time.monotonic() + TIMEOUT
    arguments = (str(folder), not request.config.getoption("--no-emulator"))
    context = torch.multiprocessing.start_processes(run_rank, arguments, RANKS, join=False, start_method="spawn")
    try:
        while not context.join(max(0.1, end - time.monotonic())):
            assert time.monotonic() < end, f"the ranks did not end within {TIMEOUT} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    files = [folder / f"rank{rank}.json" for rank in range(RANKS)]
    return [json.loads(file.read_text()) for file in files if file.exists()]


@pytest.mark.parametrize("name", [*CHECKS, "a_rank_that_dies"])
def test_ranks(name, results, request):
    if "emulated" in name and request.config.getoption("--no-emulator"):
        pytest.skip("--no-emulator")
    # A check that fails on one rank ends the others with errors of their own: the first other one says why.
    failures = [own["failures"][name] for own in results if name in own["failures"]]
    assert not failures, min(failures, key=lambda text: "Connection closed" in text)
    assert all(name in own["passed"] for own in results[: RANKS - 1]), "not run: a check before it failed"
