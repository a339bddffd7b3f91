"""The ops inside torch's machinery: compile, autocast, checkpointing, inference mode, copies, workers, gradcheck."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import kda_cuda
from kda_cuda.layers import KimiDeltaAttention
from kda_cuda.model import HybridConfig, HybridLM

from ..support.cases import Case
from .test_ops import ALL_TRANSFORMS, gate, state, streams

SMALL = HybridConfig(
    vocab_size=50, hidden_size=32, num_layers=4, head_dim=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=16, intermediate_size=64,
)  # fmt: skip


def everything(device, tokens: int, dtype=torch.float32) -> dict[str, Tensor]:
    """Every differentiable argument of chunk_kda, as leaves."""
    inputs = {**streams(device, dtype, tokens=tokens), **gate(device), "initial_state": state(device)}
    return {name: x.requires_grad_() for name, x in inputs.items()}


def chunk(**x: Tensor) -> tuple[Tensor, ...]:
    return kda_cuda.chunk_kda(**x, **ALL_TRANSFORMS, output_final_state=True)


def recurrent(**x: Tensor) -> tuple[Tensor, ...]:
    return kda_cuda.fused_recurrent_kda(**x, **ALL_TRANSFORMS, output_final_state=True)


def own_gate(g: Tensor, A_log: Tensor, dt_bias: Tensor, **_: Tensor) -> tuple[Tensor, ...]:
    return kda_cuda.kda_gate(g, A_log, dt_bias), kda_cuda.kda_gate(g, A_log, dt_bias, lower_bound=-5.0)


def outputs_and_gradients(function, inputs: dict[str, Tensor]) -> list[Tensor]:
    """With weights on the outputs that no symmetry hides."""
    outputs = function(**inputs)
    loss = sum((y.float() * torch.linspace(0.5, 1, y.numel(), device=y.device).view_as(y)).sum() for y in outputs)
    used = [x for x in inputs.values() if x.requires_grad]
    gradients = torch.autograd.grad(loss, used, allow_unused=True)
    return [y.detach() for y in outputs] + [d for d in gradients if d is not None]


def assert_all_close(results: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(results, expected, strict=True)):
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, i=i: f"result {i}: {text}")


# ---- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("function", "tokens"), [(chunk, 70), (recurrent, 1), (recurrent, 40), (own_gate, 5)])
def test_compiled_equals_eager(function, tokens, device):
    inputs = everything(device, tokens)
    expected = outputs_and_gradients(function, inputs)
    compiled = torch.compile(function, fullgraph=True)
    results, kernels = device.run(lambda: outputs_and_gradients(compiled, inputs))
    assert_all_close(results, expected, rtol=1e-5, atol=1e-5)
    assert len(results) > len(function(**inputs)) and bool(kernels) == device.runs_kernels
    with torch.no_grad():
        assert_all_close(list(compiled(**inputs)), list(function(**inputs)), rtol=1e-5, atol=1e-5)


@pytest.mark.devices("cpu", "cuda")
def test_compiled_once_for_any_length(device):
    """Dynamic shapes: no graph per length, packed sequences included."""
    compiled = torch.compile(kda_cuda.chunk_kda, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (40, 70, 130):
        x = streams(device, batch=1, tokens=tokens)
        options = {**gate(device), **ALL_TRANSFORMS}
        options["cu_seqlens"] = torch.tensor([0, 11, 11, tokens], device=device)
        with torch.compiler.set_stance("fail_on_recompile" if tokens > 40 else "default"):
            o = compiled(**x, **options)[0]
        torch.testing.assert_close(o, kda_cuda.chunk_kda(**x, **options)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.devices("cpu", "cuda")
def test_compiled_model_trains_as_in_eager(device):
    torch.manual_seed(0)
    model = HybridLM(dataclasses.replace(SMALL, num_layers=2, full_attention_every=2)).to(device)
    tokens = torch.randint(50, (2, 34), device=device)

    def gradients(forward) -> list[Tensor]:
        model.zero_grad()
        forward(tokens[:, :-1]).logsumexp(-1).square().mean().backward()
        return [p.grad for p in model.parameters()]

    compiled = torch.compile(model, fullgraph=True)
    assert_all_close(gradients(compiled), gradients(model), rtol=1e-3, atol=1e-5)


# ---- autocast --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [chunk, recurrent])
def test_autocast_is_a_cast_of_q_k_v(function, dtype, device):
    """The gate, beta and the state stay in fp32; gradients come back in the dtype of the leaves."""
    inputs = everything(device, 12)
    with torch.autocast(device, dtype):
        o, final_state = function(**inputs)
    assert o.dtype == dtype and final_state.dtype == torch.float32
    gradients = torch.autograd.grad(o.float().sum() + final_state.sum(), list(inputs.values()))
    assert all(d.dtype == torch.float32 and d.isfinite().all() for d in gradients)
    cast = {name: x.to(dtype) if name in ("q", "k", "v") else x for name, x in inputs.items()}
    expected = function(**cast)
    assert torch.equal(o, expected[0]) and torch.equal(final_state, expected[1])
    with torch.autocast(device, dtype, enabled=False):
        assert function(**inputs)[0].dtype == torch.float32


def test_autocast_does_not_touch_the_mathematics():
    """The reference inside is that without autocast: its products are not rounded."""
    inputs = streams(dtype=torch.bfloat16)
    inputs["g"] = -inputs["g"].abs()
    expected = kda_cuda.chunk_kda(**inputs, use_qk_l2norm_in_kernel=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kda_cuda.chunk_kda(**inputs, use_qk_l2norm_in_kernel=True)[0], expected)
        g = torch.randn(3, 2, 8)
        assert kda_cuda.kda_gate(g, torch.zeros(2)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_under_autocast(dtype, device):
    torch.manual_seed(0)
    model, tokens = HybridLM(SMALL).to(device), torch.randint(50, (2, 33), device=device)
    with torch.no_grad():
        expected = model(tokens)
    with torch.autocast(device, dtype):
        logits = model(tokens)
        cache = model.new_cache(2)
        decoded = torch.cat([model(part, cache) for part in tokens.split((31, 1, 1), dim=1)], 1)
    logits.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    for y in (logits, decoded):
        assert (y - expected).square().mean().sqrt() <= 0.05 * expected.square().mean().sqrt()


# ---- checkpointing, inference mode -----------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(use_reentrant, device):
    torch.manual_seed(0)
    layer = KimiDeltaAttention(32, num_heads=2, head_dim=16).to(device)
    x = torch.randn(2, 70, 32).to(device).requires_grad_()

    def gradients(forward) -> list[Tensor]:
        leaves = [x, *layer.parameters()]
        for leaf in leaves:
            leaf.grad = None
        forward(x).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(layer)
    results = gradients(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("function", [chunk, recurrent, own_gate])
def test_inference_mode_changes_no_bit(function, device):
    inputs = everything(device, 12)
    with torch.no_grad():
        expected = function(**inputs)
    with torch.inference_mode():
        results = function(**inputs)
    assert all(torch.equal(a, b) and a.is_inference() for a, b in zip(results, expected, strict=True))
    if function is not own_gate:
        with torch.no_grad():  # a state of inference mode may be read outside of it
            function(**{**inputs, "initial_state": results[1]})


# ---- copies and workers ----------------------------------------------------------------------------------------------


def test_a_training_state_survives_copies():
    """A 16-bit model with its fp32 gate parameters, and the optimizer's state."""
    torch.manual_seed(0)
    model, tokens = HybridLM(SMALL).bfloat16(), torch.randint(50, (2, 20))
    optimizer = torch.optim.AdamW(model.parameters())

    def step(model, optimizer):
        optimizer.zero_grad()
        model(tokens).float().square().mean().backward()
        optimizer.step()
        return list(model.parameters())

    step(model, optimizer)
    twins = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    expected = step(model, optimizer)
    for twin in twins:
        for a, b in zip(step(*twin), expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


class Attended(Dataset):
    """Runs the op in the worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return chunk(**streams(batch=1, tokens=70, seed=i), **gate())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start):
    data = Attended()
    expected = [data[i] for i in range(len(data))]  # the parent has started its own threads before
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120)
    for batch, wanted in zip(loader, expected, strict=True):
        assert_all_close(list(batch), list(wanted), rtol=1e-5, atol=1e-5)


# ---- derivatives -----------------------------------------------------------------------------------------------------

GRADCHECKED = (
    Case("softplus", 35, batch=2, heads=1, value_heads=2, key_dim=3, value_dim=2, gate="long", neg_eigval=True,
         beta_sigmoid=True, initial_state=True, chunk_size=32),
    Case("bounded", 40, lengths=(0, 3, 33, 4, 0), key_dim=4, value_dim=3, gate="fast", beta_sigmoid=True,
         initial_state=True, state_v_first=True, chunk_size=32),
    Case("bounded without parameters", 9, key_dim=2, value_dim=2, gate="bounded_plain"),
    Case("log-decay", 66, heads=1, key_dim=3, value_dim=3, l2norm=False, initial_state=True, scale=0.7),
)  # fmt: skip


def gradchecked(function, leaves: dict[str, Tensor], **options) -> bool:
    names = list(leaves)
    values = [x.clone().requires_grad_() for x in leaves.values()]
    return torch.autograd.gradcheck(
        lambda *tensors: function(**options, **dict(zip(names, tensors, strict=True))), values, fast_mode=True
    )


@pytest.mark.parametrize("function", [kda_cuda.chunk_kda, kda_cuda.fused_recurrent_kda])
@pytest.mark.parametrize("case", GRADCHECKED, ids=str)
def test_gradcheck(case, function):
    """Through both outputs, to every input."""
    x = case.inputs(dtype=torch.float64)
    leaves, options = x.differentiable(), x.public()
    for name in (*leaves, *(["chunk_size"] if function is kda_cuda.fused_recurrent_kda else [])):
        del options[name]
    assert gradchecked(function, leaves, **options)


@pytest.mark.parametrize("lower_bound", [None, -5.0])
@pytest.mark.parametrize("given", ["A_log dt_bias", "A_log", "dt_bias"])
def test_gradcheck_of_the_gate(given, lower_bound):
    if lower_bound is None and "A_log" not in given:
        given = "A_log dt_bias"
    leaves = {name: x for name, x in gate(dtype=torch.float64).items() if name in given}
    leaves["g"] = streams(dtype=torch.float64, tokens=3)["g"]
    assert gradchecked(kda_cuda.kda_gate, leaves, lower_bound=lower_bound, dtype=torch.float64)


@pytest.mark.parametrize(
    ("function", "op"), [(chunk, "chunk_bwd"), (recurrent, "chunk_bwd"), (own_gate, "kda_gate_bwd")]
)
def test_second_derivatives_are_refused(function, op):
    """Not a wrong zero: the first derivative may be used, but not differentiated."""
    inputs = everything("cpu", 12)
    (dg,) = torch.autograd.grad(sum(y.sum() for y in function(**inputs)), inputs["g"], create_graph=True)
    assert dg.abs().sum() > 0 and dg.requires_grad
    with pytest.raises(RuntimeError, match=f"{op}.*has no derivative: second derivatives of kda_cuda's ops are not"):
        dg.sum().backward()


# ---- drop-in for flash-linear-attention ------------------------------------------------------------------------------

OF_BOTH = "scale=None initial_state=None output_final_state=False use_qk_l2norm_in_kernel=False"
OF_BOTH += " use_gate_in_kernel=False use_beta_sigmoid_in_kernel=False allow_neg_eigval=False "
SIGNATURES = {
    "chunk_kda": OF_BOTH + "safe_gate=False lower_bound=None disable_recompute=False return_intermediate_states=False "
    "state_v_first=False cu_seqlens=None cu_seqlens_cpu=None cp_context=None",
    "fused_recurrent_kda": "A_log=None dt_bias=None " + OF_BOTH + "lower_bound=None state_v_first=False "
    "cu_seqlens=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    """Position and default of every argument."""
    parameters = list(inspect.signature(getattr(kda_cuda, name)).parameters.values())
    assert parameters.pop().kind is inspect.Parameter.VAR_KEYWORD
    assert [p.name for p in parameters[:5]] == ["q", "k", "v", "g", "beta"]
    assert [f"{p.name}={p.default}" for p in parameters[5:]] == SIGNATURES[name].split()
    assert all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
