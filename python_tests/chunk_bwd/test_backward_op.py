"""The backward as an op: which gradients it computes, what autograd asks of it, and what is said of it before."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import kda_cuda
from kda_cuda import library, plans, schemas, variants
from kda_cuda.reference.chunk_bwd import ALL_GRADIENTS, GRADIENTS

from ..ops.test_ops import ALL_TRANSFORMS, chunk_arguments, gate, plain_arguments, state, streams

SUBSETS = [("q",), ("k", "beta"), ("v",), ("g",), ("beta",), ("A_log",), ("dt_bias", "v"), ("initial_state",), ()]
REFERENCES = ["kda_cuda", "kda_cuda_reference"]

# ---- the mask --------------------------------------------------------------------------------------------------------


def gradients(x: dict, namespace: str, **wanted: int) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(3)
    do = torch.randn(x["v"].shape, generator=make).to(x["v"].dtype)
    d_state = None if x["initial_state"] is None else torch.randn(x["initial_state"].shape, generator=make)
    arguments = schemas.ChunkBwd(**x, do=do, dfinal_state=d_state, chunk_size=32, **wanted)
    return dict(zip(GRADIENTS, getattr(torch.ops, namespace).chunk_bwd(*arguments), strict=True))


@pytest.mark.parametrize("namespace", REFERENCES)
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("names", SUBSETS, ids=" ".join)
def test_only_what_is_wanted_is_returned(names, varlen, namespace):
    x = chunk_arguments(varlen)
    everything = gradients(x, namespace, wanted=ALL_GRADIENTS)
    asked = gradients(x, namespace, wanted=sum(1 << GRADIENTS.index(name) for name in names))
    for name, full in everything.items():
        assert full.abs().sum() > 0 and full.shape == x[name].shape
        assert asked[name].dtype == full.dtype
        assert torch.equal(asked[name], full) if name in names else asked[name].shape == (0,), name


def test_everything_is_wanted_by_default():
    asked = gradients(chunk_arguments(), "kda_cuda", wanted=0b11111111)
    for name, d in gradients(chunk_arguments(), "kda_cuda").items():
        assert d.numel() and torch.equal(d, asked[name])


def test_absent_arguments_have_empty_gradients():
    x = plain_arguments(torch.bfloat16)
    for name, d in gradients(x, "kda_cuda").items():
        if x[name] is None:
            assert d.shape == (0,) and d.dtype == torch.float32
        else:
            assert d.shape == x[name].shape and d.dtype == torch.bfloat16


# ---- autograd --------------------------------------------------------------------------------------------------------


def everything(device) -> dict[str, Tensor]:
    return {**streams(device), **gate(device), "initial_state": state(device)}


def loss(x: dict[str, Tensor], **options) -> Tensor:
    o, final_state = kda_cuda.chunk_kda(**x, **ALL_TRANSFORMS, output_final_state=True, **options)
    return o.square().sum() + final_state.square().sum()


@pytest.mark.filterwarnings("ignore:.*runs the PyTorch reference instead of a kernel")
@pytest.mark.parametrize("names", SUBSETS[:-1], ids=" ".join)
def test_a_subset_of_leaves(names, device):
    """The gradients of a few inputs are those that they have among all."""
    x = {name: y.requires_grad_() for name, y in everything(device).items()}
    expected = torch.autograd.grad(loss(x), [x[name] for name in names])
    few = {name: y if name in names else y.detach() for name, y in x.items()}
    for name, d, full in zip(names, torch.autograd.grad(loss(few), [x[name] for name in names]), expected, strict=True):
        torch.testing.assert_close(d, full, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


class Spy:
    """Stands in for :func:`variants.op_in` and keeps what every op is called with."""

    def __init__(self, monkeypatch):
        self.calls: list[tuple[str, tuple]] = []  # op and its arguments, by name
        self._op_in = variants.op_in
        monkeypatch.setattr(variants, "op_in", self)

    def __call__(self, namespace: str, op: str) -> Callable:
        def call(*arguments):
            self.calls.append((op, schemas.ARGUMENTS[op](*arguments)))
            return self._op_in(namespace, op)(*arguments)

        return call


@pytest.mark.filterwarnings("ignore:.*runs the PyTorch reference instead of a kernel")
def test_autograd_asks_for_what_is_needed(device, monkeypatch):
    spy = Spy(monkeypatch)
    for names, deterministic in itertools.product(SUBSETS[:-1], (True, "batch_invariant")):
        x = {name: y.requires_grad_(name in names) for name, y in everything(device).items()}
        loss(x, deterministic=deterministic).backward()
        (_, forward), (op, backward) = spy.calls
        asked = {name for bit, name in enumerate(GRADIENTS) if backward.wanted >> bit & 1}
        assert op == "chunk_bwd" and asked == set(names)
        assert backward.batch_invariant is forward.batch_invariant is (deterministic == "batch_invariant")
        assert all((x[name].grad is None) == (name not in names) for name in x)
        spy.calls.clear()


@pytest.mark.filterwarnings("ignore:.*runs the PyTorch reference instead of a kernel")
def test_gradients_of_outputs_may_be_strided(device):
    """A sum's gradient is one number, expanded; a view's is strided."""
    x = {name: y.requires_grad_() for name, y in everything(device).items()}
    o, final_state = kda_cuda.chunk_kda(**x, **ALL_TRANSFORMS, output_final_state=True)
    do, d_state = (torch.ones((), device=device).expand(y.shape) for y in (o, final_state))
    strided = [torch.stack([d, d], -1)[..., 0] for d in (do, d_state)]
    results = [torch.autograd.grad((o, final_state), list(x.values()), (a, b), retain_graph=True)
               for a, b in ((do, d_state), strided, (do.contiguous(), d_state.contiguous()))]  # fmt: skip
    for of_expanded, of_strided, of_contiguous in zip(*results, strict=True):
        assert torch.equal(of_expanded, of_contiguous) and torch.equal(of_strided, of_contiguous)


def test_nothing_runs_where_nothing_is_wanted(monkeypatch):
    spy = Spy(monkeypatch)
    x = schemas.Chunk(**chunk_arguments(), output_final_state=True, chunk_size=64, output_chunk_states=False)
    ctx = SimpleNamespace(needs_input_grad=(False,) * len(x), save_for_backward=lambda *_: None,
                          set_materialize_grads=lambda _: None)  # fmt: skip
    backward, setup_context = library._AUTOGRAD["chunk"]
    setup_context(ctx, x, None)
    assert backward("kda_cuda", ctx, torch.ones_like(x.v), None, None) == (None,) * len(x) and spy.calls == []


# ---- derivatives that there are not ----------------------------------------------------------------------------------

FUNCTIONS = {
    "chunk_kda": lambda q, x: kda_cuda.chunk_kda(**{**x, "q": q})[0],
    "fused_recurrent_kda": lambda q, x: kda_cuda.fused_recurrent_kda(**{**x, "q": q})[0],
    "kda_gate": lambda g, x: kda_cuda.kda_gate(g, lower_bound=-5.0),
}
FORWARD_MODE = "an argument has a tangent, expected none: there is no forward-mode derivative"
OF_TORCH_FUNC = "an argument is differentiated by torch.func, expected by torch.autograd (grad or backward)"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_refused(name):
    """Not a tangent of zero."""
    x = streams(tokens=3)
    q = x["q"]

    def dual() -> None:
        with forward_ad.dual_level():
            assert FUNCTIONS[name](q, x).isfinite().all()  # nothing to refuse
            FUNCTIONS[name](forward_ad.make_dual(q, torch.ones_like(q)), x)

    for call in (dual, lambda: torch.func.jvp(lambda q: FUNCTIONS[name](q, x), (q,), (q,))):
        with pytest.raises(NotImplementedError) as refused, torch.no_grad():
            call()
        assert str(refused.value) == f"kda_cuda::{name}: {FORWARD_MODE}"


@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "hessian", "vmap of grad", "grad of vmap"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_that_differentiate_are_refused(name, transform):
    x, func = streams(tokens=3), torch.func

    def total(q: Tensor) -> Tensor:
        return FUNCTIONS[name](q, x).sum()

    q, many = x["q"], x["q"].expand(2, *x["q"].shape)
    calls = {
        "grad": lambda: func.grad(total)(q),
        "vjp": lambda: func.vjp(total, q),
        "jacrev": lambda: func.jacrev(total)(q),
        "hessian": lambda: func.hessian(total)(q),
        "vmap of grad": lambda: func.vmap(func.grad(total))(many),
        "grad of vmap": lambda: func.grad(lambda y: func.vmap(total)(y).sum())(many),
    }
    with pytest.raises(NotImplementedError) as refused:
        calls[transform]()
    assert str(refused.value) == f"kda_cuda::{name}: {OF_TORCH_FUNC}"


def test_transforms_may_hold_calls_that_they_do_not_differentiate():
    x = streams(tokens=3)
    expected = kda_cuda.chunk_kda(**x)[0].sum()
    assert torch.equal(torch.func.grad(lambda y: y * kda_cuda.chunk_kda(**x)[0].sum())(torch.tensor(1.0)), expected)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_functions_without_gradients_refuse_tangents_too(op):
    x, pool = streams(tokens=3), state()
    pools = {"decode": {"state": pool}, "prefill": {"state_pool": pool}}
    before = pool.clone()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"kda_cuda::{op}: {FORWARD_MODE}"):
        getattr(kda_cuda, op)(**{**x, "q": forward_ad.make_dual(x["q"], x["q"])}, **pools[op])
    assert torch.equal(pool, before)


# ---- workspace_size and explain --------------------------------------------------------------------------------------

SHAPE = (ctypes.c_int, *[ctypes.c_longlong] * 2, *[ctypes.c_int] * 6)
TEXT = (ctypes.c_void_p, ctypes.c_int)
PLAN = ctypes.CFUNCTYPE(ctypes.c_int, *SHAPE, *TEXT)
PLAN_OF_DEVICE = ctypes.CFUNCTYPE(ctypes.c_int, *SHAPE, ctypes.c_int, ctypes.c_double, *TEXT)


class Library:
    """A library that serves every backward, with as many bytes as there are tokens, and says what it was asked."""

    def __init__(self, written: int = 1):
        self.asked: list[tuple] = []

        def plan(*arguments) -> int:
            *sizes, to, capacity = arguments
            self.asked.append(tuple(sizes))
            text = f"variant=any\nrounds=2\nworkspace_bytes={sizes[1] * sizes[2]}\n".encode() + b"\0"
            assert len(text) <= capacity
            ctypes.memmove(to, text, len(text))
            return len(text) * written

        self.kda_plan_chunk_bwd = PLAN(plan)
        self.kda_plan_chunk_fwd = PLAN_OF_DEVICE(plan)


@pytest.fixture
def serving_library(monkeypatch, device) -> Library:
    """As if the backward kernel were compiled in."""
    library = Library()
    monkeypatch.setattr(plans, "compiled", lambda namespace: library)
    kernels = {namespace: ops | {"chunk_bwd"} for namespace, ops in variants._kernels.items()}
    monkeypatch.setattr(variants, "_kernels", kernels)
    return library


SIZES = {"tokens": 100, "value_heads": 6, "key_dim": 64, "value_dim": 32, "dtype": torch.bfloat16}


@pytest.mark.devices("emulator", "cuda")
def test_workspace_of_the_backward(device, serving_library):
    size = kda_cuda.workspace_size(**SIZES, device=str(device), heads=2, sequences=7, backward=True)
    assert size == 100 and serving_library.asked == [(2, 1, 100, 7, 2, 6, 64, 32, ALL_GRADIENTS)]
    size = kda_cuda.workspace_size(**SIZES, device=str(device), batch=3, backward=True)
    assert size == 300 and serving_library.asked[1] == (2, 3, 100, -1, 6, 6, 64, 32, ALL_GRADIENTS)


@pytest.mark.devices("emulator", "cuda")
@pytest.mark.parametrize(
    ("written", "reason"),
    [(0, "none: no variant fits this device"), (-1, "unknown: the device cannot be asked")],
)
def test_workspace_of_a_backward_that_no_variant_serves(device, serving_library, monkeypatch, written, reason):
    monkeypatch.setattr(plans, "compiled", lambda namespace: Library(written))
    with pytest.raises(RuntimeError, match=f"^kda_cuda::workspace_size: {reason}$"):
        kda_cuda.workspace_size(**SIZES, device=str(device), backward=True)


@pytest.mark.devices("emulator", "cuda")
def test_workspace_of_an_older_library(device, serving_library, monkeypatch):
    monkeypatch.setattr(plans, "compiled", lambda namespace: object())
    with pytest.raises(RuntimeError, match="unknown: the library was built before it could be asked"):
        kda_cuda.workspace_size(**SIZES, device=str(device), backward=True)


def test_the_reference_needs_no_workspace():
    assert kda_cuda.workspace_size(**SIZES, device="cpu", backward=True) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 4}, ValueError, "value_heads is 6, expected a multiple of heads=4"),
        ({"heads": 0}, ValueError, "heads is 0, expected a size"),
        ({"heads": 2.0}, TypeError, "heads is 2.0 (float), expected an int"),
        ({"backward": 1}, TypeError, "backward is 1 (int), expected a bool"),
    ],
)
def test_bad_sizes(change, error, message):
    with pytest.raises(error) as raised:
        kda_cuda.workspace_size(**{**SIZES, "device": "cpu"} | change)
    assert str(raised.value) == f"kda_cuda::workspace_size: {message}"


PLANNED = {"variant": "any", "rounds": "2", "workspace_bytes": "80"}


@pytest.mark.devices("emulator", "cuda")
def test_explain_shows_how_the_backward_is_launched(device, serving_library):
    x = everything(device)
    x["k"].requires_grad_(), x["A_log"].requires_grad_()
    for needs_grad, options, wanted in ((True, {}, 0b100010), (True, {"backward": True}, 0b100010),
                                        (False, {"backward": True}, 0b11111111)):  # fmt: skip
        with torch.set_grad_enabled(needs_grad):
            told = kda_cuda.explain(**x, **ALL_TRANSFORMS, **options)
        assert told.backward.kernel and told.backward.plan == PLANNED and "rounds 2" in str(told)
        assert serving_library.asked[-1] == (0, 2, 40, -1, 1, 2, 32, 16, wanted)
    del x["A_log"], x["dt_bias"], x["initial_state"]
    kda_cuda.explain(**{name: y.detach() for name, y in x.items()}, backward=True)
    assert serving_library.asked[-1][-1] == 0b11111
    with torch.no_grad():
        assert kda_cuda.explain(**x).backward is None


@pytest.mark.devices("emulator", "cuda")
def test_what_the_library_says_of_its_backward(device):
    """workspace_size and explain agree, of the same call."""
    x = everything(device)
    told = kda_cuda.explain(**x, **ALL_TRANSFORMS, backward=True).backward
    batch, tokens, heads, key_dim = x["q"].shape
    size = kda_cuda.workspace_size(
        tokens=tokens, batch=batch, heads=heads, value_heads=x["v"].shape[2], key_dim=key_dim,
        value_dim=x["v"].shape[3], dtype=x["q"].dtype, device=str(device), backward=True,
    )  # fmt: skip
    if told.kernel:
        assert {"variant", "rounds"} <= set(told.plan) and size == sum(
            int(told.plan[key]) for key in ("workspace_bytes", "scratch_bytes")
        ) > 0
    else:
        assert told.plan == {} and size == 0


def test_explain_of_a_backward_that_there_is_not():
    x = streams(tokens=1)
    with pytest.raises(ValueError, match=r"^kda_cuda::explain: backward is True, expected False: decode has no back"):
        kda_cuda.explain(**x, op="decode", backward=True)
    told = kda_cuda.explain(**x, backward=True)
    assert told.backward.op == "chunk_bwd" and not told.backward.kernel and told.backward.plan == {}
    assert kda_cuda.explain(x["g"], lower_bound=-5.0, op="kda_gate", backward=True).backward.op == "kda_gate_bwd"
