"""What ranks check of context parallelism; ``python_tests/parallel/test_context_parallel.py`` starts them."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import kda_cuda
from kda_cuda import parallel, testing
from kda_cuda.layers import KimiDeltaAttention, NoPEMultiLatentAttention
from kda_cuda.model import HybridConfig, HybridLM
from kda_cuda.parallel import build_cp_context

from . import cp_calls
from .cp_calls import DIVISIONS, Division, check_near, check_rank, of_rank, results_of, truth_of, whole_inputs

RANKS = 4
DIES_AFTER = 20  # seconds: the timeout of a group in which a rank dies
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
CONFIG = HybridConfig(
    vocab_size=20,
    hidden_size=16,
    num_layers=2,
    full_attention_every=2,
    num_heads=2,
    head_dim=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=24,
)
CHECKS: dict[str, tuple[int, Callable]] = {}  # name -> how many ranks it takes, and what they do with their group
Group = dist.ProcessGroup


def check(*sizes: int) -> Callable:
    def register(function: Callable[[Group], None]) -> Callable[[Group], None]:
        for ranks in sizes:
            CHECKS[f"{function.__name__}[{ranks}]"] = ranks, function
        return function

    return register


def context_of(division: Division, group: Group, taps: int | None = None) -> parallel.CPContext:
    tokens = None if division.tokens is None else division.tokens[dist.get_rank(group)]
    return build_cp_context(torch.tensor(division.cu_seqlens), group, taps, layout=division.layout, tokens=tokens)


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, in float64."""
    total = x.detach().double()
    dist.all_reduce(total, group=group)
    return total


def check_call(group: Group, division: Division, gate: str, dtype: torch.dtype, **options) -> dict[str, Tensor]:
    x = whole_inputs(division, gate, dtype, **options)
    truth, context = truth_of(division, x), context_of(division, group)
    got = results_of(context, of_rank(context, x))
    check_rank(context, got, truth, dtype)
    for name in ("dA_log", "ddt_bias"):
        if name in got:
            check_near(name, summed(got[name], group), truth[name], dtype)
    return got


@check(2, 3, 4)
def float64_is_exact(group: Group) -> None:
    gates = itertools.cycle(cp_calls.GATES)
    for i, division in enumerate(DIVISIONS[dist.get_world_size(group)]):
        check_call(group, division, next(gates), F64)
        check_call(group, division, "zero" if i % 2 else "slow", F64, v_first=True)


@check(2, 3, 4)
def fp32_and_bf16_are_within_their_caps(group: Group) -> None:
    divisions = DIVISIONS[dist.get_world_size(group)]
    for division, gate in zip(divisions, ("slow", "zero", "released"), strict=False):
        check_call(group, division, gate, F32)
        check_call(group, division, gate, BF16)


