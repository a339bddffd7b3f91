"""Decoding inside a CUDA graph: captured once, replayed with other inputs, slots, lengths and counts."""

from __future__ import annotations

import pytest
import torch

import kda_cuda
from kda_cuda import DraftRecords

from ..decode_layer.test_decode_layer import arguments
from ..ops.test_graphs import capture, no_synchronisation
from ..support import decode_calls
from ..support.cases import Case
from .test_decode import initial, laid_out

pytestmark = pytest.mark.gpu
BF16, FP32 = torch.bfloat16, torch.float32
MODEL = {"gate": "long", "beta_sigmoid": True, "dtype": BF16}


def captured(call) -> torch.cuda.CUDAGraph:
    """``call``, which must allocate nothing and never synchronise."""

    def alone():
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        with no_synchronisation():
            call()
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before

    return capture(alone)[0]


def test_replay_with_other_contents():
    """Inputs, slots and lengths change between replays; every replay is what an eager call would have done."""
    cases = [Case(f"graph {i}", 12, lengths=lengths, **MODEL) for i, lengths in
             enumerate([(4, 4, 4), (1, 0, 11), (12, 0, 0), (3, 3, 6)])]  # fmt: skip
    ends = (12, 12, 7, 4)  # in the last two, the tokens from there on are padding
    x = cases[0].inputs("cuda")
    x, pool = laid_out(x, initial(cases[0], x, rows=9), True, FP32)
    slots, out = torch.tensor([0, 1, 2], device="cuda", dtype=torch.int32), torch.empty_like(x.v)
    start = pool.clone()
    graph = captured(lambda: decode_calls.decode(x, pool, slot_of=slots, out=out))
    for case, end, indices in zip(cases, ends, ([0, 1, 2], [8, -1, 3], [5, 4, 7], [2, 6, 100]), strict=True):
        new = case.inputs("cuda").replace(state_v_first=True)
        new = new.replace(cu_seqlens=new.cu_seqlens.clamp(max=end))
        for name, tensor in decode_calls.streams(x).items():
            tensor.copy_(decode_calls.streams(new)[name])
        x.cu_seqlens.copy_(new.cu_seqlens)
        slots.copy_(torch.tensor(indices))
        pool.copy_(start)
        out.fill_(7)
        graph.replay()
        expected, want = start.clone(), torch.full_like(out, 7)
        decode_calls.decode(new.replace(A_log=x.A_log, dt_bias=x.dt_bias), expected, slot_of=slots, out=want)
        assert torch.equal(out, want) and torch.equal(pool, expected) and not out[:, end:].any()


def test_replay_of_verification():
    """Drafts, records and acceptance in one graph, with other counts every time."""
    case = Case("graph verify", 4, batch=3, **MODEL)
    x = case.inputs("cuda")
    x, state = laid_out(x, initial(case, x), True, FP32)
    start, out, records = state.clone(), torch.empty_like(x.v), DraftRecords.empty(x.k, x.v)
    accepted = torch.tensor([4, 4, 4], device="cuda")

    def step():
        decode_calls.decode(x, state, records=records, out=out)
        kda_cuda.commit(records, accepted, state, state_v_first=True)

    graph = captured(step)
    for counts in ([0, 1, 2], [3, 4, 0], [4, 4, 4]):
        state.copy_(start)
        accepted.copy_(torch.tensor(counts))
        graph.replay()
        for n, count in enumerate(counts):
            alone = start.clone()
            decode_calls.decode(x, alone, tokens=slice(0, count))
            assert torch.equal(state[n], alone[n])


def test_replay_of_a_layer():
    x = arguments("cuda", BF16, batch=3, slots=5)
    slots, out = torch.tensor([0, 1, 2], device="cuda"), torch.empty_like(x["v"])
    conv, state = x["conv_state"].clone(), x["state"].clone()
    graph = captured(lambda: kda_cuda.decode_layer(**x, slot_of=slots, out=out))
    for indices in ([0, 1, 2], [4, -1, 1]):
        x["conv_state"].copy_(conv), x["state"].copy_(state)
        slots.copy_(torch.tensor(indices))
        graph.replay()
        other = x | {"conv_state": conv.clone(), "state": state.clone()}
        assert torch.equal(out, kda_cuda.decode_layer(**other, slot_of=slots))
        assert torch.equal(x["state"], other["state"]) and torch.equal(x["conv_state"], other["conv_state"])
