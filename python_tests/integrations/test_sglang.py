"""SGLang's door: its calls as plain functions, and a stub of SGLang that they are put into."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch
from torch import Tensor

from kda_cuda import calls
from kda_cuda.integrations import sglang as door

from .engine_truth import (
    CLOSE,
    DIM,
    HEADS,
    assert_only_written,
    draw_layer,
    draw_pool,
    draw_tokens,
    stub_engine,  # noqa: F401
)

BOUNDS = (-5.0, None)


def done(device, planned: door.Planned):
    """What SGLang gets, of kernels where there are any."""
    results, kernels = device.run(lambda: [calls.run(call) for call in planned.calls])
    assert bool(kernels) == device.runs_kernels
    return planned.returned(results[-1])


def streams(x) -> tuple[Tensor, ...]:
    """q, k, v, a, b as SGLang's layers hand them over."""
    return (*(y[None] for y in x.qkv()), x.g.flatten(1)[None], x.beta[None])


def ints(device, *values) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=str(device))


@pytest.mark.parametrize("lower_bound", BOUNDS)
@pytest.mark.parametrize("packed", [False, True])
def test_decode(device, packed, lower_bound):
    layer, pool, x, slots = draw_layer(lower_bound, device), draw_pool(6, device), draw_tokens(4, device), [2, -1, 5, 0]
    before = pool.clone()
    options = dict(layer.gates(), ssm_states=pool, cache_indices=ints(device, *slots))
    q, k, v, a, b = streams(x)
    if packed:
        more = {"num_v_heads": HEADS, "head_v_dim": DIM, "scale": 0.5}
        planned = door.packed_decode(x.mixed, a[0].unsqueeze(1), b[0].unsqueeze(1), **options, **more)
    else:
        planned = door.decode(q, k, v, a, b, **options, query_start_loc=ints(device, 0, 1, 2, 3, 4))
    o, written = done(device, planned), {}
    assert o.shape == (1, 4, HEADS, DIM)
    for n, slot in enumerate(slots):
        if slot < 0:
            assert not o[0, n].any()
            continue
        own = x.at([n])
        truth, states = layer.recurrence(own.qkv(), own, before[slot])
        written[slot] = states[-1]
        torch.testing.assert_close(o[0, n].double(), truth[0] * (0.5 * DIM**0.5 if packed else 1), **CLOSE)
    assert_only_written(pool, before, written)


@pytest.mark.parametrize("lower_bound", BOUNDS)
@pytest.mark.parametrize("tracked", [False, True])
def test_extend(device, tracked, lower_bound):
    """Packed prompts, one of them padding, and for a prefix cache the states before a chunk, the first one too."""
    layer, pool, x = draw_layer(lower_bound, device), draw_pool(6, device), draw_tokens(150, device)
    before, slots, lengths, chunk = pool.clone(), [4, 1, -1, 2], [130, 9, 0, 5], [2, 0, -1, -1]
    kept = torch.full((4, HEADS, DIM, DIM), torch.nan, device=str(device))
    tracking = {"track_state": kept, "track_chunk_idx": ints(device, *chunk), "return_intermediate_states": True}
    planned = door.extend(
        *streams(x),
        **layer.gates(),
        ssm_states=pool,
        cache_indices=ints(device, *slots),
        beta_is_raw=True,
        query_start_loc=ints(device, 0, 130, 139, 139, 144),
        extend_seq_lens_cpu=lengths,
        layer_id=3,
        **(tracking if tracked else {}),
    )
    found = done(device, planned)
    o, chunks = found if tracked else (found, None)
    assert chunks is None and not o[0, 144:].any()
    written, begin = {}, 0
    for n, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        own = x.at(slice(begin, begin + length))
        truth, states = layer.recurrence(own.qkv(), own, before[slot])
        torch.testing.assert_close(o[0, begin : begin + length].double(), truth, **CLOSE)
        begin += length
        if slot >= 0:
            written[slot] = states[-1]
        if tracked and chunk[n] >= 0:
            torch.testing.assert_close(kept[n].double(), states[64 * chunk[n]], **CLOSE)
    assert_only_written(pool, before, written)
    assert bool(kept[2:].isnan().all()) and (tracked or bool(kept.isnan().all()))


