"""decode as torch sees it: opcheck, torch.compile, autocast; and fused_recurrent_kda on top of it."""

from __future__ import annotations

import pytest
import torch

import kda_cuda
from kda_cuda import DraftRecords, testing, variants

from ..decode_layer.test_decode_layer import arguments
from ..support import decode_calls
from ..support.cases import Case
from .test_decode import initial, laid_out
from .test_decode_errors import raw_call, records

MODEL = {"gate": "long", "beta_sigmoid": True, "dtype": torch.bfloat16}


def op_samples(device="cpu") -> dict[str, list[tuple]]:
    rich = {
        "slot_of": torch.tensor([[4, 2, 0, 1, 3, 5, 6, 7], [-1] * 8], device=device),
        "state": torch.zeros(8, 4, 16, 24, device=device),
        "num_accepted_tokens": torch.tensor([2, 1], device=device),
        "state_per_token": True,
        "use_gate": True,
        "A_log": torch.zeros(4, device=device),
        "dt_bias": torch.zeros(4, 16, device=device),
    }
    drafts = [x.to(device) for x in records()]
    read_only = dict(zip(("record_k", "record_u", "record_g"), drafts, strict=True)) | {"in_place": False}
    parents = torch.arange(-1, 7, device=device).repeat(2, 1)
    tree = read_only | {"parent_token": parents}
    elsewhere = {"in_place": False, "new_state": torch.zeros(2, 4, 16, 24, device=device)}
    accepted, state = torch.tensor([3, 0], device=device), torch.zeros(2, 4, 16, 24, device=device)
    return {
        "decode": [raw_call(device, **change) for change in ({}, rich, read_only, tree, elsewhere)],
        "decode_commit": [
            (state, None, None, None, *drafts, accepted, None, None, None, False, False),
            (
                state,
                torch.tensor([1, 0], device=device),
                state.clone(),
                None,
                *drafts,
                accepted,
                None,
                None,
                None,
                False,
                True,
            ),
            (state, None, None, None, *drafts, None, None, parents, accepted, False, False),
        ],
    }


@pytest.mark.parametrize("name", list(op_samples()))
def test_opcheck(name, device):
    namespace = getattr(torch.ops, "kda_cuda_emulated" if device.name == "emulator" else "kda_cuda")
    op = getattr(namespace, name).default
    for sample in op_samples(device)[name]:
        _, kernels = device.run(lambda a=sample: torch.library.opcheck(op, a))
        assert any(kernel in (name, f"{name}_tree") for kernel in kernels) == device.runs_kernels


@pytest.mark.devices("cpu", "cuda")
def test_compiles_without_a_graph_break(device):
    """In-place updates of the pool survive functionalisation."""
    case = Case("compiled", 2, batch=3, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x, rows=5), True, torch.float32)
    slots = torch.tensor([3, 0, -1], device=device)

    def step(pool):
        return 2 * decode_calls.decode(x, pool, slot_of=slots)

    expected_pool, pool = state.clone(), state.clone()
    expected = step(expected_pool)
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(pool), expected)
    assert torch.equal(pool, expected_pool) and not torch.equal(pool, state)


def test_autocast(device):
    case = Case("autocast", 2, gate="mild")
    x = case.inputs(device)
    state = initial(case, x)
    half = {name: t.bfloat16() if name in "qkv" else t for name, t in decode_calls.streams(x).items()}
    expected = kda_cuda.decode(**half, state=state.clone(), **decode_calls.options(x))
    with torch.autocast(device, torch.bfloat16):
        o = decode_calls.decode(x, state)
    assert o.dtype == torch.bfloat16 and torch.equal(o, expected)


# ---- fused_recurrent_kda ---------------------------------------------------------------------------------------------


def recurrent(x, **more):
    options = decode_calls.options(x) | {"cu_seqlens": x.cu_seqlens}
    return kda_cuda.fused_recurrent_kda(**decode_calls.streams(x), **options, **more)


@pytest.mark.parametrize("v_first", [False, True])
@pytest.mark.parametrize("lengths", [None, (3, 0, 2)])
def test_recurrent_runs_decode(lengths, v_first, device):
    batch = {"batch": 2} if lengths is None else {"lengths": lengths}
    case = Case("recurrent", 5, heads=1, value_heads=2, **batch, **MODEL)
    x = case.inputs(device)
    x, state = laid_out(x, initial(case, x), v_first, torch.float32)
    before = state.clone()
    (o, final_state), kernels = device.run(lambda: recurrent(x, initial_state=state, output_final_state=True))
    assert kernels == (["decode"] if device.runs_kernels else [])
    assert torch.equal(state, before)
    assert torch.equal(o, decode_calls.decode(x, state)) and torch.equal(final_state, state)
    o, none = recurrent(x, initial_state=before)
    assert none is None


def test_recurrent_takes_chunks_for_long_inputs(device):
    case = Case("long input", 40, heads=1, **MODEL)
    x = case.inputs(device)
    (o, none), kernels = device.run(lambda: recurrent(x))
    assert none is None and "decode" not in kernels and bool(kernels) == device.runs_kernels
    torch.testing.assert_close(o, decode_calls.decode(x, None), rtol=0.05, atol=0.02)


def test_many_short_sequences_are_decoded(device):
    """Twenty sequences of a token each are no long input."""
    case = Case("short sequences", 20, lengths=(1,) * 20, heads=1, **MODEL)
    x = case.inputs(device)
    _, kernels = device.run(lambda: recurrent(x))
    assert kernels == (["decode"] if device.runs_kernels else [])


