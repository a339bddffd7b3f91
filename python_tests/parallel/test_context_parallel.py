"""Context parallelism over gloo: four ranks on the CPU, started once for all checks, and groups of two to four."""

from __future__ import annotations

import json

import pytest

from ..support.cp_checks import CHECKS, RANKS, run_rank
from ..support.ranks import run_ranks

TIMEOUT = 240  # seconds; all of it takes about thirty


@pytest.fixture(scope="module")
def results(tmp_path_factory, request) -> list[dict]:
    """What passed and what failed, of each rank that lives on."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, RANKS, folder, TIMEOUT, not request.config.getoption("--no-emulator"))
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
