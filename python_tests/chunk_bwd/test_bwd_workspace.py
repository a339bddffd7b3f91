"""What the backward takes beside its gradients, and where it keeps what does not lie in its workspace: W in the memory
of dk, L in that of dq (csrc/kda/chunk_bwd/cell.h), or in scratch."""

from __future__ import annotations

import pytest
import torch

import kda_cuda
from kda_cuda.plans import ChunkShape

from ..support.accuracy import GRADIENTS
from ..support.bwd_calls import NAMESPACES, TOKEN_GRADIENTS, check, mask, raw_gradients
from ..support.cases import Case, longer

pytestmark = [pytest.mark.usefixtures("poisoned_memory", "chunk_bwd"), pytest.mark.devices("emulator", "cuda")]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MODEL = {"gate": "long", "beta_sigmoid": True}


def plan(device, wanted=GRADIENTS, **shape) -> dict[str, str]:
    sizes = {
        "dtype": BF16,
        "batch": 1,
        "tokens": 8192,
        "sequences": None,
        "heads": 16,
        "value_heads": 16,
        "key_dim": 128,
        "value_dim": 128,
    } | shape
    return ChunkShape(**sizes, device=torch.device(str(device))).backward_plan(NAMESPACES[device.name], mask(wanted))


# ---- how much --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequences", [None, 1, 2])
def test_sixteen_heads_take_one_round(sequences, device):
    shape = {"tokens": 8192, "value_heads": 16, "key_dim": 128, "value_dim": 128, "dtype": BF16}
    size = kda_cuda.workspace_size(**shape, sequences=sequences, device=str(device), backward=True)
    told = plan(device, sequences=sequences)
    assert told["rounds"] == "1" and int(told["workspace_bytes"]) == size
    assert size <= 2048 * 8192 * 16


@pytest.mark.parametrize(("tokens", "rounds"), [(1 << 18, 1), (1 << 20, 2), (1 << 22, 8)])
def test_a_long_sequence_leaves_room(tokens, rounds, device):
    """A device of 128 GiB: 2 KiB for every token of 32 heads is 64 GiB at a million tokens."""
    shape = {"tokens": tokens, "value_heads": 32, "heads": 32}
    told, memory = plan(device, **shape), 128 << 30
    if device.name == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    assert int(told["workspace_bytes"]) <= memory / 4
    if device.name == "emulator":
        assert int(told["rounds"]) == rounds


ROWS = 8192 * 16
SCRATCH = (
    # wanted, what differs from K = 128 in ungrouped heads, bytes for a token of a value head
    (GRADIENTS, {}, 0),
    (TOKEN_GRADIENTS, {}, 0),
    (("dk", "dv"), {}, 2 * 64),  # L
    (("dq", "dv"), {}, 2 * 128),  # W
    (("dg",), {}, 2 * (128 + 128 + 64)),  # dX, W, L
    (("dv",), {}, 2 * (128 + 64)),
    (("dinitial_state",), {}, 2 * 128),
    ((), {}, 0),
    (GRADIENTS, {"key_dim": 24}, 2 * 64),
    (GRADIENTS, {"key_dim": 24, "heads": 8}, 8 * 24 + 2 * 64),  # dq and dk in fp32
    (GRADIENTS, {"key_dim": 32, "heads": 8}, 8 * 32),
    (("dq", "dv"), {"heads": 8}, 4 * 128 + 2 * 128),
    (GRADIENTS, {"dtype": FP32, "key_dim": 24}, 4 * 32),  # chunks of 32 tokens
    (GRADIENTS, {"dtype": FP32, "key_dim": 32}, 0),
)


@pytest.mark.parametrize(("wanted", "shape", "expected"), SCRATCH)
def test_scratch(wanted, shape, expected, device):
    assert int(plan(device, wanted, **shape)["scratch_bytes"]) == expected * ROWS


# ---- where -----------------------------------------------------------------------------------------------------------

# Rows of dq too short for L; of fp32 long enough, with W in pieces of 16 bytes or not; rows that are no pieces at all.
PLACES = [
    Case(
        f"places {dtype} {key_dim} {value_heads}".replace("torch.", ""),
        150,
        heads=1,
        value_heads=value_heads,
        key_dim=key_dim,
        value_dim=72,
        initial_state=True,
        dtype=dtype,
        **MODEL,
    )
    for dtype, key_dim, value_heads in (
        (BF16, 24, 1),
        (BF16, 24, 2),
        (BF16, 36, 2),
        (BF16, 40, 2),
        (BF16, 33, 2),
        (BF16, 71, 1),
        (FP16, 100, 1),
        (FP32, 24, 1),
        (FP32, 24, 2),
        (FP32, 35, 1),
        (FP32, 130, 2),
    )
]
PACKED = Case(
    "places packed",
    149,
    lengths=(0, 70, 0, 65, 1, 13, 0),
    heads=2,
    key_dim=24,
    value_dim=40,
    initial_state=True,
    dtype=BF16,
    **MODEL,
)
PARTS = [("dv",), ("dbeta",), ("dinitial_state",), ("dq", "dv"), ("dk", "dbeta"), ("dg",), ("dA_log",), ("dq", "dk")]


@pytest.mark.parametrize("case", PLACES, ids=str)
def test_gradients_wherever_the_rest_lies(case, device):
    """All of them are right; a part of them, for which scratch holds what dq and dk would, has the same bits."""
    x = case.inputs(device)
    every = raw_gradients(x, device)
    check(case, {name: d for name, d in every.items() if d.numel()})
    for wanted in PARTS:
        some = raw_gradients(x, device, wanted)
        for name in set(wanted) & {name for name, d in every.items() if d.numel()}:
            assert torch.equal(some[name], every[name]), (wanted, name)


@pytest.mark.parametrize("heads", [{}, {"heads": 1, "value_heads": 3}], ids=["", "grouped"])
@pytest.mark.parametrize("key_dim", [24, 64, 128])
def test_packed_sequences_and_tokens_of_none(key_dim, heads, device):
    """Of tokens behind the last sequence the gradients are zero, and those of all others keep their bits."""
    x = Case(**{**vars(PACKED), "key_dim": key_dim, **heads}).inputs(device)
    owned, every = x.q.shape[1], raw_gradients(x, device)
    for wanted in (GRADIENTS, *PARTS):
        found = raw_gradients(longer(x, 75), device, wanted)
        for name in wanted:
            d = found[name]
            if name in TOKEN_GRADIENTS:
                assert not d[:, owned:].any(), (wanted, name)
                d = d[:, :owned]
            assert torch.equal(d, every[name]), (wanted, name)
