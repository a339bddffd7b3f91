"""What two ranks check of a sharded or replicated model; ``test_distributed.py`` starts them."""

from __future__ import annotations

import copy
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from kda_cuda import parallel
from kda_cuda.layers import KimiDeltaAttention, NoPEMultiLatentAttention
from kda_cuda.model import HybridConfig, HybridLM

RANKS = 2
BF16 = torch.bfloat16
CONFIG = HybridConfig(
    vocab_size=20, hidden_size=16, num_layers=2, full_attention_every=2, num_heads=2, head_dim=8, kv_lora_rank=8,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, intermediate_size=24,
)  # fmt: skip
CHECKS: dict[str, Callable[[int, Path], None]] = {}


def check(function: Callable[[int, Path], None]) -> Callable[[int, Path], None]:
    CHECKS[function.__name__] = function
    return function


def new_model(dtype: torch.dtype = torch.float32) -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(CONFIG).to(dtype)


def tokens() -> Tensor:
    return torch.randint(20, (RANKS, 13), generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(rows[:, :-1]).float().flatten(0, 1), rows[:, 1:].flatten())


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def assert_same_training(parallel_model: nn.Module, plain: HybridLM, rank: int, **tolerance: float) -> None:
    """Loss and every gradient: the rank's rows against all rows in one process."""
    loss = loss_of(parallel_model, tokens()[rank : rank + 1])
    loss.backward()
    expected = loss_of(plain, tokens())
    expected.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total / RANKS, expected.detach(), **tolerance)
    inner = getattr(parallel_model, "module", parallel_model)
    got, truth = dict(inner.named_parameters()), dict(plain.named_parameters())
    assert set(got) == set(truth)
    for name, p in truth.items():
        gradient = whole(got[name].grad)
        torch.testing.assert_close(gradient, p.grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}")
        assert gradient.any(), name


def train_once(model: nn.Module, rows: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, rows).backward()
    optimizer.step()
    optimizer.zero_grad()


@check
def fsdp_trains_a_model_of_two_dtypes(rank: int, folder: Path) -> None:
    model = parallel.shard(new_model(BF16))
    gate = model.model.layers[0].self_attn.A_log
    assert gate.dtype == torch.float32 and hasattr(gate, "full_tensor")
    assert gate.to_local().numel() < CONFIG.num_heads  # sharded too
    assert_same_training(model, new_model(BF16), rank, rtol=5e-2, atol=1e-2)
    train_once(model, tokens()[rank : rank + 1])


@check
def fsdp_trains_as_one_process(rank: int, folder: Path) -> None:
    assert_same_training(parallel.shard(new_model()), new_model(), rank, rtol=1e-3, atol=1e-5)


@check
def fsdp_keeps_the_gates_exact_under_mixed_precision(rank: int, folder: Path) -> None:
    """Weights in fp32, computed with in bf16: as the model in bf16, whose gate parameters are fp32."""
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=torch.float32)
    model, plain, rows = parallel.shard(new_model(), mp_policy=policy), new_model(BF16), tokens()
    with torch.no_grad():
        assert torch.equal(model(rows), plain(rows))
    loss_of(model, rows).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@check
def fsdp_takes_blocks_of_the_user(rank: int, folder: Path) -> None:
    model = new_model()
    parallel.shard(model, blocks=[model.model.layers[1], model.model.layers[0].mlp], reshard_after_forward=True)
    assert_same_training(model, new_model(), rank, rtol=1e-3, atol=1e-5)


@check
def fsdp_generates_what_one_process_does(rank: int, folder: Path) -> None:
    rows = tokens()[:, :5]
    policy = MixedPrecisionPolicy(param_dtype=BF16)
    for dtype, options in ((torch.float32, {}), (BF16, {}), (torch.float32, {"mp_policy": policy})):
        model = parallel.shard(new_model(dtype), **options)
        plain = new_model(BF16 if options else dtype)
        assert torch.equal(model.generate(rows, 4), plain.generate(rows, 4))
        cache, expected = model.new_cache(2), plain.new_cache(2)
        with torch.no_grad():
            for part in rows.split([3, 1, 1], dim=1):
                assert torch.equal(model(part, cache), plain(part, expected))
        assert cache.layers[0].state.dtype == torch.float32
        assert torch.equal(cache.layers[0].state, expected.layers[0].state)
        assert type(cache.layers[1].buffer) is Tensor


@check
def plain_fully_shard_names_the_way_out(rank: int, folder: Path) -> None:
    block, layer = new_model(BF16).model.layers[0], new_model(BF16).model.layers[0].self_attn
    for target in (new_model(BF16), block, layer, nn.Sequential(new_model(BF16).model.layers[0].self_attn)):
        try:
            fully_shard(target)
        except ValueError as error:
            assert str(error) == (
                "kda_cuda::fully_shard: the parameters of a KimiDeltaAttention have dtypes ['bfloat16', 'float32'], "
                "expected one: kda_cuda.parallel.shard(model, ...) shards such a model, with A_log and dt_bias apart"
            )
        else:
            raise AssertionError("expected a ValueError")
    assert_same_training(fully_shard(new_model()), new_model(), rank, rtol=1e-3, atol=1e-5)  # one dtype: as ever
    frozen = new_model(BF16).requires_grad_(False)
    fully_shard(frozen)(tokens())


