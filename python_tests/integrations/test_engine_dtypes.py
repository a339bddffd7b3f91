"""What the engines hand over on a GPU, in their dtypes, strides and sizes, is accepted. Only checks run."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from kda_cuda import calls
from kda_cuda.integrations import sglang, vllm
from kda_cuda.integrations.vllm_work import WORK

TOKENS, HEADS, DIM, SLOTS = 24, 12, 128, 40
WIDTH = HEADS * DIM
BF16, FP32, INT = torch.bfloat16, torch.float32, torch.int32


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def indices(*shape: int, dtype: torch.dtype = INT) -> torch.Tensor:
    """Slots that differ, none of them null."""
    return torch.arange(1, 1 + math.prod(shape), dtype=dtype).view(shape)


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(INT)


def pool_of(dtype: torch.dtype) -> torch.Tensor:
    """Pages hold the convolution states too, so slots lie apart."""
    return empty(SLOTS, WIDTH * DIM + 9 * WIDTH, dtype=dtype)[:, : WIDTH * DIM].unflatten(-1, (HEADS, DIM, DIM))


def vllm_work(name: str, inputs: int, pool: torch.dtype) -> tuple:
    """A layer, its work and its caches; q|k|v, gate and beta are parts of one projection."""
    projected = empty(TOKENS, 4 * WIDTH + DIM + 16)
    mixed, gate, beta = projected[:, : 3 * WIDTH], projected[:, 3 * WIDTH : 4 * WIDTH], projected[:, -HEADS:]
    g, g2, out = (x.unflatten(-1, (HEADS, DIM)) for x in (empty(TOKENS, WIDTH), gate, empty(TOKENS, WIDTH)))
    convs = [SimpleNamespace(weight=empty(n * WIDTH, 1, 4, dtype=FP32), bias=None) for n in (3, 1, 1, 1)]
    layer = SimpleNamespace(
        **dict(zip(("conv1d", "q_conv1d", "k_conv1d", "v_conv1d"), convs, strict=True)),
        A_log=empty(1, 1, HEADS, 1, dtype=FP32),
        dt_bias=empty(WIDTH, dtype=FP32),
        gate_lower_bound=None,
        kda_lower_bound=-5.0,
        o_norm=SimpleNamespace(activation="sigmoid", weight=empty(DIM), eps=1e-5),
        _checkpoint_exporter=object(),
    )
    arguments = {"g1": g[None], "beta": beta[None], "core_attn_out": out[None]}
    if name.startswith("Bailing"):
        names = ("q_proj_states", "k_proj_states", "v_proj_states")
        arguments |= {"g1": g[None].float(), "beta": beta[None].float()}
        arguments |= dict(zip(names, mixed.split(WIDTH, dim=-1), strict=True))
    elif name.startswith("Glm"):
        arguments["qkv_proj_states"] = mixed
    else:
        arguments |= {"mixed_qkv": mixed, "g2": g2}
    caches = vllm.Caches(empty(SLOTS, inputs, 3 * WIDTH).transpose(-1, -2), pool_of(pool))
    return layer, WORK[name](layer, **arguments), caches


def metadata(**fields):
    none = dict.fromkeys(
        (
            "num_prefills",
            "num_decodes",
            "num_spec_decodes",
            "num_prefill_tokens",
            "num_decode_tokens",
            "num_spec_decode_tokens",
        ),
        0,
    )
    return SimpleNamespace(**none | {"num_actual_tokens": TOKENS} | fields)


def prompts():
    checkpoint = SimpleNamespace(checkpoint_offsets=bounds(64), state_indices=indices(2) + 20, offsets=[0, 64])
    return metadata(
        num_prefills=2,
        num_prefill_tokens=TOKENS,
        has_initial_state=empty(2, dtype=torch.bool),
        checkpoint=checkpoint,
        non_spec_query_start_loc=bounds(20, 4),
        non_spec_state_indices_tensor=indices(2, 9)[:, 0],
    )


def drafts():
    """Six sequences of four, of which a CUDA graph has room for eight."""
    return metadata(
        num_spec_decodes=6,
        num_spec_decode_tokens=TOKENS,
        spec_query_start_loc=bounds(4, 4, 4, 4, 4, 4, 0, 0),
        spec_state_indices_tensor=indices(8, 4),
        num_accepted_tokens=torch.ones(8, dtype=INT),
    )


def single_tokens():
    slots = indices(9, TOKENS).T[:, 0]
    return metadata(num_decodes=TOKENS, num_decode_tokens=TOKENS, non_spec_state_indices_tensor=slots)


@pytest.mark.parametrize("pool", [FP32, BF16], ids=str)
@pytest.mark.parametrize("name", WORK)
def test_vllm(name, pool):
    with torch.no_grad():
        for m, inputs in ((prompts(), 3), (drafts(), 6), (single_tokens(), 6)):
            planned = vllm.plan(*vllm_work(name, inputs, pool)[:2], m, vllm_work(name, inputs, pool)[2])
            assert isinstance(planned, list), planned
        whole = vllm.plan(*vllm_work(name, 3, pool)[:2], single_tokens(), vllm_work(name, 3, pool)[2])
        assert isinstance(whole, calls.Call if name.startswith("Kimi") else list), whole


@pytest.mark.parametrize("pool", [FP32, BF16], ids=str)
@pytest.mark.parametrize("shape", [(TOKENS, WIDTH), (1, TOKENS, WIDTH), (1, TOKENS, HEADS, DIM)], ids=str)
def test_sglang(shape, pool):
    with torch.no_grad():
        mixed = empty(TOKENS, 3 * WIDTH)
        q, k, v = (x.unflatten(-1, (HEADS, DIM))[None] for x in mixed.split(WIDTH, dim=-1))
        gates = {"A_log": empty(1, 1, HEADS, 1, dtype=FP32), "dt_bias": empty(WIDTH, dtype=FP32), "lower_bound": -5.0}
        gates["ssm_states"] = pool_of(pool)
        a, b, starts = empty(*shape), empty(TOKENS, 4 * HEADS)[None, :, :HEADS], bounds(4, 4, 4, 4, 4, 4)
        slots = indices(TOKENS)
        sglang.decode(q, k, v, a, b, **gates, cache_indices=slots, query_start_loc=slots)
        sglang.packed_decode(
            mixed, a, b, **gates, cache_indices=slots, scale=DIM**-0.5, num_v_heads=HEADS, head_v_dim=DIM
        )
        tracking = {"track_state": empty(6, HEADS, DIM, DIM, dtype=FP32), "track_chunk_idx": indices(6) - 1}
        for kept in ({}, tracking) if pool == FP32 else ({},):
            sglang.extend(
                q,
                k,
                v,
                a,
                b,
                **gates,
                **kept,
                cache_indices=slots[:6],
                query_start_loc=starts,
                beta_is_raw=True,
                extend_seq_lens_cpu=[4] * 5 + [64],
            )
        for parents in (None, torch.zeros(6, 4, dtype=torch.int64)):
            sglang.target_verify(
                q=q,
                k=k,
                v=v,
                a=a,
                b=b,
                **gates,
                cache_indices=slots,
                query_start_loc=starts,
                cache_steps=4,
                retrieve_parent_token=parents,
                intermediate_state_indices=indices(SLOTS) - 1,
                intermediate_states_buffer=empty(SLOTS, 4, HEADS, DIM, DIM, dtype=pool),
            )
