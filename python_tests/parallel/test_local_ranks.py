"""Context parallelism simulated in one process: routes, many ranks, the emulated kernels, misuse."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import kda_cuda
from kda_cuda import parallel, variants
from kda_cuda.context_parallel.routes import even_lengths, piece_of
from kda_cuda.parallel import local_cp_contexts, run_local

from ..support import cp_calls
from ..support.cp_calls import LEAVES, Division, check_near, of_rank, truth_of, whole_inputs

F64 = torch.float64


def contexts_of(division: Division, ranks: int) -> list[parallel.CPContext]:
    return local_cp_contexts(torch.tensor(division.cu_seqlens), ranks, layout=division.layout, tokens=division.tokens)


def run_all(division: Division, ranks: int, x: dict) -> tuple[list, list[dict], dict[str, torch.Tensor]]:
    """Contexts, o and final states of all ranks, and the gradients of the whole inputs."""
    contexts = contexts_of(division, ranks)
    x, do, dfinal = cp_calls.split_off(x)
    own = [of_rank(context, x | {"do": do, "dfinal": dfinal}) for context in contexts]
    upstream = [(part.pop("do"), part.pop("dfinal")) for part in own]
    calls = [kda_cuda.chunk_kda.bind(**part, cp_context=context) for part, context in zip(own, contexts, strict=True)]
    results = run_local(calls)
    outputs, gradients = [], []
    for context, (o, final), (do, dfinal) in zip(contexts, results, upstream, strict=True):
        own = zip(context.sequences, cp_calls.begins_and_ends(context), strict=True)
        ends = torch.tensor([end and n >= 0 for n, (_, end) in own])
        outputs += [o, final]
        gradients += [do, dfinal * ends[:, None, None, None]]
    leaves = {name: x[name] for name in LEAVES if x[name] is not None}
    found = torch.autograd.grad(outputs, list(leaves.values()), gradients)
    return contexts, results, {f"d{name}": d for name, d in zip(leaves, found, strict=True)}


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
def test_ranks_together_are_one(ranks, layout):
    division = Division((0, 37, 37, 150, 160), layout=layout)
    for gate in ("slow", "zero"):
        x = whole_inputs(division, gate, F64)
        truth = truth_of(division, x)
        contexts, results, gradients = run_all(division, ranks, x)
        for context, (o, _) in zip(contexts, results, strict=True):
            check_near("o", o.detach(), context.shard(truth["o"]), F64)
        for name, d in gradients.items():
            check_near(name, d, truth[name], F64)


def test_a_gradient_of_a_state_in_the_middle_reaches_the_ranks_before():
    division = Division((0, 90))
    x, _, _ = cp_calls.split_off(whole_inputs(division, "slow", F64))
    first = {name: y[:, :60] if name in cp_calls.STREAMS else y for name, y in x.items()}
    _, expected = kda_cuda.chunk_kda(**first)
    contexts = contexts_of(division, 3)
    own = [of_rank(context, x | {"do": x["v"], "dfinal": expected}) for context in contexts]
    calls = [
        kda_cuda.chunk_kda.bind(**{n: y for n, y in part.items() if n not in ("do", "dfinal")}, cp_context=context)
        for part, context in zip(own, contexts, strict=True)
    ]
    state = run_local(calls)[1][1]
    check_near("final", state.detach(), expected.detach(), F64)
    leaves = [x[name] for name in ("q", "k", "v", "g", "beta", "initial_state")]
    weight = cp_calls.Draw("weight").normal(*state.shape)
    got, truths = (torch.autograd.grad(y, leaves, weight, allow_unused=True) for y in (state, expected))
    for d, truth in zip(got, truths, strict=True):
        check_near("d", d, truth, F64)


@pytest.mark.devices("cpu", "emulator", "cuda")
def test_four_ranks_on_the_kernels(device):
    """bf16: o and every gradient within its cap, and the same bits in a second run."""
    division, streams = Division((0, 30, 170), (40, 0, 65, 65)), cp_calls.STREAMS
    x = whole_inputs(division, "slow", torch.bfloat16, sizes=(1, 1, 16, 16))
    options = {"use_qk_l2norm_in_kernel": True}

    def run() -> list[torch.Tensor]:
        contexts = local_cp_contexts(torch.tensor(division.cu_seqlens, device=device), 4, tokens=division.tokens)
        leaves = {name: x[name].to(device).requires_grad_() for name in streams}
        shards = [{name: context.shard(y) for name, y in leaves.items()} for context in contexts]
        calls = [
            kda_cuda.chunk_kda.bind(**shard, **options, cp_context=context)
            for shard, context in zip(shards, contexts, strict=True)
        ]
        o = torch.cat([o for o, _ in run_local(calls)], 1)
        return [o.detach(), *torch.autograd.grad(o, list(leaves.values()), x["do"].to(device))]

    results, kernels = device.run(run)
    assert ("chunk_bwd_keys" in kernels) == device.runs_kernels
    before = variants.set_emulating(False)  # the emulated kernels take no float64
    leaves = {name: x[name].double().requires_grad_() for name in streams}
    o, _ = kda_cuda.chunk_kda(**leaves, **options, cu_seqlens=torch.tensor(division.cu_seqlens))
    truth = [o.detach(), *torch.autograd.grad(o, list(leaves.values()), x["do"].double())]
    variants.set_emulating(before)
    for name, got, expected in zip(("o", *(f"d{name}" for name in streams)), results, truth, strict=True):
        check_near(name, got.cpu(), expected, torch.bfloat16)
    assert all(torch.equal(got, again) for got, again in zip(results, run(), strict=True))


def test_every_token_and_sequence_has_its_place():
    """Random divisions: the pieces of a sequence follow one another, and no sequence is left out."""
    rng = random.Random(0)
    for _ in range(300):
        bounds = sorted([0, *(rng.choice([0, 3, rng.randrange(20)]) for _ in range(rng.randrange(1, 6)))])
        total, slots = bounds[-1], rng.randrange(1, 7)
        cuts = sorted(rng.randrange(total + 1) for _ in range(slots - 1))
        starts = [0, *cuts, total]
        pieces = [piece_of(bounds, starts, slot) for slot in range(slots)]
        lengths, ends = dict.fromkeys(range(len(bounds) - 1), 0), {}
        for slot, piece in enumerate(pieces):
            assert piece.bounds[0] == 0 and piece.bounds[-1] == starts[slot + 1] - starts[slot]
            assert len(piece.sequences) == len(piece.bounds) - 1
            for i, (n, (begin, end)) in enumerate(zip(piece.sequences, itertools.pairwise(piece.bounds), strict=True)):
                if n < 0:
                    assert piece.sequences == [-1]
                    continue
                before = piece.before if i == 0 else 0
                assert (lengths[n] > 0) == (before > 0), "it begins here, or tokens came before"
                if before:
                    assert piece.past == lengths[n] and slot - before == ends[n][0]
                lengths[n] += end - begin
                ends[n] = (ends[n][0] if n in ends else slot, slot, piece.after if i == len(piece.sequences) - 1 else 0)
        assert list(lengths.values()) == [b - a for a, b in itertools.pairwise(bounds)]
        for _, last, after in ends.values():
            assert after == 0, f"slot {last} says that a sequence goes on, and no slot has more of it"
    assert even_lengths(7, 3) == [3, 2, 2]


def test_misuse():
    cuts, x = torch.tensor([0, 10]), torch.zeros(1, 5, 1, 4)
    contexts = local_cp_contexts(cuts, 2)
    calls = [kda_cuda.chunk_kda.bind(x, x, x, x, x[..., 0], cp_context=context) for context in contexts]
    plain = kda_cuda.chunk_kda.bind(x, x, x, x, x[..., 0])
    states = {"return_intermediate_states": True}
    bad = [
        (lambda: local_cp_contexts(cuts, 0), ValueError, "local_cp_contexts: world_size is 0, expected >= 1"),
        (
            lambda: local_cp_contexts(cuts, 2, tokens=[10]),
            ValueError,
            "local_cp_contexts: tokens has 1 elements, expected world_size=2",
        ),
        (
            lambda: local_cp_contexts(cuts, 2, tokens=[10, 1]),
            ValueError,
            "local_cp_contexts: tokens is [10, 1] on the ranks, together 11, expected cu_seqlens[-1]=10",
        ),
        (
            lambda: run_local([plain]),
            ValueError,
            "run_local: ranks are not calls with a context of local_cp_contexts, expected chunk_kda.bind(...) of it",
        ),
        (lambda: run_local(calls[:1]), ValueError, "run_local: ranks are [0], expected all of [0, 1] in order"),
        (
            lambda: kda_cuda.chunk_kda(x, x, x, x, x[..., 0], cp_context=contexts[0]),
            ValueError,
            "chunk_kda: cp_context is one of local_cp_contexts, expected the calls of all ranks in kda_cuda.parallel."
            "run_local",
        ),
        (
            lambda: kda_cuda.chunk_kda(x, x, x, x, x[..., 0], cp_context=contexts[0], **states),
            ValueError,
            "chunk_kda: return_intermediate_states is True with a cp_context, expected False",
        ),
        (
            lambda: kda_cuda.chunk_kda(x, x, x, x, x[..., 0], cp_context=7),
            TypeError,
            "chunk_kda: cp_context is a int without",
        ),
        (
            lambda: parallel.exchange_conv_tails(x[:, :, 0], contexts[0], 4),
            ValueError,
            "exchange_conv_tails: cp_context is one of local_cp_contexts, expected one of build_cp_context",
        ),
        (
            lambda: parallel.exchange_conv_tails(x[:, :, 0], contexts[0]),
            TypeError,
            "exchange_conv_tails: kernel_size is None (NoneType), expected an int",
        ),
        (
            lambda: parallel.gather_tokens(x[0], contexts[0]),
            ValueError,
            "gather_tokens: x has shape [5, 1, 4], expected [1, T=5",
        ),
    ]
    for call, kind, message in bad:
        with pytest.raises(kind) as error:
            call()
        assert str(error.value).startswith(f"kda_cuda::{message}"), str(error.value)


def test_explain_tells_of_the_local_call():
    x, context = torch.zeros(1, 5, 1, 4), local_cp_contexts(torch.tensor([0, 10]), 2)[0]
    assert kda_cuda.explain(x, x, x, x, x[..., 0], cp_context=context).forward.op == "chunk_fwd"