@check
def fsdp_initialises_a_model_built_on_meta(rank: int, folder: Path) -> None:
    with torch.device("meta"):
        model = HybridLM(CONFIG)
    parallel.shard(model).to_empty(device="cpu")
    torch.manual_seed(7)
    for module in model.modules():
        if module._parameters:
            module.reset_parameters()
    assert all(whole(p).isfinite().all() for p in model.parameters())
    assert loss_of(model, tokens()).isfinite()


@check
def checkpoints_are_saved_and_loaded(rank: int, folder: Path) -> None:
    """torch.distributed.checkpoint: from a sharded model into another one, and into one that is whole."""
    model = parallel.shard(new_model(BF16))
    train_once(model, tokens()[rank : rank + 1])
    saved = get_model_state_dict(model)
    assert set(saved) == set(new_model().state_dict())
    dcp.save(saved, checkpoint_id=folder / "checkpoint")
    with torch.no_grad():
        expected = model(tokens())
    torch.manual_seed(5)
    for other in (parallel.shard(HybridLM(CONFIG).to(BF16)), HybridLM(CONFIG).to(BF16)):
        state = get_model_state_dict(other)
        dcp.load(state, checkpoint_id=folder / "checkpoint")
        set_model_state_dict(other, state)
        with torch.no_grad():
            assert torch.equal(other(tokens()), expected)


@check
def ddp_trains_as_one_process(rank: int, folder: Path) -> None:
    model = DistributedDataParallel(new_model())
    assert_same_training(model, new_model(), rank, rtol=1e-3, atol=1e-5)


@check
def ddp_trains_through_pieces_and_packed_rows(rank: int, folder: Path) -> None:
    """What the model takes beside tokens goes through the wrapper: a cache that hands gradients on, boundaries."""
    plain, rows = new_model(), tokens()[rank : rank + 1]
    model = DistributedDataParallel(copy.deepcopy(plain))
    bounds = torch.tensor([0, 4, 13])
    whole_rows, packed = plain(rows), plain(rows, cu_seqlens=bounds)
    cache = model.module.new_cache(1)
    with model.no_sync():
        pieces = torch.cat([model(part, cache) for part in rows.split([9, 1, 3], dim=1)], 1)
        torch.testing.assert_close(pieces, whole_rows, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model(rows, cu_seqlens=bounds), packed, rtol=1e-4, atol=1e-5)
        pieces.square().sum().backward()
    whole_rows.square().sum().backward()
    for got, truth in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, truth.grad, rtol=1e-3, atol=1e-3)


@check
def slices_of_heads_add_up(rank: int, folder: Path) -> None:
    """Tensor parallelism: each rank has its heads, outputs and the gradients in common are summed."""
    torch.manual_seed(0)
    for layer in (KimiDeltaAttention(16, 4, 8), NoPEMultiLatentAttention(16, 4, 8, 8, 8, 8)):
        part, x = parallel.head_slice(layer, rank, RANKS), torch.randn(2, 9, 16)
        y, expected = part(x), layer(x)
        y.sum().backward()
        expected.sum().backward()
        total = y.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, expected.detach(), rtol=1e-4, atol=1e-5)
        truth = dict(layer.named_parameters())
        for name, p in part.named_parameters():
            dim, gradient = parallel.BY_HEADS.get(name), p.grad.clone()
            if dim is None:
                dist.all_reduce(gradient)
            of_rank = truth[name].grad if dim is None else truth[name].grad.chunk(RANKS, dim)[rank]
            torch.testing.assert_close(gradient, of_rank, rtol=1e-3, atol=1e-4)
        with torch.no_grad():  # and on caches of their heads
            cache = part.new_cache(2)
            pieces = torch.cat([part(piece, cache) for piece in x.split([7, 1, 1], dim=1)], 1)
            dist.all_reduce(pieces)
        torch.testing.assert_close(pieces, expected.detach(), rtol=1e-4, atol=1e-5)


def run_rank(rank: int, folder: str) -> None:
    """All checks on one rank; what failed goes to a file."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    failures = {}
    for name, function in CHECKS.items():
        try:
            function(rank, Path(folder))
        except Exception:
            failures[name] = traceback.format_exc()
        everywhere = [None] * RANKS
        dist.all_gather_object(everywhere, failures.get(name))
        if text := next((text for text in everywhere if text), None):
            failures[name] = text
    Path(folder, f"rank{rank}.json").write_text(json.dumps(failures))
    dist.barrier()
    dist.destroy_process_group()
    # Everything is on file. An interpreter that ends while threads of torch still run aborts now and then.
    os._exit(0)
