"""CUDA graphs: captured once, replayed with other inputs, lengths, slots and destinations, as eager calls give it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import kda_cuda

from ..prefill.test_prefill import MODEL, bits, streams_of
from ..support.cases import CASES, Case, Inputs

pytestmark = pytest.mark.gpu

T, N, SLOTS = 512, 5, 40
PACKED = Case("packed sequences", T, lengths=(T // N,) * (N - 1) + (T - T // N * (N - 1),), heads=2, value_heads=4,
              key_dim=128, value_dim=128, dtype=torch.bfloat16, initial_state=True, **MODEL)  # fmt: skip


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def capture(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """After a warm-up on a side stream, as torch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def overwrite(to: Inputs, x: Inputs) -> None:
    for name, y in to.tensors().items():
        y.copy_(x.tensors()[name])


@pytest.mark.parametrize("name", ["long_memory", "varlen", "v_first", "many_chunks", "dim_256"])
def test_chunk_kda(name):
    """The public call, as it is."""
    case = CASES[name]
    x = case.inputs("cuda")

    def call():
        with torch.inference_mode(), no_synchronisation():
            return kda_cuda.chunk_kda(**x.public())

    graph, (o, final_state) = capture(call)
    for seed in range(3):
        other = Case(**{**case.__dict__, "name": f"{name} {seed}"}).inputs("cuda")
        overwrite(x, other)
        graph.replay()
        with torch.inference_mode():
            wanted, final = kda_cuda.chunk_kda(**other.public())
        assert torch.equal(o, wanted) and torch.equal(final_state, final)


