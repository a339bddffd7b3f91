"""Draft trees: every path from the root is, bit for bit, what it is alone; a commit takes one path."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

import kda_cuda
from kda_cuda import DraftRecords, testing

from ..support import accuracy, decode_calls
from ..support.cases import Case, Inputs
from .test_decode import BF16, FP16, FP32, Pool, initial, laid_out
from .test_decode_verify import RTOL, verify

MODEL = {"gate": "long", "beta_sigmoid": True, "dtype": BF16}
DRAFTS = 11
# A path longer than what is in shared memory at once, a wide level, two roots, and branches at every depth.
TREES = (
    (-1, 0, 1, 2, 3, 4, 2, 6, 0, 8, 8),
    (-1, 0, 0, 0, 1, 1, 2, 4, 4, 7, 7),
    (-1, -1, 0, 1, 0, 1, 5, 6, 7, 8, 9),
    (-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
)


def random_tree(tokens: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(-1, t) if t else -1 for t in range(tokens)]


def path_to(tree: tuple[int, ...] | list[int], token: int) -> list[int]:
    path = []
    while token >= 0:
        path.append(token)
        token = tree[token]
    return path[::-1]


def leaves(tree: tuple[int, ...] | list[int]) -> list[int]:
    return [t for t in range(len(tree)) if t not in tree]


def tensor(x: Inputs, values, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, device=x.q.device, dtype=dtype)


def only(x: Inputs, row: int, tokens: list[int]) -> Inputs:
    """The sequence of these tokens of a batch row."""
    streams = {name: y[row : row + 1, tokens] for name, y in decode_calls.streams(x).items()}
    return x.replace(cu_seqlens=None, **streams)


def check_same(got: Tensor, want: Tensor, device, what: str = "") -> None:
    """Bit for bit where kernels run. Torch's products on the CPU have other bits for other numbers of sequences."""
    if device.runs_kernels:
        assert torch.equal(got, want), what
    else:
        rms = accuracy.measure(got, want.double()).rms
        assert rms <= RTOL[got.dtype], f"{what}: {rms}"


def check_paths(x: Inputs, state: Tensor, tree, n: int, results: list[Tensor], device, begin: int = 0) -> None:
    """``results``: o and the records, whose row holds the tokens of sequence n from ``begin`` on."""
    row = n if x.cu_seqlens is None else 0
    for leaf in leaves(tree):
        path = [begin + t for t in path_to(tree, leaf)]
        alone = only(x, row, path)
        o, records = verify(alone, state[n : n + 1].clone())
        for name, got, want in zip("okug", results, (o, *records), strict=True):
            check_same(got[row, path], want[0], device, f"{name} of sequence {n} on the path to {leaf}")


@pytest.mark.parametrize("dims", [(64, 64), (128, 40), (60, 36)], ids=str)
@pytest.mark.parametrize("v_first", [True, False], ids=["v_first", "k_first"])
@pytest.mark.parametrize("state_dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def test_every_path_is_a_chain(state_dtype, v_first, dims, device):
    """Outputs and records bit for bit in every dtype; committed states as those of one call with the path alone."""
    case = Case(
        f"tree {dims}", DRAFTS, batch=len(TREES), heads=1, value_heads=2, key_dim=dims[0], value_dim=dims[1], **MODEL
    )
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), v_first, state_dtype)
    before, parents = state.clone(), tensor(x, TREES, torch.int32)
    (o, records), kernels = device.run(lambda: verify(x, state, parent_token=parents))
    assert torch.equal(state, before) and kernels == (["decode_tree"] if device.runs_kernels else [])
    for n, tree in enumerate(TREES):
        check_paths(x, state, tree, n, [o, *records], device)
    for accepted in ([5, 9, 10, 3], [-1, 0, 4, 10]):
        after, expected = state.clone(), state.clone()
        call = {"parent_token": parents, "accepted_token": tensor(x, accepted), "state_v_first": v_first}
        _, kernels = device.run(lambda s=after, c=call: kda_cuda.commit(records, None, s, **c))
        assert kernels == (["decode_commit_tree"] if device.runs_kernels else [])
        for n, last in enumerate(accepted):
            if last >= 0:
                decode_calls.decode(only(x, n, path_to(TREES[n], last)), expected[n : n + 1])
        check_same(after, expected, device)


