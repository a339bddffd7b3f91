"""What a call needs besides its tensors, known before it: the workspace, launch limits, and what explain() says."""

from __future__ import annotations

import itertools

import pytest
import torch

import kda_cuda
from kda_cuda import testing

from ..prefill.test_prefill import BATCH, MODEL, RAGGED, SEQUENCES, expect, make_pool, streams_of, tensor
from ..prefill.test_prefill_op import raw_arguments, raw_op
from ..support.cases import Case, Inputs
from .test_chunk_fwd import INVARIANT, VARIANTS


def size_for(x: Inputs, **more) -> int:
    sequences = None if x.cu_seqlens is None else len(x.cu_seqlens) - 1
    return kda_cuda.workspace_size(
        batch=x.q.shape[0], tokens=x.q.shape[1], sequences=sequences, value_heads=x.v.shape[2], key_dim=x.q.shape[3],
        value_dim=x.v.shape[3], dtype=x.q.dtype, device=x.q.device, **more,
    )  # fmt: skip


@pytest.mark.parametrize("case", [SEQUENCES, RAGGED, BATCH], ids=str)
def test_the_callers_workspace_is_used_and_nothing_beyond_it(case, device):
    x = case.inputs(device)
    size = size_for(x)
    assert (size > 0) == device.runs_kernels
    memory = torch.full((size + 4096,), 0xA5, dtype=torch.uint8, device=x.q.device)
    pool = x.initial_state.clone()
    o = kda_cuda.prefill(**streams_of(x), state_pool=pool, workspace=memory[2048 : 2048 + size])
    wanted, final = expect(x)
    assert torch.equal(o, wanted) and torch.equal(pool, final)
    assert bool((memory[:2048] == 0xA5).all() and (memory[2048 + size :] == 0xA5).all())
    if device.runs_kernels:
        assert not bool((memory[2048 : 2048 + size] == 0xA5).all())
        before = pool.clone()
        with pytest.raises(ValueError, match=rf"workspace has {size - 1} bytes, expected at least {size}$"):
            kda_cuda.prefill(**streams_of(x), state_pool=pool, workspace=memory[2048 : 2047 + size])
        assert torch.equal(pool, before)
        assert kda_cuda.explain(op="prefill", **streams_of(x), state_pool=pool).forward.plan["workspace_bytes"] == str(
            size
        )


@pytest.mark.devices("emulator", "cuda")
def test_workspace_never_shrinks(device):
    """So that a server can allocate once, for the most tokens and sequences that it will see."""
    shape = {"value_heads": 4, "key_dim": 128, "value_dim": 128, "dtype": torch.bfloat16, "device": str(device)}
    sizes = [kda_cuda.workspace_size(tokens=t, sequences=n, **shape) for t in (0, 1, 63, 64, 65, 8192)
             for n in (1, 2, 100)]  # fmt: skip
    table = torch.tensor(sizes).reshape(6, 3)
    assert bool((table.diff(dim=0) >= 0).all() and (table.diff(dim=1) >= 0).all())


PROMISE = 1.5  # bytes over those of q + k expanded to HV heads, for K >= 64 (issue 4)
SEGMENTS = 0.25  # of that, for the states of segments
SMALL = 512 << 10  # bytes that the emulated device always allows; a GPU allows 16 MB


