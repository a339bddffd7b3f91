"""``deterministic="batch_invariant"``: the bits of a sequence do not depend on what it is batched with."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import kda_cuda
from kda_cuda import variants

from ..prefill.test_prefill import BATCH, MODEL, RAGGED, SEQUENCES, streams_of
from ..support.cases import CASES, Case, Inputs
from .test_chunk_fwd import INVARIANT

LONG = Case("long", 200, heads=2, value_heads=4, key_dim=128, value_dim=128, initial_state=True, dtype=torch.bfloat16,
            **MODEL)  # fmt: skip


def run(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    with torch.inference_mode():
        return kda_cuda.chunk_kda(**x.public(), return_intermediate_states=True, **INVARIANT)


def section(x: Inputs, begin: int, end: int, n: int) -> Inputs:
    streams = {name: getattr(x, name)[:, begin:end] for name in ("q", "k", "v", "g", "beta")}
    initial = None if x.initial_state is None else x.initial_state[n : n + 1]
    return x.replace(**streams, initial_state=initial, cu_seqlens=None)


@pytest.mark.parametrize("case", [SEQUENCES, RAGGED, CASES["varlen"], CASES["varlen_ones"]], ids=str)
def test_packed_sequences_are_as_each_alone(case, device):
    x = case.inputs(device)
    o, final_state, h = run(x)
    row = 0
    for n, (begin, end) in enumerate(itertools.pairwise(x.sequence_bounds())):
        o_n, final_n, h_n = run(section(x, begin, end, n))
        rows = h_n.shape[1]
        assert torch.equal(o[:, begin:end], o_n) and torch.equal(final_state[n : n + 1], final_n)
        assert torch.equal(h[:, row : row + rows], h_n)
        row += rows
    assert row == h.shape[1]


@pytest.mark.parametrize("case", [BATCH, LONG], ids=str)
def test_the_position_in_a_batch_changes_no_bit(case, device):
    x = case.inputs(device)
    if x.q.shape[0] == 1:  # at the end of a batch of others
        x = x.replace(**{name: torch.cat([getattr(x, name).flip(1), getattr(x, name)]) for name in
                         ("q", "k", "v", "g", "beta")}, initial_state=x.initial_state.repeat(2, 1, 1, 1))  # fmt: skip
    o, final_state, h = run(x)
    for n in range(x.q.shape[0]):
        rows = {name: getattr(x, name)[n : n + 1] for name in ("q", "k", "v", "g", "beta")}
        alone = run(x.replace(**rows, initial_state=x.initial_state[n : n + 1]))
        for together, by_itself in zip((o, final_state, h), alone, strict=True):
            assert torch.equal(together[n : n + 1], by_itself)


def test_neighbours_change_no_bit(device):
    """The same sequence among short, long and empty ones, in a pool."""
    x = LONG.inputs(device)
    results = []
    for before, after in ((0, 0), (1, 0), (64, 300), (130, 7)):

        def among(y: Tensor, before: int = before, after: int = after) -> Tensor:
            other = torch.roll(y, 1, 2).repeat(1, 2, *[1] * (y.dim() - 2))
            return torch.cat([other[:, :before], y, other[:, :after]], 1)

        streams = {name: among(getattr(x, name)) for name in ("q", "k", "v", "g", "beta")}
        bounds = torch.tensor([0, before, before, before + 200, before + 200 + after], device=x.q.device)
        pool = x.initial_state.repeat(4, 1, 1, 1)
        o = kda_cuda.prefill(**streams_of(x.replace(**streams, cu_seqlens=bounds)), state_pool=pool, **INVARIANT)
        results.append((o[:, before : before + 200], pool[2]))
    for o, state in results[1:]:
        assert torch.equal(o, results[0][0]) and torch.equal(state, results[0][1])


def test_the_flag_reaches_the_op(device, monkeypatch):
    x = SEQUENCES.inputs(device)
    seen = []
    original = variants.op_in

    def spy(namespace, op):
        def call(*arguments):
            seen.append((op, arguments[-1]))
            return original(namespace, op)(*arguments)

        return call

    monkeypatch.setattr(variants, "op_in", spy)
    for deterministic in (True, "batch_invariant"):
        kda_cuda.chunk_kda(**x.public(), deterministic=deterministic)
        kda_cuda.prefill(**streams_of(x), state_pool=x.initial_state.clone(), deterministic=deterministic)
    assert seen == [("chunk_fwd", False), ("prefill", False), ("chunk_fwd", True), ("prefill", True)]


def test_gradients_with_the_flag():
    x = CASES["tail_of_one"].inputs(dtype=torch.float32)
    leaves = {name: y.clone().requires_grad_() for name, y in x.differentiable().items()}
    results = []
    for options in ({}, INVARIANT):
        o, _ = kda_cuda.chunk_kda(**x.replace(**leaves).public(), **options)
        results.append((o.detach(), *torch.autograd.grad((o * x.do).sum(), list(leaves.values()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