def test_commits_are_single_steps(device):
    """In fp32 the bits of one call for every token of the path, one after the other."""
    case = Case("tree steps", DRAFTS, batch=len(TREES), heads=1, key_dim=128, value_dim=64, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    parents, accepted = tensor(x, TREES), [7, 9, 10, 10]
    o, records = verify(x, state, parent_token=parents)
    stepped = state.clone()
    for n, last in enumerate(accepted):
        for t in path_to(TREES[n], last):
            one = decode_calls.decode(only(x, n, [t]), stepped[n : n + 1])
            check_same(o[n, t], one[0, 0], device)
    kda_cuda.commit(records, None, state, parent_token=parents, accepted_token=tensor(x, accepted), state_v_first=True)
    check_same(state, stepped, device)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_chain_is_the_special_case(dtype, device):
    case = Case("tree chain", 9, batch=2, heads=2, key_dim=128, value_dim=128, gate="long", dtype=dtype)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    parents = torch.arange(-1, 8, device=device).expand(2, 9)
    o, records = verify(x, state)
    tree_o, tree_records = verify(x, state, parent_token=parents)
    assert all(torch.equal(a, b) for a, b in zip((o, *records), (tree_o, *tree_records), strict=True))
    chain, tree, options = state.clone(), state.clone(), {"state_v_first": True}
    kda_cuda.commit(records, tensor(x, [3, 9]), chain, **options)
    accepted = tensor(x, [2, 8], torch.int32)
    kda_cuda.commit(records, None, tree, parent_token=parents, accepted_token=accepted, **options)
    assert torch.equal(chain, tree) and not torch.equal(chain, state)


def test_a_large_tree(device):
    """More tokens than lanes: the only child of a token may be far behind it."""
    tokens = 70
    far = [-1, *random_tree(tokens - 1, 5)]
    far[69], far[68] = 1, 0
    case = Case("large tree", tokens, batch=2, heads=1, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    trees = [far, [-1] * 68 + [0, 1]]
    o, records = verify(x, state, parent_token=tensor(x, trees))
    for n, tree in enumerate(trees):
        check_paths(x, state, tree, n, [o, *records], device)


def test_in_a_pool(device):
    """Ragged trees, an empty sequence, null slots, tokens of nobody; parents of the last two may be anything."""
    trees = [random_tree(6, 1), [], [7, -9, 99], random_tree(5, 2)]
    case = Case("tree pool", 14, lengths=(6, 0, 3, 5), heads=1, value_heads=2, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    x = x.replace(
        **{name: torch.cat([y, torch.full_like(y[:, :2], math.nan)], 1) for name, y in decode_calls.streams(x).items()}
    )
    pool, slots = Pool(8, state, math.nan), [[6], [1], [0], [3]]
    pool.put([6, 1, 0, 3], state)
    wide = tensor(x, [[*(t for tree in trees for t in tree), 50, -50, 7, 7]])
    indices = tensor(x, slots, torch.int32)
    o, records = verify(x, pool.slots, slot_of=indices, zero_is_null=True, parent_token=wide[:, :16])
    assert pool.untouched([]) and not o[:, 6:9].any() and not o[:, 14:].any()
    begins = {0: 0, 3: 9}
    for n, begin in begins.items():
        check_paths(x, state, trees[n], n, [o, *records], device, begin)
    kda_cuda.commit(
        records,
        None,
        pool.slots,
        slot_of=indices[:, 0],
        zero_is_null=True,
        cu_seqlens=x.cu_seqlens,
        parent_token=wide[:, :16],
        accepted_token=tensor(x, [5, -1, 77, 4]),
        state_v_first=True,
    )
    assert pool.untouched([6, 3])
    for n, (begin, last) in {0: (0, 5), 3: (9, 4)}.items():
        alone = state[n : n + 1].clone()
        decode_calls.decode(only(x, 0, [begin + t for t in path_to(trees[n], last)]), alone)
        check_same(pool.slots[slots[n][0]], alone[0], device)


@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_state_per_draft(state_dtype, device):
    """The form that needs no commit: the state after every token of the tree in a column, from any column before."""
    case = Case("tree columns", 7, batch=2, heads=1, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, state_dtype)
    pool = Pool(19, state, math.nan)
    pool.put([17, 14], state)
    columns, trees = tensor(x, [[0, 17], [14, 18]]), [(-1, 0, 0, 1, 2, 4, 3), (-1, -1, 0, 1, 3, 2, 5)]
    written = tensor(x, [list(range(7)), list(range(7, 14))])
    call = {
        "slot_of": columns,
        "num_accepted_tokens": tensor(x, [2, 1]),
        "new_state": pool.slots,
        "new_slot_of": written,
        "state_per_token": True,
    }
    o, kernels = device.run(lambda: decode_calls.decode(x, pool.slots, parent_token=tensor(x, trees), **call))
    assert kernels == (["decode_tree"] if device.runs_kernels else []) and pool.untouched(range(14))
    for n, tree in enumerate(trees):
        for last in range(7):
            alone, path = state[n : n + 1].clone(), path_to(tree, last)
            want = decode_calls.decode(only(x, n, path), alone)
            check_same(o[n, path], want[0], device)
            check_same(pool.slots[written[n, last]], alone[0], device)


def test_from_nothing(device):
    """Without a state and with nothing to write."""
    case = Case("tree alone", 5, batch=1, heads=1, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, torch.zeros(1, 1, 64, 64, device=device), False, FP32)
    tree = (-1, 0, 0, 2, 1)
    o = decode_calls.decode(x, None, parent_token=tensor(x, [tree]))
    for leaf in leaves(tree):
        path = path_to(tree, leaf)
        check_same(o[0, path], decode_calls.decode(only(x, 0, path), state.clone())[0], device)
    nothing = x.replace(**{name: y[:, :0] for name, y in decode_calls.streams(x).items()})
    assert decode_calls.decode(nothing, None, parent_token=tensor(x, [[]])).shape == (1, 0, 1, 64)


@pytest.mark.devices("emulator", "cuda")
def test_stays_inside(device):
    """Where contents cannot be checked: parents before the root are the state, later ones the token before."""
    case = Case("tree inside", 6, batch=2, heads=1, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    namespace = torch.ops.kda_cuda_emulated if device.name == "emulator" else torch.ops.kda_cuda
    wild = tensor(x, [[5, 1 << 40, -(1 << 40), 3, -2, 100], [0, 0, 99, 1, 4, 5]])
    tame = tensor(x, [[-1, 0, -1, 2, -1, 4], [-1, 0, 1, 1, 3, 4]])
    results = []
    for parents, accepted in ((wild, [1 << 40, -7]), (tame, [5, -1])):
        o, records, after = torch.full_like(x.v, math.nan), DraftRecords.empty(x.k, x.v), state.clone()
        call = kda_cuda.decode.bind(
            **decode_calls.streams(x), state=after, **decode_calls.options(x), out=o, records=records, parent_token=tame
        )
        namespace.decode(*call.arguments._replace(parent_token=parents))
        namespace.decode_commit(
            after, None, None, None, *records, None, None, parents, tensor(x, accepted), True, False
        )
        results.append([o, *records, after])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][-1][1], state[1]) and not torch.equal(results[0][-1][0], state[0])


@pytest.mark.devices("emulator")
@pytest.mark.parametrize("state_dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_schedules_agree(state_dtype, device):
    case = Case("tree schedules", 9, batch=1, heads=1, key_dim=128, value_dim=40, **MODEL)
    x = case.inputs()
    results = []
    for v_first in (True, False):
        y, state = laid_out(x, initial(case, x), v_first, state_dtype)
        parents, accepted = torch.tensor([random_tree(9, 7)]), torch.tensor([8])
        for seed in range(4):
            with testing.emulated(seed=seed, threads=1 + seed % 2):
                after = state.clone()
                o, records = verify(y, after, parent_token=parents)
                call = {"parent_token": parents, "accepted_token": accepted, "state_v_first": v_first}
                kda_cuda.commit(records, None, after, **call)
            results.append([o, *records, after])
        first, *others = results[-4:]
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.devices("cuda")
def test_a_graph_takes_other_trees(device):
    case = Case("tree graph", 8, batch=2, heads=2, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), True, FP32)
    parents, accepted = tensor(x, [random_tree(8, n) for n in (1, 2)]), tensor(x, [7, 3])
    records, pool, o = DraftRecords.empty(x.k, x.v), state.clone(), torch.empty_like(x.v)

    def step(pool: Tensor, o: Tensor) -> None:
        decode_calls.decode(x, pool, records=records, parent_token=parents, out=o)
        kda_cuda.commit(records, None, pool, parent_token=parents, accepted_token=accepted, state_v_first=True)

    step(pool, o)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(pool, o)
    parents.copy_(tensor(x, [random_tree(8, n) for n in (3, 4)]))
    accepted.copy_(tensor(x, [-1, 6]))
    pool.copy_(state)
    graph.replay()
    expected, expected_o = state.clone(), torch.empty_like(o)
    step(expected, expected_o)
    assert torch.equal(pool, expected) and torch.equal(o, expected_o)
