"""FSDP2, DDP, slices of heads and distributed checkpoints: two ranks on the CPU, started once for all checks."""

from __future__ import annotations

import json

import pytest
from torch import nn

from kda_cuda import parallel
from kda_cuda.layers import KimiDeltaAttention

from ..support.distributed_checks import CHECKS, RANKS, run_rank
from ..support.ranks import run_ranks

TIMEOUT = 120  # seconds; all of it takes about ten


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> dict[str, str]:
    """Name of the check -> what went wrong on some rank."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, RANKS, folder, TIMEOUT)
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