@check(3)
def the_same_bits_from_run_to_run(group: Group) -> None:
    first, second = (check_call(group, DIVISIONS[3][0], "slow", F32) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@check(2, 4)
def contexts_of_other_packages_are_known_by_their_fields(group: Group) -> None:
    ranks = dist.get_world_size(group)
    for layout in ("contiguous", "zigzag"):
        division = Division((0, 30, 30 * ranks, 32 * ranks), layout=layout)
        x = whole_inputs(division, "slow", F64)
        context, truth = context_of(division, group), truth_of(division, x)
        own = of_rank(context, x)
        got = results_of(
            context, own, lambda cp_context, **x: kda_cuda.chunk_kda(**x, cp_context=cp_calls.as_fla(cp_context))
        )
        check_rank(context, got, truth, F64)


@check(2)
def calls_without_gradients(group: Group) -> None:
    division = DIVISIONS[2][1]
    x = whole_inputs(division, "slow", F64)
    context, truth = context_of(division, group), truth_of(division, x)
    own, _, _ = cp_calls.split_off(of_rank(context, x))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            o, final = kda_cuda.chunk_kda(**own, cp_context=context, cu_seqlens=context.cu_seqlens)
            assert not o.requires_grad
            check_near("o", o, context.shard(truth["o"]), F64)
            o, none = kda_cuda.chunk_kda(**own | {"output_final_state": False}, cp_context=context)
            assert none is None
    check_near("final", final, truth["final"] if dist.get_rank(group) == 1 else final, F64)


@check(2)
def the_emulated_kernels(group: Group) -> None:
    with testing.emulated():
        for division, gate, dtype in (
            (DIVISIONS[2][0], "slow", BF16),
            (DIVISIONS[2][3], "released", F32),
            (Division((0, 70), layout="zigzag"), "violent", BF16),
        ):
            x = whole_inputs(division, gate, dtype, sizes=(1, 1, 16, 16))
            context = context_of(division, group)
            testing.take_record()
            got = results_of(context, of_rank(context, x))
            kernels = testing.take_record()
            assert not context.num_tokens or {"chunk_prepare", "chunk_bwd_scan"} <= set(kernels), kernels
            with torch.no_grad():
                truth = in_float64(division, x)
            check_rank(context, got, truth, dtype)


def in_float64(division: Division, x: dict) -> dict[str, Tensor]:
    """The truth, by the reference: the emulated kernels take no float64."""
    before = kda_cuda.variants.set_emulating(False)
    try:
        with torch.enable_grad():
            return truth_of(division, x)
    finally:
        kda_cuda.variants.set_emulating(before)


# ---- layers and model ------------------------------------------------------------------------------------------------


def check_layer(group: Group, layer: torch.nn.Module, division: Division) -> None:
    """Outputs and every gradient against one process with all tokens."""
    x = cp_calls.Draw(str(division)).normal(1, division.cu_seqlens[-1], 16)
    context = context_of(division, group, 4)
    whole, own = x.clone().requires_grad_(), context.shard(x).requires_grad_()
    expected, y = layer(whole, cu_seqlens=torch.tensor(division.cu_seqlens)), layer(own, cp_context=context)
    dy = cp_calls.Draw("dy").normal(*expected.shape)
    names = ["x", *dict(layer.named_parameters())]
    truth = torch.autograd.grad(expected, [whole, *layer.parameters()], dy)
    got = torch.autograd.grad(y, [own, *layer.parameters()], context.shard(dy))
    check_near("y", y.detach(), context.shard(expected.detach()), F64)
    check_near("dx", got[0], context.shard(truth[0]), F64)
    for name, d, expected_d in zip(names[1:], got[1:], truth[1:], strict=True):
        check_near(f"d{name}", summed(d, group), expected_d, d.dtype)  # fp32 for the gate parameters


@check(2, 3, 4)
def the_layers(group: Group) -> None:
    torch.manual_seed(0)
    layers = [KimiDeltaAttention(16, 2, 8), NoPEMultiLatentAttention(16, 2, 8, 8, 8, 8)]
    for layer, division in itertools.product(layers, DIVISIONS[dist.get_world_size(group)]):
        check_layer(group, layer.double(), division)


@check(2, 4)
def the_loss_of_the_model(group: Group) -> None:
    """With packed documents, whose last tokens have no label."""
    torch.manual_seed(0)
    model, division = HybridLM(CONFIG).double(), Division((0, 9, 26))
    tokens = torch.randint(20, (1, 26), generator=torch.Generator().manual_seed(1))
    labels = F.pad(tokens[:, 1:], (0, 1), value=-100)
    labels[:, 8] = -100
    expected = F.cross_entropy(
        model(tokens, cu_seqlens=torch.tensor(division.cu_seqlens))[0], labels[0], reduction="sum"
    )
    context = context_of(division, group)
    logits = model(context.shard(tokens), cp_context=context)
    loss = F.cross_entropy(logits[0], context.shard(labels)[0], reduction="sum")
    truth, got = (torch.autograd.grad(x, list(model.parameters())) for x in (expected, loss))
    check_near("loss", summed(loss, group)[None], expected.detach()[None], F64)
    for (name, _), d, expected_d in zip(model.named_parameters(), got, truth, strict=True):
        check_near(f"d{name}", summed(d, group), expected_d, d.dtype)


@check(2)
def a_model_sharded_by_fsdp(group: Group) -> None:
    """Parameters and tokens are divided among the same ranks: FSDP2 averages what context parallelism adds up."""
    torch.manual_seed(0)
    plain = HybridLM(CONFIG)
    sharded = HybridLM(CONFIG)
    sharded.load_state_dict(plain.state_dict())
    mesh = torch.distributed.device_mesh.DeviceMesh.from_group(group, "cpu")
    parallel.shard(sharded, mesh=mesh)
    tokens = torch.randint(20, (1, 26), generator=torch.Generator().manual_seed(1))
    context = build_cp_context(torch.tensor([0, 26]), group)
    plain(tokens).square().sum().backward()
    (sharded(context.shard(tokens), cp_context=context).square().sum() * dist.get_world_size(group)).backward()
    for (name, p), q in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(
            q.grad.full_tensor(), p.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# ---- errors: the same on every rank ---------------------------------------------------------------------------------


def expect(kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    try:
        call()
    except kind as error:
        assert str(error) == message, f"got {str(error)!r}, expected {message!r}"
    else:
        raise AssertionError(f"expected {kind.__name__}: {message}")


@check(2)
def mismatches_are_named_on_every_rank(group: Group) -> None:
    rank, both = dist.get_rank(group), torch.tensor([0, 10])
    c = "kda_cuda::build_cp_context"
    expect(
        ValueError,
        f"{c}: the number of tokens is 12 on rank 1, expected 10 as on rank 0",
        lambda: build_cp_context(torch.tensor([0, 10 + 2 * rank]), group),
    )
    expect(
        ValueError,
        f"{c}: the number of sequences is 2 on rank 1, expected 1 as on rank 0",
        lambda: build_cp_context(torch.tensor([0, 3, 10] if rank else [0, 10]), group),
    )
    expect(
        ValueError,
        f"{c}: layout (0 contiguous, 1 zigzag) is 1 on rank 1, expected 0 as on rank 0",
        lambda: build_cp_context(both, group, layout="zigzag" if rank else "contiguous"),
    )
    expect(
        ValueError,
        f"{c}: conv1d_kernel_size is -1 on rank 1, expected 4 as on rank 0",
        lambda: build_cp_context(both, group, None if rank else 4),
    )
    expect(
        ValueError,
        f"{c}: tokens is [5, 6] on the ranks, together 11, expected cu_seqlens[-1]=10",
        lambda: build_cp_context(both, group, tokens=5 + rank),
    )
    expect(
        ValueError,
        f"{c}: tokens is None on rank 1, expected a number as on other ranks",
        lambda: build_cp_context(both, group, tokens=None if rank else 5),
    )
    message = "rank 1 refused its arguments, expected the same valid ones on every rank"
    expect(
        ValueError,
        f"{c}: {'cu_seqlens[1] is -3 after 0, expected no decrease' if rank else message}",
        lambda: build_cp_context(torch.tensor([0, -3, 10] if rank else [0, 3, 10]), group),
    )
    x = {name: torch.zeros(1, 5, 2, 4) for name in ("q", "k", "v", "g")} | {"beta": torch.zeros(1, 5, 2)}
    wide = x | {"v": torch.zeros(1, 5, 2, 6)}
    context = build_cp_context(both, group)
    expect(
        ValueError,
        "kda_cuda::chunk_kda: V of v is 6 on rank 1, expected 4 as on rank 0",
        lambda: kda_cuda.chunk_kda(**(wide if rank else x), cp_context=context),
    )


@check(2)
def misuse_is_named(group: Group) -> None:
    both, c = torch.tensor([0, 10]), "kda_cuda::build_cp_context"
    expect(
        TypeError,
        f"{c}: group is a NoneType, expected a torch.distributed.ProcessGroup",
        lambda: build_cp_context(both, None),
    )
    for kind, message, arguments in (
        (TypeError, "cu_seqlens is a list, expected a Tensor", {"cu_seqlens": [0, 10]}),
        (TypeError, "cu_seqlens has dtype float32, expected int32 or int64", {"cu_seqlens": both.float()}),
        (ValueError, "cu_seqlens[0] is 1, expected 0", {"cu_seqlens": torch.tensor([1, 10])}),
        (ValueError, "layout is 'ring', expected one of ['contiguous', 'zigzag']", {"layout": "ring"}),
        (ValueError, "tokens is 5 in the zigzag layout, expected None", {"layout": "zigzag", "tokens": 5}),
        (ValueError, "tokens is -1, expected >= 0", {"tokens": -1}),
        (ValueError, "conv1d_kernel_size is 0, expected >= 1", {"conv1d_kernel_size": 0}),
        (
            ValueError,
            "use_tf32x3_affine_chain is False, expected True: the chain is always exact",
            {"use_tf32x3_affine_chain": False},
        ),
    ):
        expect(
            kind, f"{c}: {message}", lambda a=arguments: build_cp_context(**({"cu_seqlens": both, "group": group} | a))
        )


@check(2)
def misuse_of_a_context_is_named(group: Group) -> None:
    both, c = torch.tensor([0, 10]), "kda_cuda::chunk_kda"
    x = {name: torch.zeros(1, 5, 2, 4) for name in ("q", "k", "v", "g")} | {"beta": torch.zeros(1, 5, 2)}
    context = build_cp_context(both, group)
    expect(
        ValueError,
        f"{c}: q has T=10 tokens, expected the T=5 that cp_context gives this rank",
        lambda: kda_cuda.chunk_kda(**{n: y.repeat_interleave(2, 1) for n, y in x.items()}, cp_context=context),
    )
    expect(
        ValueError,
        f"{c}: cu_seqlens differs from cp_context.cu_seqlens, expected None or the context's",
        lambda: kda_cuda.chunk_kda(**x, cu_seqlens=both, cp_context=context),
    )
    layer, row = KimiDeltaAttention(4, 1, 4), torch.zeros(1, 5, 4)
    expect(
        ValueError,
        "kda_cuda::KimiDeltaAttention: cp_context and cache are given, expected one of them",
        lambda: layer(row, layer.new_cache(1), cp_context=context),
    )
    expect(
        ValueError,
        "kda_cuda::KimiDeltaAttention: the input has shape [1, 4, 4], expected [1, T=5, ...] with this cp_context",
        lambda: layer(row[:, :4], cp_context=context),
    )
    taps = build_cp_context(both, group, 3)
    expect(
        ValueError,
        "kda_cuda::exchange_conv_tails: kernel_size is 4, expected cp_context.conv1d_kernel_size=3",
        lambda: layer(row, cp_context=taps),
    )


# ---- the ranks -------------------------------------------------------------------------------------------------------


def survivors_end(rank: int, group: Group) -> str | None:
    """The last rank dies in the middle: what the others say, if they do not end with an error in time."""
    context, begin = build_cp_context(torch.tensor([0, 40]), group), time.monotonic()
    if rank == RANKS - 1:
        os._exit(0)
    x = {name: torch.zeros(1, context.num_tokens, 1, 4) for name in ("q", "k", "v", "g")}
    try:
        kda_cuda.chunk_kda(**x, beta=x["q"][..., 0], cp_context=context)
    except RuntimeError:
        waited = time.monotonic() - begin
        return None if waited < DIES_AFTER + 10 else f"ended after {waited:.0f} s"
    return "no error"


def run_rank(rank: int, folder: str, emulator: bool) -> None:
    """All checks on one rank; what passed and what failed goes to a file.

    The first failure ends the rank, and by that the others too: they would wait for it.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=DIES_AFTER)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    groups = {ranks: dist.new_group(list(range(ranks))) for ranks in range(2, RANKS + 1)}
    mortal = dist.new_group(list(range(RANKS)), timeout=timeout)
    results = {"passed": [], "failures": {}}
    for name, (ranks, function) in CHECKS.items():
        try:
            if rank < ranks and (emulator or function is not the_emulated_kernels):
                function(groups[ranks])
            results["passed"].append(name)
            dist.barrier(groups[RANKS])
        except Exception:
            results["failures"][name] = traceback.format_exc()
            break
    if not results["failures"]:
        if text := survivors_end(rank, mortal):
            results["failures"]["a_rank_that_dies"] = f"rank {rank}: {text}"
        else:
            results["passed"].append("a_rank_that_dies")
    Path(folder, f"rank{rank}.json").write_text(json.dumps(results))
    # Everything is on file. An interpreter that ends while threads of torch still run aborts now and then.
    os._exit(0)
