"""The ops as torch sees them: opcheck, fakes, layouts of inputs, nothing modified, nothing aliased, empty inputs."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

import kda_cuda
from kda_cuda import library, schemas
from kda_cuda.schemas import Chunk, ChunkBwd, Conv, ConvBwd, Gate, GateBwd, Norm, NormBwd

B, T, H, HV, K, V = 2, 40, 1, 2, 32, 16
SEQUENCES = [0, 11, 11, 40]


def streams(device="cpu", dtype=torch.float32, batch=B, tokens=T, seed=0) -> dict:
    make = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=make).to(device=device, dtype=dtype)

    return {
        "q": randn(batch, tokens, H, K),
        "k": randn(batch, tokens, H, K),
        "v": randn(batch, tokens, HV, V),
        "g": randn(batch, tokens, HV, K),
        "beta": randn(batch, tokens, HV),
    }


def gate(device="cpu", dtype=torch.float32) -> dict:
    make = torch.Generator().manual_seed(1)
    A_log, dt_bias = torch.rand(HV, generator=make), torch.randn(HV, K, generator=make)
    return {"A_log": A_log.to(device, dtype), "dt_bias": dt_bias.to(device, dtype)}


def state(device="cpu", dtype=torch.float32, sequences=B, v_first=False) -> torch.Tensor:
    make = torch.Generator().manual_seed(2)
    x = torch.randn(sequences, HV, K, V, generator=make).to(device, dtype)
    return x.transpose(-1, -2).contiguous() if v_first else x


ALL_TRANSFORMS = {
    "use_qk_l2norm_in_kernel": True,
    "use_gate_in_kernel": True,
    "use_beta_sigmoid_in_kernel": True,
    "allow_neg_eigval": True,
}


OPTIONS = ("use_qk_l2norm", "use_gate", "use_beta_sigmoid", "allow_neg_eigval")


def chunk_arguments(varlen=False, dtype=torch.float32) -> dict:
    """What the chunkwise ops share, with everything that there is."""
    return {
        **streams(dtype=dtype, batch=1 if varlen else B),
        **gate(dtype=dtype),
        "initial_state": state(dtype=dtype, sequences=len(SEQUENCES) - 1 if varlen else B),
        "cu_seqlens": torch.tensor(SEQUENCES) if varlen else None,
        "scale": 0.2,
        **dict.fromkeys(OPTIONS, True),
        "lower_bound": None,
        "state_v_first": False,
    }


def plain_arguments(dtype=torch.float32) -> dict:
    """What they share, with nothing that may be left out."""
    none = dict.fromkeys(("A_log", "dt_bias", "initial_state", "cu_seqlens", "lower_bound"))
    return {**streams(dtype=dtype), **none, **dict.fromkeys(OPTIONS, False), "scale": 0.2, "state_v_first": True}


def surrounding_samples() -> dict[str, list[tuple]]:
    """Of the convolution and the norm."""
    x, dy = torch.randn(1, T, 8), torch.randn(1, T, 8)
    rich = {
        "x": x,
        "weight": torch.randn(8, 4),
        "bias": torch.randn(8),
        "initial_state": torch.randn(3, 8, 3),
        "cu_seqlens": torch.tensor(SEQUENCES),
        "silu": True,
    }
    rich |= {"x2": x[..., :3], "x3": None, "weight": torch.randn(11, 4), "bias": torch.randn(11)}
    rich["initial_state"] = torch.randn(3, 11, 3)
    absent = dict.fromkeys(("x2", "x3", "bias", "initial_state", "cu_seqlens"))
    poor = {"x": x.bfloat16().expand(2, T, 8), "weight": torch.randn(8, 2), **absent, "silu": False}
    conv = [Conv(**rich, output_final_state=True), Conv(**poor, output_final_state=False)]
    rows = {"x": torch.randn(B, T, H, K), "gate": torch.randn(B, T, H, K), "weight": torch.randn(K), "eps": 1e-5}
    narrow = {**rows, "x": rows["x"].half(), "gate": rows["gate"].half(), "silu": True}
    norm = [Norm(**rows, silu=False), Norm(**narrow)]
    return {
        "short_conv_fwd": conv,
        "short_conv": conv,
        "short_conv_bwd": [
            ConvBwd(**rich, dy=dy, dy2=dy[..., :3], dy3=None, dfinal_state=torch.randn(3, 11, 3)),
            ConvBwd(**poor, dy=dy.bfloat16().expand(2, T, 8), dy2=None, dy3=None, dfinal_state=None),
        ],
        "gated_rmsnorm_fwd": norm,
        "gated_rmsnorm": norm,
        "gated_rmsnorm_bwd": [NormBwd(**x._asdict(), dy=x.gate[..., :1].expand_as(x.gate)) for x in norm],
    }


def op_samples() -> dict[str, list[tuple]]:
    """Arguments for every op: one call as rich as it can be, one as poor."""
    rich, plain, packed = chunk_arguments(), plain_arguments(), chunk_arguments(varlen=True)
    of_gate = {name: rich[name] for name in ("g", "A_log", "dt_bias")}
    do, d_state = torch.randn(B, T, HV, V), state()

    def chunk(x: dict, final: bool, size: int, keep: bool, rows: int | None = None) -> Chunk:
        return Chunk(**x, output_final_state=final, chunk_size=size, output_chunk_states=keep, chunk_state_rows=rows)

    def chunk_bwd(x: dict, do: torch.Tensor, size: int, d_state: torch.Tensor | None = None, **more) -> ChunkBwd:
        return ChunkBwd(**x, do=do, dfinal_state=d_state, chunk_size=size, **more)

    forward = [chunk(plain, False, 32, False), chunk(packed, True, 64, False)]
    kept = [chunk(rich, True, 64, True), chunk(packed, True, 32, True, rows=2)]
    gates = (of_gate | {"lower_bound": None}, {"g": rich["g"], "A_log": None, "dt_bias": None, "lower_bound": -5.0})
    return {
        "kda_gate_fwd": [Gate(**x, dtype=d) for x, d in zip(gates, (torch.bfloat16, torch.float32), strict=True)],
        "kda_gate_bwd": [GateBwd(**x, dy=dy) for x, dy in zip(gates, (do[..., :1].expand_as(rich["g"]), rich["g"]),
                                                              strict=True)],
        "kda_gate": [Gate(**of_gate, lower_bound=-5.0, dtype=torch.float32),
                     Gate(**of_gate | {"dt_bias": None}, lower_bound=None, dtype=torch.float16)],
        "chunk_fwd": [*forward, *kept],
        "chunk": [*forward, chunk(rich, True, 64, False)],
        "chunk_bwd": [
            chunk_bwd(rich, do, 64, d_state),
            chunk_bwd(plain, do, 32),
            chunk_bwd(packed, do[:1], 64, wanted=0b10100110, batch_invariant=True),
            chunk_bwd(rich, do[..., :1].expand_as(do), 64, wanted=0b01011001),
        ],
        **surrounding_samples(),
    }  # fmt: skip


def test_every_op_has_a_sample():
    """Ops of one step have their own test file (they write in place), and so their own samples."""
    assert set(op_samples()) <= set(library.SCHEMAS)
    assert {name for name in library.SCHEMAS if not name.startswith(("decode", "prefill"))} <= set(op_samples())


@pytest.mark.parametrize("name", list(library.REFERENCE))
def test_names_of_arguments(name):
    """Those of the schema are those of the reference, in order and with the same defaults."""
    parameters = inspect.signature(library.REFERENCE[name]).parameters.values()
    assert [p.name for p in parameters] == list(schemas.ARGUMENTS[name]._fields)
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert defaults == schemas.ARGUMENTS[name]._field_defaults


def with_gradients(arguments: tuple) -> tuple:
    def leaf(x):
        return x.clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return tuple(leaf(x) for x in arguments)


@pytest.mark.parametrize("name", list(op_samples()))
@pytest.mark.parametrize("namespace", ["kda_cuda", "kda_cuda_reference"])
def test_opcheck(name, namespace):
    op = getattr(getattr(torch.ops, namespace), name).default
    for arguments in op_samples()[name]:
        functional = name in library.FUNCTIONAL
        torch.library.opcheck(op, with_gradients(arguments) if functional else arguments)


@pytest.mark.devices("emulator", "cuda")
@pytest.mark.parametrize("name", list(op_samples()))
def test_opcheck_of_kernels(name, device):
    from kda_cuda import variants

    namespace = "kda_cuda_emulated" if device.name == "emulator" else "kda_cuda"
    if library.FUNCTIONAL.get(name, name) not in variants.kernels(namespace):
        assert name == "chunk_bwd", f"{name} has lost its kernel"
        return
    op = getattr(getattr(torch.ops, namespace), name).default
    utilities = ("test_schema", "test_faketensor", "test_autograd_registration")
    for arguments in op_samples()[name]:
        arguments = tuple(x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments)
        if name in library.FUNCTIONAL:
            arguments, utilities = with_gradients(arguments), (*utilities[:3], "test_aot_dispatch_static")
        _, kernels = device.run(lambda op=op, a=arguments, u=utilities: torch.library.opcheck(op, a, test_utils=u))
        assert any(kernel.startswith(library.FUNCTIONAL.get(name, name).removesuffix("_fwd")) for kernel in kernels)


# ---- memory ----------------------------------------------------------------------------------------------------------


def relaid(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in other layouts."""
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    padded[..., : x.shape[-1]] = x
    last_strided = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype, device=x.device)
    last_strided[..., 1] = x
    offset = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype, device=x.device)
    offset[1:] = x.flatten()
    return {
        "padded rows": padded[..., : x.shape[-1]],
        "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "strided last dimension": last_strided[..., 1],
        "unaligned": offset[1:].view(x.shape),
    }