def with_gradients(x: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """The call on leaves that share the memory of ``x``, and the leaves."""
    leaves = {name: y.detach().requires_grad_() for name, y in x.differentiable().items()}
    return x.replace(**leaves), leaves


def training(x: Inputs, leaves: dict[str, Tensor], **options) -> tuple[Tensor, ...]:
    """Outputs and every gradient, with nothing read on the host."""
    with no_synchronisation():
        o, final_state = kda_cuda.chunk_kda(**x.public(), **options)
        found = torch.autograd.grad([o, final_state], list(leaves.values()), [x.do, x.dfinal_state])
    return o.detach(), final_state.detach(), *found


@pytest.mark.devices("cuda")
@pytest.mark.parametrize("options", [{}, {"deterministic": "batch_invariant"}], ids=["", "batch_invariant"])
def test_forward_and_backward_with_everything_changed(device, chunk_bwd, options):
    """One graph of both; then other data and other cu_seqlens, with empty and full sequences, and fewer tokens."""
    x = PACKED.inputs(device)
    call, leaves = with_gradients(x)
    graph, captured = capture(lambda: training(call, leaves, **options))
    for seed in range(8):
        make = torch.Generator().manual_seed(seed)
        used = T if seed % 2 else T - 60 * seed
        inner = torch.randint(0, used + 1, (N - 1,), generator=make).sort().values
        inner = inner if seed else torch.tensor([0, 0, T, T])
        bounds = torch.cat([torch.tensor([0]), inner, torch.tensor([used])]).to(device, torch.int32)
        other = Case(**{**PACKED.__dict__, "name": f"training {seed}"}).inputs(device).replace(cu_seqlens=bounds)
        overwrite(x, other)
        for y in captured:
            y.fill_(float("nan"))
        graph.replay()
        for i, (a, b) in enumerate(zip(captured, training(*with_gradients(other), **options), strict=True)):
            assert torch.equal(a, b), (seed, i)


def serving(seed: int) -> tuple[Inputs, dict[str, Tensor]]:
    """Inputs of a call whose sequences, slots and destinations are all its own; some null, some padding."""
    x = Case(**{**PACKED.__dict__, "name": f"request {seed}"}).inputs("cuda")
    make = torch.Generator().manual_seed(seed)
    used = int(torch.randint(T // 2, T + 1, (1,), generator=make)) if seed else T
    inner = torch.randint(0, used + 1, (N - 1,), generator=make).sort().values
    bounds = torch.cat([torch.tensor([0]), inner, torch.tensor([used])])
    slots = torch.randperm(SLOTS - 1, generator=make)[: N + N * 8] + 1
    table = torch.full((N, 8), -1)
    places = slots[N:]
    table.view(-1)[: places.numel()] = places
    table = table[torch.randperm(N, generator=make)]
    slot_of = slots[:N].clone()
    slot_of[seed % N] = 0 if seed % 2 else -1
    x = x.replace(cu_seqlens=bounds.to("cuda", torch.int32))
    more = {
        "slot_of": slot_of.to("cuda", torch.int32),
        "checkpoint_slots": table.to("cuda", torch.int32),
        "has_initial_state": (torch.rand(N, generator=make) < 0.5).to("cuda"),
    }
    return x, more


@pytest.mark.parametrize("own_workspace", [False, True])
def test_prefill_with_everything_changed(own_workspace):
    x, more = serving(0)
    pool = torch.randn(SLOTS, *x.initial_state.shape[1:], device="cuda")
    workspace = None
    if own_workspace:
        size = kda_cuda.workspace_size(
            tokens=T, sequences=N, value_heads=4, key_dim=128, value_dim=128, dtype=x.q.dtype
        )
        workspace = torch.empty(size, dtype=torch.uint8, device="cuda")

    def call(x: Inputs = x, pool: Tensor = pool, more: dict = more) -> Tensor:
        with no_synchronisation():
            return kda_cuda.prefill(**streams_of(x), state_pool=pool, **more, zero_is_null=True, workspace=workspace)

    graph, o = capture(call)
    for seed in range(8):
        other, changed = serving(seed)
        start = torch.randn(pool.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
        overwrite(x, other)
        for name, y in more.items():
            y.copy_(changed[name])
        pool.copy_(start)
        o.fill_(float("nan"))
        graph.replay()
        eager = start.clone()
        wanted = call(other, eager, changed)
        assert torch.equal(o, wanted), seed
        assert torch.equal(bits(pool), bits(eager)) and not torch.equal(pool, start)
        assert torch.equal(pool[0], start[0]), "slot 0 is null"
        assert not o[:, int(other.cu_seqlens[-1]) :].any(), "padding"


def test_intermediate_states_need_lengths_on_the_host():
    x = CASES["varlen"].inputs("cuda")
    bounds = x.cu_seqlens.cpu()

    def call(**options):
        with torch.inference_mode():
            return kda_cuda.chunk_kda(**x.public(), return_intermediate_states=True, **options)

    graph, (o, final_state, h) = capture(lambda: call(cu_seqlens_cpu=bounds))
    graph.replay()
    for captured, eager in zip((o, final_state, h), call(), strict=True):
        assert torch.equal(captured, eager)
    graph = torch.cuda.CUDAGraph()
    message = "cu_seqlens_cpu is None during graph capture, expected it with return_intermediate_states"
    with pytest.raises(ValueError, match=message), torch.cuda.graph(graph):
        call()


def test_a_model_step_is_one_graph():
    """Projections, gate, kernel and state in one graph, replayed over a stream of chunks of one sequence."""
    torch.manual_seed(0)
    width, heads, dim, tokens = 64, 2, 64, 128
    sizes = {"q": heads * dim, "k": heads * dim, "v": heads * dim, "g": heads * dim, "beta": heads}
    weights = {name: torch.randn(width, size, device="cuda") / 8 for name, size in sizes.items()}
    A_log, dt_bias = torch.rand(heads, device="cuda"), torch.rand(heads, dim, device="cuda")
    pool = torch.zeros(2, heads, dim, dim, device="cuda")
    slot = torch.tensor([1], device="cuda")
    text = torch.zeros(1, tokens, width, device="cuda")

    def step(x: Tensor, pool: Tensor) -> Tensor:
        wide = {name: (x @ w).unflatten(-1, (heads, -1)) for name, w in weights.items()}
        return kda_cuda.prefill(**{**wide, "beta": wide["beta"].squeeze(-1)}, state_pool=pool, slot_of=slot,
                                use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
                                A_log=A_log, dt_bias=dt_bias)  # fmt: skip

    graph, o = capture(lambda: step(text, pool))
    pool.zero_()
    eager = torch.zeros_like(pool)
    for _ in range(4):
        text.normal_()
        graph.replay()
        assert torch.equal(o, step(text, eager)) and torch.equal(pool, eager)
    assert pool[1].any() and not pool[0].any()