@pytest.mark.devices("emulator")
@pytest.mark.parametrize("variant", VARIANTS)
def test_workspace_against_the_inputs(variant, device):
    dtype, key_dim, _, arch = VARIANTS[variant]
    key_dim = 64 if key_dim <= 64 else 128 if key_dim <= 128 else 256
    with testing.emulated(arch=arch):
        for tokens, heads, batch in itertools.product((256, 8192, 1 << 20), (1, 96), (1, 3)):
            shape = {
                "batch": batch,
                "tokens": tokens,
                "value_heads": heads,
                "key_dim": key_dim,
                "value_dim": 128,
                "dtype": dtype,
                "device": "cpu",
            }
            promised = PROMISE * 2 * batch * tokens * heads * key_dim * dtype.itemsize
            carried = 2 * heads * key_dim * 128 * 4  # states between rounds
            unsplit = kda_cuda.workspace_size(**shape, deterministic="batch_invariant")
            assert unsplit <= max(promised, SMALL) + carried + 1024
            segments = kda_cuda.workspace_size(**shape) - unsplit
            assert 0 <= segments <= max(min(SEGMENTS * unsplit, 32 << 20), SMALL)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": -1}, ValueError, "tokens is -1, expected a size"),
        ({"tokens": 1.0}, TypeError, "tokens is 1.0 (float), expected an int"),
        ({"key_dim": 257}, ValueError, "key_dim is 257, expected at most 256"),
        ({"value_heads": 0}, ValueError, "value_heads is 0, expected a size"),
        ({"sequences": 0}, ValueError, "sequences is 0, expected a size"),
        ({"sequences": 2, "batch": 2}, ValueError, "batch is 2, expected 1 with sequences"),
        ({"deterministic": None}, ValueError, "deterministic is None, expected one of [True, 'batch_invariant']"),
    ],
)
def test_bad_sizes(change, error, message):
    good = {"tokens": 8, "value_heads": 2, "key_dim": 64, "value_dim": 64, "dtype": torch.float32, "device": "cpu"}
    with pytest.raises(error) as raised:
        kda_cuda.workspace_size(**good | change)
    assert str(raised.value) == f"kda_cuda::workspace_size: {message}"


# ---- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.devices("emulator", "cuda")
def test_more_heads_than_a_grid_has(device):
    """Refused by the glue before anything is launched: expanded, so that they cost nothing."""
    x = Case("heads", 1, heads=1, key_dim=64, value_dim=64).inputs(device)
    many = {n: getattr(x, n).expand(-1, -1, 65536, *[-1] * (getattr(x, n).dim() - 3)) for n in ("v", "g", "beta")}
    pool = torch.zeros(1, 1, 64, 64, device=x.q.device).expand(1, 65536, 64, 64)
    with pytest.raises(ValueError, match=r"^kda_cuda::prefill: v has shape .* expected HV <= 65535"):
        raw_op(device)(*raw_arguments(x.replace(**many), pool))


@pytest.mark.devices("emulator", "cuda")
def test_thousands_of_sequences(device):
    """Most of them empty; the others are as they are alone."""
    lengths = [0] * 2500
    for n, length in ((0, 1), (1, 2), (700, 65), (701, 64), (1999, 3), (2499, 1)):
        lengths[n] = length
    case = Case("thousands", sum(lengths), lengths=tuple(lengths), heads=1, key_dim=16, value_dim=8, **MODEL)
    x = case.inputs(device).replace(initial_state=torch.ones(2500, 1, 16, 8, device=device))
    pool = make_pool(x, 2501, pad=8)
    pool[1:] = x.initial_state
    slots = tensor(x, range(2500, 0, -1))
    o = kda_cuda.prefill(**streams_of(x), state_pool=pool, slot_of=slots, **INVARIANT)
    bounds = x.sequence_bounds()
    for n, length in enumerate(lengths):
        if not length:
            assert bool((pool[2500 - n] == 1).all())
            continue
        alone = x.map(lambda y, n=n: y[:, bounds[n] : bounds[n + 1]] if y.dim() in (3, 4) and y.shape[0] == 1 else y)
        alone = alone.replace(cu_seqlens=None, initial_state=x.initial_state[:1])
        wanted, final = expect(alone, **INVARIANT)
        assert torch.equal(o[:, bounds[n] : bounds[n + 1]], wanted) and torch.equal(pool[2500 - n], final[0])


