"""FSDP2, DDP, slices of heads and distributed checkpoints: two ranks on the CPU, started once for all checks."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

from kda_cuda import parallel
from kda_cuda.layers import KimiDeltaAttention

from ..support.distributed_checks import CHECKS, RANKS, run_rank

TIMEOUT = 120  # seconds; all of it takes about ten


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    """Name of the check -> what went wrong on some rank. They meet through a file: no port to be taken."""
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not available")
    folder, end = tmp_path_factory.mktemp("ranks"), time.monotonic() + TIMEOUT
    context = torch.multiprocessing.start_processes(run_rank, (str(folder),), RANKS, join=False, start_method="spawn")
    try:
        while not context.join(max(0.1, end - time.monotonic())):
            assert time.monotonic() < end, f"the ranks did not end within {TIMEOUT} s"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return json.loads((folder / "rank0.json").read_text())


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(name, failures):
    assert name not in failures, failures[name]


def test_a_layer_is_not_sharded_by_itself():
    with pytest.raises(ValueError) as error:
        parallel.shard(KimiDeltaAttention(8, 1, 8))
    assert str(error.value) == "kda_cuda::shard: model is a KimiDeltaAttention, expected a module that contains it"


def test_bad_slices():
    layer = KimiDeltaAttention(8, 4, 8)
    calls = [
        ((nn.Linear(2, 2), 0, 1), TypeError,
         "layer is a Linear, expected a KimiDeltaAttention or NoPEMultiLatentAttention"),
        ((layer, 0, 3), ValueError, "ranks is 3, expected a divisor of the 4 heads"),
        ((layer, 2, 2), ValueError, "rank is 2, expected 0 <= rank < 2"),
        ((layer, 0.0, 2), TypeError, "rank is 0.0 (float), expected an int"),
    ]  # fmt: skip
    for arguments, kind, message in calls:
        with pytest.raises(kind) as error:
            parallel.head_slice(*arguments)
        assert str(error.value) == f"kda_cuda::head_slice: {message}"