def test_extend_with_activated_gates(device):
    layer, pool, x = draw_layer(None, device), draw_pool(2, device), draw_tokens(7, device)
    before = pool.clone()
    g, beta = (y.float() for y in layer.transformed(*x.qkv(), x.g, x.beta)[3:])
    planned = door.extend(
        *streams(x)[:3], g, beta, ssm_states=pool, cache_indices=ints(device, 1), query_start_loc=ints(device, 0, 7)
    )
    o, (truth, states) = done(device, planned), layer.recurrence(x.qkv(), x, before[1])
    torch.testing.assert_close(o[0].double(), truth, **CLOSE)
    assert_only_written(pool, before, {1: states[-1]})


PARENTS = ([0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0])  # SGLang's: 0 at the root as well


def path_to(token: int, parents: list[int]) -> list[int]:
    return [0] if token == 0 else [*path_to(parents[token], parents), token]


@pytest.mark.parametrize("lower_bound", BOUNDS)
@pytest.mark.parametrize("form", ["chains", "ragged chains", "trees", "trees in longer rows"])
def test_target_verify(device, form, lower_bound):
    """The pool stays. The state after each draft is kept aside, of a tree that of its own path."""
    tree, lengths = "trees" in form, [2, 4, 4] if form == "ragged chains" else [4, 4, 4]
    layer, pool, x = draw_layer(lower_bound, device), draw_pool(6, device), draw_tokens(sum(lengths), device)
    steps = 6 if form == "trees in longer rows" else 4
    before, slots, rows = pool.clone(), [5, 1, -1], [2, 0, 3, 1]  # more rows than sequences
    buffer = torch.full((4, steps, HEADS, DIM, DIM), torch.nan, device=str(device))
    bounds = ints(device, 0, *torch.tensor(lengths).cumsum(0).tolist())
    planned = door.target_verify(
        layer.gates()["A_log"],
        layer.dt_bias,
        *streams(x),
        ssm_states=pool,
        cache_indices=ints(device, *slots, 0),
        query_start_loc=bounds,
        intermediate_states_buffer=buffer[:, :4],
        cache_steps=4,
        lower_bound=lower_bound,
        intermediate_state_indices=ints(device, *rows),
        cache_ring=False,
        replayssm_rawv=None,
        retrieve_parent_token=ints(device, *PARENTS) if tree else None,
    )
    o, end = done(device, planned), 0
    for n, length in enumerate(lengths):
        begin, end = end, end + length
        if slots[n] < 0:
            assert not o[0, begin:end].any() and bool(buffer[rows[n]].isnan().all())
            continue
        for token in range(length):
            path = path_to(token, PARENTS[n]) if tree else range(token + 1)
            own = x.at([begin + t for t in path])
            truth, states = layer.recurrence(own.qkv(), own, before[slots[n]])
            torch.testing.assert_close(o[0, begin + token].double(), truth[-1], **CLOSE)
            torch.testing.assert_close(buffer[rows[n], token].double(), states[-1], **CLOSE)
        assert bool(buffer[rows[n], length:].isnan().all())
    assert torch.equal(pool, before) and bool(buffer[1].isnan().all())


# ---- the engine ------------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(stub_engine):  # noqa: F811
    """The door, open beside a stub of SGLang, and the dispatcher that SGLang would build."""
    fresh = stub_engine("sglang")
    assert fresh.register() == fresh.register() == ("decode", "packed_decode", "extend", "target_verify")
    return fresh, importlib.import_module(fresh.BACKEND).KDAKernelDispatcher


def arguments(dtype: torch.dtype = torch.float32, **changes) -> dict:
    x, layer = draw_tokens(2), draw_layer(None)
    names = dict(zip("qkvab", streams(x), strict=True))
    found = names | {"A_log": layer.A_log, "dt_bias": layer.dt_bias, "ssm_states": draw_pool(4).to(dtype)}
    indices = torch.tensor([1, 3], dtype=torch.int32)
    bounds = torch.tensor([0, 1, 2], dtype=torch.int32)
    return found | {"cache_indices": indices, "query_start_loc": bounds} | changes


def test_kernels_are_replaced_where_triton_was_chosen(opened):
    fresh, dispatcher = opened
    chosen = dispatcher("triton", "triton", "other")
    assert type(chosen.decode_kernel).__name__ == type(chosen.extend_kernel).__name__ == "KdaCudaKernel"
    assert type(chosen.verify_kernel).__name__ == "OtherKernel"
    reason = "verify_kernel: OtherKernel is chosen, expected SGLang's Triton kernels"
    assert fresh.report() == {"served": {}, "declined": {reason: 1}}
    kernel, base = chosen.decode_kernel, type(chosen.decode_kernel).__base__
    assert base.__name__ == "TritonKDAKernel" and kernel.supports_packed_decode
    assert kernel.supports_track_state_snapshot and not kernel.supports_fused_chain_verify


