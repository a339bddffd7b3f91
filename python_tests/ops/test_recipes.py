"""Calls with the signature of an earlier one: nothing is checked again but contents, and nothing else is different."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import kda_cuda
from kda_cuda import recipes
from kda_cuda.checks import Checker

from ..support.devices import forget_recipes
from .test_ops import ALL_TRANSFORMS, HV, B, K, V, gate, streams
from .test_threads import WRITTEN, pool_of, public_calls

FUNCTIONS = sorted(public_calls("cpu"))
pytestmark = pytest.mark.skipif(recipes.signature is None, reason="no kda_cuda._C: every call is checked")


@pytest.fixture(autouse=True)
def nothing_known() -> None:
    forget_recipes()


@pytest.fixture
def checked(monkeypatch) -> list[str]:
    """The names of the functions that have checked arguments."""
    seen, begin = [], Checker.__init__

    def note(self, op: str) -> None:
        seen.append(op)
        begin(self, op)

    monkeypatch.setattr(Checker, "__init__", note)
    return seen


def copied(arguments: dict) -> dict:
    """Other tensors with these contents; the same strides."""
    return {name: x.clone() if isinstance(x, Tensor) else x for name, x in arguments.items()}


def tensors(x: object) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from tensors(y)


def assert_same(a: object, b: object) -> None:
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    assert all(torch.equal(x, y) and x.dtype == y.dtype and x.stride() == y.stride() for x, y in pairs)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_repetition_checks_nothing_and_is_the_same(name, device, checked):
    """Also what it writes; and the second repetition has other contents."""
    function, arguments = getattr(kda_cuda, name), public_calls(device)[name]
    first, again, other = copied(arguments), copied(arguments), copied(arguments)
    streams_of_it = next(x for x in ("g", "x", "num_accepted_tokens") if x in other)
    other[streams_of_it] = other[streams_of_it].clone().clamp(max=0)
    with torch.no_grad():
        expected = function(**first)
        del checked[:]
        results, kernels = device.run(lambda: function(**again))
        others = function(**other)
        assert checked == []
        assert bool(kernels) == device.runs_kernels
        assert_same(results, expected)
        assert all(torch.equal(first[pool], again[pool]) for pool in WRITTEN if pool in first)
        function.recipes.forget()
        other = {x: copied(arguments)[x] if x in WRITTEN else y for x, y in other.items()}
        assert_same(others, function(**other))
        assert checked


def test_a_training_step_is_not_checked_again(device, checked):
    def step() -> list[Tensor]:
        x = {name: t.requires_grad_() for name, t in (streams(device, tokens=20) | gate(device)).items()}
        o, state = kda_cuda.chunk_kda(**x, **ALL_TRANSFORMS, output_final_state=True)
        return list(torch.autograd.grad(o.sum() + state.sum(), list(x.values())))

    expected = step()
    del checked[:]
    assert_same(step(), expected)
    assert checked == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_tensor_is_kept(name):
    arguments = public_calls("cpu")[name]
    results = getattr(kda_cuda, name)(**arguments)
    alive = [weakref.ref(x) for x in tensors([*arguments.values(), results])]
    assert alive and list(getattr(kda_cuda, name).recipes._known.values()) != [None]
    del arguments, results
    gc.collect()
    assert not any(x() is not None for x in alive)


def test_what_is_asked_around_a_call_belongs_to_it():
    """Gradients, autocast and inference mode, each after the call without it."""
    x = streams(tokens=5)
    plain = kda_cuda.chunk_kda(**x)[0]
    assert not plain.requires_grad
    wanted = dict(x, v=x["v"].clone().requires_grad_())
    assert kda_cuda.chunk_kda(**wanted)[0].requires_grad
    with torch.no_grad():
        assert not kda_cuda.chunk_kda(**wanted)[0].requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert kda_cuda.chunk_kda(**x)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert kda_cuda.chunk_kda(**x)[0].dtype == torch.float16
    with torch.no_grad():
        kda_cuda.chunk_kda(**x)
        with pytest.raises(ValueError, match="True outside of"):
            kda_cuda.chunk_kda(**x, return_intermediate_states=True)
    with torch.inference_mode():
        kda_cuda.chunk_kda(**x, return_intermediate_states=True)
    with torch.no_grad(), pytest.raises(ValueError, match="True outside of"):
        kda_cuda.chunk_kda(**x, return_intermediate_states=True)
    assert torch.equal(kda_cuda.chunk_kda(**x)[0], plain)


def test_values_of_other_types_are_other_calls():
    x = streams(tokens=3)
    kda_cuda.chunk_kda(**x, use_qk_l2norm_in_kernel=True)
    with pytest.raises(TypeError, match="use_qk_l2norm_in_kernel is 1 "):
        kda_cuda.chunk_kda(**x, use_qk_l2norm_in_kernel=1)
    kda_cuda.chunk_kda(**x, scale=1.0)
    with pytest.raises(TypeError, match="scale is True"):
        kda_cuda.chunk_kda(**x, scale=True)
    assert torch.equal(kda_cuda.chunk_kda(**x, scale=2.0)[0], 2 * kda_cuda.chunk_kda(**x, scale=1.0)[0])


def test_other_strides_and_shapes_are_other_calls():
    x = streams(tokens=6)
    kda_cuda.chunk_kda(**x)
    transposed = x["k"].mT.contiguous().mT
    for _ in range(2):  # it is copied, so it is never repeated
        assert torch.equal(kda_cuda.chunk_kda(**(x | {"k": transposed}))[0], kda_cuda.chunk_kda(**x)[0])
    with pytest.raises(ValueError, match="k has shape"):
        kda_cuda.chunk_kda(**(x | {"k": x["k"][..., :-1]}))
    assert kda_cuda.chunk_kda(**streams(tokens=7))[0].shape[1] == 7


def test_one_tensor_twice_is_another_call():
    """Also where it comes first: which argument is meant must not be guessed."""
    x = streams(tokens=6)
    twice = x | {"k": x["q"]}
    expected = [kda_cuda.chunk_kda(**x)[0] for x in (twice, x)]
    assert not torch.equal(*expected)
    for _ in range(2):
        assert_same([kda_cuda.chunk_kda(**x)[0] for x in (twice, x)], expected)
    pool, slots = pool_of("cpu"), torch.tensor([0, 1])
    given = streams(tokens=70) | {"slot_of": slots, "checkpoint_slots": torch.tensor([[2], [-1]])}
    kda_cuda.prefill(**given, state_pool=pool, checkpoint_pool=torch.zeros_like(pool))
    assert not pool[2].any()
    kda_cuda.prefill(**given, state_pool=pool, checkpoint_pool=pool)
    assert pool[2].any()


def test_contents_are_looked_at_in_every_call():
    x = streams(batch=1, tokens=8)

    def chunk(end: int, **more) -> None:
        kda_cuda.chunk_kda(**x, cu_seqlens=torch.tensor([0, end]), **more)

    chunk(8), chunk(7)
    with pytest.raises(ValueError, match=r"^kda_cuda::chunk_kda: cu_seqlens\[-1\] is 9, expected at most T=8$"):
        chunk(9)
    chunk(8, cu_seqlens_cpu=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"^kda_cuda::chunk_kda: cu_seqlens_cpu\[-1\] is 9, expected at most T=8$"):
        chunk(8, cu_seqlens_cpu=torch.tensor([0, 9]))
    calls = public_calls("cpu")
    for name in ("decode", "prefill", "decode_layer", "commit"):
        function, arguments = getattr(kda_cuda, name), calls[name]
        function(**arguments)
        with pytest.raises(ValueError) as refused:
            function(**(arguments | {"slot_of": torch.full((B,), 77)}))
        assert str(refused.value).startswith(f"kda_cuda::{name}: slot_of") and "77" in str(refused.value)
        function(**arguments)
    with pytest.raises(ValueError, match=r"num_accepted_tokens\[1\] is 9, expected 0 to 3"):
        kda_cuda.commit(**(calls["commit"] | {"num_accepted_tokens": torch.tensor([1, 9])}))


def test_states_of_intermediate_chunks_follow_contents():
    x = streams(batch=1, tokens=130)
    with torch.inference_mode():
        rows = [
            kda_cuda.chunk_kda(**x, cu_seqlens=torch.tensor(bounds), return_intermediate_states=True)[2].shape[1]
            for bounds in ([0, 64, 130], [0, 10, 130], [0, 1, 60])
        ]
    assert rows == [3, 3, 2]


@pytest.mark.parametrize("change", [{"dt_bias": (HV * K,)}, {"A_log": (1, 1, HV, 1)}])
def test_parameters_in_another_shape_are_repeated(change, checked):
    """As views that autograd sees."""
    (name, shape), x = next(iter(change.items())), streams(tokens=5) | ALL_TRANSFORMS
    parameter = gate()[name].reshape(shape).requires_grad_()
    given = [gate() | {name: parameter}, gate() | {name: parameter.detach().clone().requires_grad_()}]
    gradients = []
    for parameters in given:
        del checked[:]
        o = kda_cuda.chunk_kda(**x, **parameters)[0]
        gradients += torch.autograd.grad(o.sum(), [parameters[name]])
    assert checked == [] and gradients[0].shape == shape
    assert torch.equal(*gradients)


def test_parameters_of_other_dtypes_are_converted_each_time():
    x, half = streams(tokens=5) | ALL_TRANSFORMS, {name: t.bfloat16() for name, t in gate().items()}
    kda_cuda.chunk_kda(**x, **half)
    doubled = {name: 2 * t for name, t in half.items()}
    expected = kda_cuda.chunk_kda(**x, **{name: t.float() for name, t in doubled.items()})[0]
    assert torch.equal(kda_cuda.chunk_kda(**x, **doubled)[0], expected)


def test_every_deprecated_call_is_told():
    x = streams(tokens=3) | {"initial_state": torch.zeros(B, HV, V, K)}
    for _ in range(3):
        with pytest.warns(DeprecationWarning, match="use state_v_first"):
            kda_cuda.chunk_kda(**x, transpose_state_layout=True)


def test_recipes_are_bounded(monkeypatch):
    monkeypatch.setattr(recipes, "MOST", 4)
    results = [kda_cuda.kda_gate(torch.zeros(n, HV, K), torch.zeros(HV)).shape[0] for n in (*range(1, 10), 2, 9)]
    assert results == [*range(1, 10), 2, 9]
    assert 1 <= len(kda_cuda.kda_gate.recipes._known) <= 4


def test_without_signatures_every_call_is_checked(monkeypatch, checked):
    monkeypatch.setattr(recipes, "signature", None)
    x = streams(tokens=3)
    assert_same(kda_cuda.chunk_kda(**x), kda_cuda.chunk_kda(**x))
    assert checked == ["chunk_kda"] * 2 and not kda_cuda.chunk_kda.recipes._known


def test_what_has_no_signature_is_checked():
    """Subclasses of tensors, transforms of torch.func, and values that are none of the known kinds."""

    class Subclass(Tensor):
        pass

    assert recipes.signed((torch.zeros(1),), {}) and recipes.signed((torch.nn.Parameter(torch.zeros(1)),), {})
    unusual = [torch.zeros(1, device="meta"), torch.zeros(2).to_sparse(), Subclass(torch.zeros(1))]
    for value in (*unusual, object(), 1 << 70, ((1,),)):
        assert recipes.signed((value,), {}) is None
    with torch.autograd.forward_ad.dual_level():
        assert recipes.signed((torch.zeros(1),), {}) is None
    torch.func.vmap(lambda x: x if recipes.signed((x,), {}) is None else pytest.fail("signed"))(torch.zeros(2))