def far_apart(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of [B, T, ...] that put 2^31 elements between tokens."""
    inner = torch.empty(sizes, device="meta").stride()[2:]
    return (1 << 31, 1 << 31, *inner)


@pytest.mark.slow
@pytest.mark.devices("emulator", "cuda")
def test_strides_beyond_two_to_the_31(device):
    """Two tokens, two slots, each 2^31 elements apart: 4 GB of which the CPU touches a few pages."""
    x = Case("far", 2, heads=1, value_heads=2, dtype=torch.bfloat16, initial_state=True, **MODEL).inputs(device)
    storage = torch.empty((1 << 31) + 8192, dtype=torch.bfloat16, device=x.q.device)
    streams, at = {}, 0
    for name in ("q", "k", "v", "g", "beta"):
        y = getattr(x, name)
        streams[name] = torch.as_strided(storage, y.shape, far_apart(y.shape), at).copy_(y)
        at += 512
    states = torch.empty((1 << 31) + 8192, dtype=torch.bfloat16, device=x.q.device)
    pool = torch.as_strided(states, (2, 2, 64, 64), (1 << 31, 4096, 64, 1))
    initial = x.initial_state.bfloat16()
    wanted, final = expect(x, initial_state=initial.float())
    pool[1] = initial[0]
    o = kda_cuda.prefill(**streams_of(x.replace(**streams)), state_pool=pool, slot_of=tensor(x, [1]))
    assert torch.equal(o, wanted) and torch.equal(pool[1], final[0].bfloat16())


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """B T H K = 2^31 + ...: the last sequence is as it is alone. About 14 GB."""
    tokens, heads, key_dim, value_dim, last = (1 << 20) + 200, 8, 256, 8, 200
    make = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(1, tokens, heads, key_dim, generator=make, device="cuda", dtype=torch.bfloat16)
    g = torch.rand(1, tokens, heads, key_dim, generator=make, device="cuda", dtype=torch.bfloat16).neg_()
    assert x.numel() > 1 << 31
    streams = {"q": x, "k": x, "v": x[..., :value_dim], "g": g, "beta": x[..., 9].sigmoid()}
    cu_seqlens = torch.tensor([0, tokens - last, tokens], device="cuda")
    pool = torch.zeros(2, heads, key_dim, value_dim, device="cuda")
    o = kda_cuda.prefill(**streams, state_pool=pool, cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=True, **INVARIANT)
    alone = {name: y[:, -last:] for name, y in streams.items()}
    wanted, final = kda_cuda.chunk_kda(**alone, use_qk_l2norm_in_kernel=True, output_final_state=True, **INVARIANT)
    assert torch.equal(o[:, -last:], wanted) and torch.equal(pool[1:], final)
    assert bool(o.isfinite().all())


# ---- explain ---------------------------------------------------------------------------------------------------------


@pytest.mark.devices("emulator")
def test_explain_says_how_a_call_is_launched(device):
    x = SEQUENCES.inputs()
    pool = x.initial_state.clone()
    for deterministic, split, grid, invariant in (
        (
            True,
            "sequences into segments of 64 tokens, 2 for",
            "5x2x1",
            "no: whether a sequence is split depends on its batch",
        ),
        ("batch_invariant", "no sequence, as batch_invariant asks", "6x2x1", "yes, as asked"),
    ):
        told = kda_cuda.explain(op="prefill", **streams_of(x), state_pool=pool, deterministic=deterministic)
        plan = told.forward.plan
        assert told.forward.kernel and told.forward.op == "prefill" and told.backward is None
        assert plan["variant"] == "bf16_k64_sm90" and plan["chunk"] == "64"
        assert int(plan["prepare_grid"]) == 2 * int(plan["prepare_walkers"]) and plan["scan_grid"] == grid
        assert plan["split"].startswith("V into 1 of 64 columns; " + split) and plan["batch_invariant"] == invariant
        assert all(int(plan[f"{kernel}_shared_bytes"]) > 0 for kernel in ("prepare", "scan"))
        chunk = kda_cuda.explain(**x.public(), deterministic=deterministic).forward.plan
        assert chunk == plan
    assert torch.equal(pool, x.initial_state) and testing.take_record() == []


def test_explain_of_the_reference():
    x = SEQUENCES.inputs()
    told = kda_cuda.explain(op="prefill", **streams_of(x), state_pool=x.initial_state)
    assert str(told) == (
        "prefill\n  forward   reference  torch.ops.kda_cuda.prefill: CPU tensors run the PyTorch reference"
    )