def test_a_call_through_the_engine(opened):
    fresh, dispatcher = opened
    given = arguments()
    before = given["ssm_states"].clone()
    o = dispatcher("triton", "triton", "triton").decode_kernel.decode(**given)
    assert o.shape == (1, 2, HEADS, DIM) and fresh.report() == {"served": {"decode": 1}, "declined": {}}
    assert [bool((x != y).any()) for x, y in zip(given["ssm_states"], before, strict=True)] == [False, True] * 2
    fresh.unregister()
    assert dispatcher("triton", "triton", "triton").decode_kernel.decode(**given) == "triton decode"


def test_a_hook_set_while_plugins_are_loaded_is_left_to_the_engine(stub_engine):  # noqa: F811
    """SGLang applies all hooks at once, after its last plugin."""
    fresh = stub_engine("sglang")
    hooks, backend = (importlib.import_module(x) for x in ("sglang.srt.plugins.hook_registry", fresh.BACKEND))
    token = hooks._current_plugin_source.set("a plugin")
    fresh.plugin()
    hooks._current_plugin_source.reset(token)
    kernels = [type(backend.KDAKernelDispatcher("triton", "triton", "triton").decode_kernel).__name__]
    hooks.HookRegistry.apply_hooks()
    kernels.append(type(backend.KDAKernelDispatcher("triton", "triton", "triton").decode_kernel).__name__)
    assert kernels == ["TritonKDAKernel", "KdaCudaKernel"]


EXTEND = {"g": torch.zeros(1, 2, HEADS, DIM), "beta": torch.zeros(1, 2, HEADS)}
VERIFY = {"intermediate_state_indices": torch.tensor([0, 1]), "cache_steps": 1, "retrieve_parent_token": None}


@pytest.mark.parametrize(
    ("method", "changes", "reason"),
    [
        ("decode", {"replayssm_d": torch.zeros(1)}, "got replayssm_d, expected none of them"),
        ("decode", {"cache_indices": torch.tensor([1])}, "slot_of has shape [1], expected [N] or [N, columns]"),
        ("decode", {"dtype": torch.float64}, "state has dtype float64"),
        ("decode", {"b": torch.zeros(1, 2)}, "invalid for input of size 2"),
        ("extend", EXTEND, "g is raw and beta_is_raw is False"),
        ("extend", {**EXTEND, "is_spec_decode": True}, "got drafts, expected none of them"),
        ("extend", {**EXTEND, "return_intermediate_states": True}, "states of all chunks are asked for"),
        ("extend", {**EXTEND, "not_known": 1}, "got not_known, expected none of them"),
        (
            "extend",
            {
                **EXTEND,
                "beta_is_raw": True,
                "dtype": torch.bfloat16,
                "track_state": draw_pool(2),
                "track_chunk_idx": torch.tensor([0, 1]),
            },
            "new_state has dtype float32, expected bfloat16",
        ),
        ("target_verify", {**VERIFY, "intermediate_states_buffer": None}, "intermediate_states_buffer is None"),
        ("target_verify", {**VERIFY, "intermediate_states_buffer": None, "cache_ring": True}, "got cache_ring"),
        (
            "target_verify",
            {**VERIFY, "intermediate_states_buffer": torch.zeros(2, 1, HEADS, DIM, 2 * DIM)[..., ::2]},
            "intermediate_states_buffer has strides",
        ),
    ],
)
def test_what_sglang_serves_itself(opened, method, changes, reason, caplog):
    fresh, dispatcher = opened
    given = arguments(**changes)
    if method == "extend":
        del given["a"], given["b"]
    before = given["ssm_states"].clone()
    kernel = dispatcher("triton", "triton", "triton").decode_kernel
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert getattr(kernel, method)(**given) == f"triton {method}"
    (said,) = fresh.report()["declined"]
    assert said.startswith(f"{method}: ") and reason in said and fresh.report()["served"] == {}
    assert sum(reason in x.getMessage() for x in caplog.records) == 1  # said once
    assert torch.equal(given["ssm_states"], before)