@pytest.mark.parametrize("columns", [None, 3])
@pytest.mark.parametrize("in_place", [False, True])
def test_recurrent_in_a_pool(in_place, columns, device):
    """What vLLM asks of it: pools by index, drafts in columns, buffers of its own."""
    case = Case("recurrent pool", 3, batch=2, heads=1, value_heads=2, **MODEL)
    x = case.inputs(device)
    x, pool = laid_out(x, initial(case, x, rows=8), True, torch.bfloat16)
    slots = torch.tensor([6, 1], device=device)
    more = {}
    if columns:
        slots = torch.tensor([[0, 6, 2], [1, 3, 4]], device=device)
        more = {"num_accepted_tokens": torch.tensor([2, 1], device=device)}
    expected = pool.clone()
    alone = pool[[6, 1]].clone()
    state_per_token = in_place and columns is not None
    want = decode_calls.decode(x, alone)
    if in_place:
        decode_calls.decode(x, expected, slot_of=slots, state_per_token=state_per_token, **more)
    out = torch.empty_like(want)
    o, final_state = recurrent(x, initial_state=pool, ssm_state_indices=slots, inplace_final_state=in_place, out=out,
                               output_final_state=True, **more)  # fmt: skip
    assert o is out and torch.equal(o, want)
    assert torch.equal(pool, expected)
    assert final_state is pool if in_place else torch.equal(final_state, alone)


def test_explain_names_the_op(device):
    x = Case("explained", 1, batch=2, **MODEL).inputs(device)
    more = decode_calls.options(x) | decode_calls.streams(x)
    state, drafts = initial(Case("explained", 1), x), DraftRecords.empty(x.k, x.v)
    accepted = torch.tensor([1, 0], device=device)
    explained = [
        kda_cuda.explain(op="fused_recurrent_kda", **more),
        kda_cuda.explain(op="decode", **more, state=state),
        kda_cuda.explain(drafts, accepted, state, op="commit"),
        kda_cuda.explain(op="decode_layer", **arguments(device)),
    ]
    assert [e.forward.op for e in explained] == ["decode", "decode", "decode_commit", "decode_layer"]
    assert all(e.forward.kernel == device.runs_kernels and e.backward is None for e in explained)
    assert all(bool(e.forward.plan) == device.runs_kernels for e in explained)


@pytest.mark.devices("emulator", "cuda")
def test_explain_says_how_a_step_is_launched(device):
    x = Case("planned", 3, batch=2, key_dim=128, value_dim=128, **MODEL).inputs(device)
    more = decode_calls.options(x) | decode_calls.streams(x) | {"state_v_first": True}
    state = torch.zeros(2, 2, 128, 128, dtype=torch.bfloat16, device=device)
    plan = kda_cuda.explain(op="decode", **more, state=state).forward.plan
    token = 4 * (3 * 128 + 64 + 2) + 8  # q, k, decay, v, beta and q . k, a multiple of 16
    assert plan == {
        "variant": "bits16_k128",
        "states": "[V, K], 16 bytes at a time",
        "grid": "8",
        "threads": "128",
        "values_per_block": "64",
        "shared_bytes": str(3 * token + 16),
    }
    shifted = torch.zeros(state.numel() + 1, dtype=torch.bfloat16, device=device)[1:].view(state.shape)
    by_element = kda_cuda.explain(op="decode", **more, state=shifted).forward.plan
    assert by_element["states"] == "[V, K], element by element"
    drafts = DraftRecords.empty(x.k, x.v)
    parents = torch.tensor([[-1, 0, 0]] * 2, device=device)
    tree = kda_cuda.explain(op="decode", **more, state=state, records=drafts, parent_token=parents).forward.plan
    assert tree["states"] == "[V, K], element by element" and tree["shared_bytes"] == str(4 * token + 16 + 32)
    path = {"parent_token": parents, "accepted_token": parents[:, 1], "state_v_first": True}
    assert kda_cuda.explain(drafts, None, state, op="commit", **path).forward.plan == tree
    layer = kda_cuda.explain(op="decode_layer", **arguments(device, dim=128, heads=3)).forward.plan
    assert (layer["variant"], layer["grid"], layer["threads"]) == ("fp32_k128", "6", "512")
    nothing = kda_cuda.explain(op="decode", **{**more, **{n: more[n][:0] for n in ("q", "k", "v", "g", "beta")}})
    assert nothing.forward.plan == {"plan": "none: there is nothing to do"}


@pytest.mark.devices("emulator")
@pytest.mark.parametrize("v_first", [True, False], ids=["v_first", "k_first"])
@pytest.mark.parametrize("dims", [(64, 40), (128, 64), (200, 33)], ids=str)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_schedules_agree_bit_by_bit(state_dtype, dims, v_first, device):
    """Steps, drafts, a commit and a layer, with the threads of a block in any order."""
    case = Case(f"schedules {dims}", 9, heads=1, key_dim=dims[0], value_dim=dims[1], **MODEL)
    x = case.inputs()
    x, state = laid_out(x, initial(case, x), v_first, state_dtype)
    results = []
    for seed in range(4):
        with testing.emulated(seed=seed, threads=1 + seed % 2):
            drafts, verified, stepped = DraftRecords.empty(x.k, x.v), state.clone(), state.clone()
            outputs = [decode_calls.decode(x, verified, records=drafts), decode_calls.decode(x, stepped)]
            kda_cuda.commit(drafts, torch.tensor([7]), verified, state_v_first=v_first)
            layer = arguments("cpu", torch.bfloat16, state_dtype, dim=dims[0], heads=1, batch=1)
            results.append([*outputs, *drafts, verified, stepped, kda_cuda.decode_layer(**layer), layer["state"]])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_op_lists_agree():
    """decode_layer has its own file."""
    assert {*op_samples(), "decode_layer"} == {name for name in variants.SCHEMAS if name.startswith("decode")}