LAYOUTS = ["padded rows", "heads first", "strided last dimension", "unaligned"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_do_not_depend_on_layout(layout, device):
    dtype = torch.bfloat16 if device.runs_kernels else torch.float32
    x, more = streams(device, dtype), {**gate(device), **ALL_TRANSFORMS, "output_final_state": True}
    initial = state(device)
    expected = kda_cuda.chunk_kda(**x, **more, initial_state=initial)
    moved = {name: relaid(t)[layout] for name, t in x.items()}
    assert sum(not t.is_contiguous() or t.storage_offset() > 0 for t in moved.values()) >= 3  # one head has one layout
    (o, final_state), kernels = device.run(
        lambda: kda_cuda.chunk_kda(**moved, **more, initial_state=relaid(initial)[layout])
    )
    assert torch.equal(o, expected[0]) and torch.equal(final_state, expected[1])
    assert bool(kernels) == device.runs_kernels


def test_zero_stride_batch(device):
    dtype = torch.bfloat16 if device.runs_kernels else torch.float32
    x = streams(device, dtype, batch=1)
    expanded = {name: t.expand(3, *t.shape[1:]) for name, t in x.items()}
    copied = {name: t.contiguous() for name, t in expanded.items()}
    options = {**gate(device), **ALL_TRANSFORMS, "output_final_state": True}
    initial = state(device, sequences=1).expand(3, HV, K, V)
    results = kda_cuda.chunk_kda(**expanded, initial_state=initial, **options)
    wanted = kda_cuda.chunk_kda(**copied, initial_state=initial.contiguous(), **options)
    for a, b in zip(results, wanted, strict=True):
        assert torch.equal(a, b)


def test_strided_cu_seqlens(device):
    x = streams(device, batch=1)
    x["g"] = -x["g"].abs()
    cu_seqlens = torch.tensor(SEQUENCES, device=device)
    strided = torch.stack([cu_seqlens, cu_seqlens + 100], 1)[:, 0]
    for dtype in (torch.int32, torch.int64):
        a = kda_cuda.chunk_kda(**x, cu_seqlens=cu_seqlens.to(dtype), use_qk_l2norm_in_kernel=True)[0]
        b = kda_cuda.chunk_kda(**x, cu_seqlens=strided.to(dtype), use_qk_l2norm_in_kernel=True)[0]
        assert torch.equal(a, b)


@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
@pytest.mark.parametrize("tokens", [0, 1, T])
def test_inputs_are_untouched_and_outputs_are_new(function, tokens, device):
    inputs = {**streams(device, tokens=tokens), **gate(device), "initial_state": state(device)}
    before = {name: x.clone() for name, x in inputs.items()}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    call = getattr(kda_cuda, function)
    for wants_grad in (False, True):
        with torch.set_grad_enabled(wants_grad):
            outputs = call(**leaves, **ALL_TRANSFORMS, output_final_state=True)
        if wants_grad:
            outputs += torch.autograd.grad([o.sum() for o in outputs], list(leaves.values()))
        owners = {x.untyped_storage().data_ptr() for x in inputs.values() if x.numel()}
        memory = [o.untyped_storage().data_ptr() for o in outputs if o.numel()]
        assert owners.isdisjoint(memory) and len(set(memory)) == len(memory)
        assert all(torch.equal(inputs[name], x) for name, x in before.items())


# ---- nothing to do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
def test_no_tokens(function, device):
    """T = 0: the final state is the initial one, or zero; its gradient passes through."""
    x = streams(device, tokens=0)
    initial = state(device).requires_grad_()
    o, final_state = getattr(kda_cuda, function)(**x, initial_state=initial, output_final_state=True)
    assert o.shape == (B, 0, HV, V) and torch.equal(final_state, initial)
    (gradient,) = torch.autograd.grad(final_state.square().sum(), initial)
    assert torch.equal(gradient, 2 * initial)
    zero = getattr(kda_cuda, function)(**x, output_final_state=True)[1]
    assert zero.shape == (B, HV, K, V) and not zero.any()


@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
def test_no_batch(function, device):
    inputs = {**streams(device, batch=0), **gate(device), "initial_state": state(device, sequences=0)}
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    o, final_state = getattr(kda_cuda, function)(**leaves, **ALL_TRANSFORMS, output_final_state=True)
    assert o.shape == (0, T, HV, V) and final_state.shape == (0, HV, K, V)
    gradients = torch.autograd.grad(o.sum() + final_state.sum(), list(leaves.values()))
    assert all(not d.any() for d in gradients)


@pytest.mark.parametrize("function", ["chunk_kda", "fused_recurrent_kda"])
@pytest.mark.parametrize("v_first", [False, True])
def test_only_empty_sequences(function, v_first, device):
    x = streams(device, batch=1, tokens=0)
    initial = state(device, sequences=3, v_first=v_first)
    cu_seqlens = torch.zeros(4, dtype=torch.int32, device=device)
    call = getattr(kda_cuda, function)
    options = {"state_v_first": v_first, "cu_seqlens": cu_seqlens, "output_final_state": True}
    assert torch.equal(call(**x, initial_state=initial, **options)[1], initial)
    assert not call(**x, **options)[1].any()


def test_empty_sequence_keeps_its_state(device):
    x = streams(device, batch=1)
    initial = state(device, sequences=3)
    cu_seqlens = torch.tensor(SEQUENCES, device=device)
    final = kda_cuda.chunk_kda(**x, **gate(device), **ALL_TRANSFORMS, initial_state=initial, cu_seqlens=cu_seqlens,
                               output_final_state=True)[1]  # fmt: skip
    assert torch.equal(final[1], initial[1]) and not torch.equal(final[0], initial[0])


# ---- kept states -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [32, 64])
@pytest.mark.parametrize("v_first", [False, True])
def test_intermediate_states(chunk_size, v_first, device):
    """h holds the state before each chunk: what the prefix leaves behind."""
    x, tokens = streams(device, tokens=150), 150
    options = {**gate(device), **ALL_TRANSFORMS, "state_v_first": v_first}
    initial = state(device, v_first=v_first)
    with torch.inference_mode():
        _, none, h = kda_cuda.chunk_kda(**x, **options, initial_state=initial, chunk_size=chunk_size,
                                        return_intermediate_states=True)  # fmt: skip
        assert none is None
        assert h.shape == (B, -(-tokens // chunk_size), *initial.shape[1:]) and h.dtype == x["k"].dtype
        for i in range(h.shape[1]):
            prefix = {name: t[:, : i * chunk_size] for name, t in x.items()}
            final = kda_cuda.chunk_kda(**prefix, **options, initial_state=initial, output_final_state=True)[1]
            torch.testing.assert_close(h[:, i], final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("known", [False, True])
def test_intermediate_states_of_sequences(known, device):
    x = streams(device, batch=1, tokens=150)
    bounds = [0, 70, 70, 134, 150]
    cu_seqlens = torch.tensor(bounds, device=device)
    options = {**gate(device), **ALL_TRANSFORMS, "return_intermediate_states": True}
    initial = state(device, sequences=4)
    with torch.inference_mode():
        _, _, h = kda_cuda.chunk_kda(**x, **options, initial_state=initial, cu_seqlens=cu_seqlens,
                                     cu_seqlens_cpu=torch.tensor(bounds) if known else None)  # fmt: skip
        alone = []
        for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
            one = {name: t[:, begin:end] for name, t in x.items()}
            alone.append(kda_cuda.chunk_kda(**one, **options, initial_state=initial[n : n + 1])[2])
    assert h.shape == (1, 4, HV, K, V)  # 2 + 0 + 1 + 1
    torch.testing.assert_close(h, torch.cat(alone, 1), rtol=1e-5, atol=1e-5)


def test_accepted_without_effect():
    x = streams()
    x["g"] = -x["g"].abs()
    expected = kda_cuda.chunk_kda(**x, use_qk_l2norm_in_kernel=True)[0]
    options = ({"safe_gate": True}, {"disable_recompute": True}, {"use_graph": True}, {"max_num_seqs": 8},
               {"cp_context": None}, {"A_log": torch.zeros(HV), "dt_bias": None}, {"lower_bound": -5.0})  # fmt: skip
    for option in options:
        assert torch.equal(kda_cuda.chunk_kda(**x, use_qk_l2norm_in_kernel=True, **option)[0], expected), option


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes_of_results(dtype):
    x = streams(dtype=dtype)
    for g_dtype in {dtype, torch.float64 if dtype == torch.float64 else torch.float32}:
        x["g"], x["beta"] = -x["g"].abs().to(g_dtype), x["beta"].to(g_dtype)
        o, final_state = kda_cuda.chunk_kda(**x, output_final_state=True, use_qk_l2norm_in_kernel=True)
        assert o.dtype == dtype and final_state.dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_meta_tensors():
    """Shapes without memory, as in a model built on the meta device."""
    x = {name: t.to("meta") for name, t in streams().items()}
    o, final_state = kda_cuda.chunk_kda(**x, output_final_state=True)
    assert o.shape == (B, T, HV, V) and final_state.shape == (B, HV, K, V) and o.is_meta and final_state.is_meta
    assert kda_cuda.kda_gate(x["g"], torch.zeros(HV, device="meta")).shape == (B, T, HV, K)
    rows, weight = x["beta"], torch.zeros(HV, 4, device="meta")
    y, state = kda_cuda.short_conv(rows, weight, output_final_state=True)
    assert y.shape == rows.shape and state.shape == (B, HV, 3) and y.is_meta and state.is_meta
    ys, _ = kda_cuda.short_conv((rows[..., :1], rows[..., 1:]), weight)
    assert [y.shape[-1] for y in ys] == [1, HV - 1] and ys[1].is_meta
    assert kda_cuda.gated_rmsnorm(rows, rows, weight[:, 0]).shape == rows.shape


def test_two_threads_at_once():
    """DataLoader workers and servers call from several threads."""
    from concurrent.futures import ThreadPoolExecutor

    x = streams()
    x["g"] = -x["g"].abs()
    expected = kda_cuda.chunk_kda(**x, use_qk_l2norm_in_kernel=True)[0]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: kda_cuda.chunk_kda(**x, use_qk_l2norm_in_kernel=True)[0], range(16))
    assert all(torch.equal(o, expected) for o in results)
