"""Steps from a graph are those of the model: across bounds, with rows of any length, after changes of the cache."""

from __future__ import annotations

import pytest
import torch

from kda_cuda.model import DecodeGraph, HybridConfig, HybridLM
from kda_cuda.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kda_cuda.nn import decode_graph, mla

from .test_generation import KIMI, SIZES, mask_of, prompt

CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2}}


@pytest.fixture(params=["hybrid", "kimi linear"])
def model(request, device):
    """The one with experts is in bf16 on a GPU, where its products of other dtypes wait for the device."""
    torch.manual_seed(0)
    if request.param == "hybrid":
        made = HybridLM(HybridConfig(**SIZES, num_layers=4, head_dim=16, v_head_dim=16, intermediate_size=64))
    else:
        made = KimiLinearForCausalLM(KimiLinearConfig(**SIZES, **KIMI))
        made = made.to(torch.bfloat16 if device.name == "cuda" else torch.float32)
    return made.to(device).requires_grad_(False)


def close(model) -> dict:
    return CLOSE[model.lm_head.weight.dtype]


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    """So that a few steps cross several bounds."""
    monkeypatch.setattr(decode_graph, "LEAST_ROOM", 4)
    monkeypatch.setattr(mla, "ALIGNED", 2)


def begun(model, device, lengths: list[int]):
    """A cache after prompts of these lengths, and another one like it."""
    rows = len(lengths)
    mask = None if len(set(lengths)) == 1 else mask_of(lengths, "left").to(device)
    tokens, cache = prompt(rows, max(lengths)).to(device), model.new_cache(rows)
    model.prefill(tokens, cache, mask)
    return cache, cache.clone()


def check_steps(model, step, other, count: int, seed: int = 2) -> None:
    """``step`` gives what the model gives on its twin of the cache."""
    tokens = torch.randint(50, (other.batch_size, count), generator=torch.Generator().manual_seed(seed))
    for t in tokens.to(other.row_lengths().device).split(1, 1):
        torch.testing.assert_close(step(t), model(t, other, last_only=True), **close(model))
    assert torch.equal(step.cache.row_lengths(), other.row_lengths())


@pytest.mark.parametrize("lengths", [[5, 5], [9, 2, 6]], ids=["equal", "different"])
@torch.no_grad()
def test_steps_are_those_of_the_model(model, device, lengths):
    cache, other = begun(model, device, lengths)
    step = DecodeGraph(model, cache)
    check_steps(model, step, other, 14)
    assert (step._graph is not None) == (device.name == "cuda")
    t = prompt(len(lengths), 3).to(device)  # and the cache is one that the model itself goes on with
    torch.testing.assert_close(model(t, cache), model(t, other), **close(model))


@torch.no_grad()
def test_logits_stay_what_they_were(model, device):
    cache, _ = begun(model, device, [3])
    step, token = DecodeGraph(model, cache), prompt(1, 1).to(device)
    kept = [step(token) for _ in range(6)]
    copies = [x.clone() for x in kept]
    for _ in range(3):
        step(token)
    assert all(torch.equal(x, y) for x, y in zip(kept, copies, strict=True))


def reset(cache):
    cache.reset_rows([1])


def crop(cache):
    cache.checkpoint()
    cache.crop(cache.row_lengths().max().item())  # to where it is: nothing changes
    cache.crop(0)


def move(cache):
    for layer in cache.layers:
        layer.set_tensors(tuple(x.clone() for x in layer.tensors()))


@pytest.mark.parametrize("change", [reset, crop, move], ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_others_do_to_the_cache_is_seen(model, device, change):
    cache, other = begun(model, device, [6, 6])
    step = DecodeGraph(model, cache)
    check_steps(model, step, other, 5)
    for x in (cache, other):
        change(x)
    check_steps(model, step, other, 7, seed=3)
    more = prompt(2, 5).to(device)  # another prompt, in parallel
    torch.testing.assert_close(model.prefill(more, cache), model.prefill(more, other), **close(model))
    check_steps(model, step, other, 7, seed=4)


@torch.no_grad()
def test_steps_that_are_not_fused_leave_their_results_in_place(model, device):
    """A hook keeps the layer from its kernel for single steps, and its results come in tensors of their own."""
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "k_conv1d"):
            layer.self_attn.k_conv1d.register_forward_hook(lambda module, args, y: 2 * y.clamp(min=0))
    cache, other = begun(model, device, [4, 4])
    check_steps(model, DecodeGraph(model, cache), other, 9)


def test_modes_of_autograd_may_change(model, device):
    with torch.inference_mode():
        cache, other = begun(model, device, [4, 4])
        step = DecodeGraph(model, cache)
        check_steps(model, step, other, 3)
    with torch.no_grad():
        check_steps(model, step, other, 3)
    with torch.inference_mode():
        check_steps(model, step, other, 6)


@torch.no_grad()
def test_an_error_in_a_step_leaves_the_cache_as_it_was(model, device, monkeypatch):
    cache, other = begun(model, device, [4, 4])
    step = DecodeGraph(model, cache)
    check_steps(model, step, other, 1)

    def fail(*_):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of luck"):
        patch.setattr(model.lm_head, "forward", fail)
        step(prompt(2, 1).to(device))
    assert torch.equal(cache.row_lengths(), other.row_lengths())


@torch.no_grad()
def test_contents_that_are_checked_are_not_captured(model, device, monkeypatch):
    monkeypatch.setenv("KDA_CUDA_CHECK", "1")
    cache, other = begun(model, device, [4, 4])
    step = DecodeGraph(model, cache)
    check_steps(model, step, other, 4)
    assert step._graph is None
    with pytest.raises(ValueError, match="tokens has 50, expected 0 <= token < 50"):
        step(torch.full((2, 1), 50, device=str(device)))


@pytest.mark.parametrize("tokens", [torch.zeros(3, 1), torch.zeros(2, 2), torch.zeros(2)], ids=lambda x: str(x.shape))
def test_other_shapes(model, device, tokens):
    step = DecodeGraph(model, begun(model, device, [3, 3])[0])
    with pytest.raises(ValueError, match=r"DecodeGraph: tokens has shape \[.*\], expected \[2, 1\]"):
        step(tokens.long().to(device))


def test_other_caches(model, device):
    with pytest.raises(TypeError, match="DecodeGraph: cache is a list, expected a HybridCache"):
        DecodeGraph(model, [])
    cache, _ = begun(model, device, [3, 3])
    step = DecodeGraph(model, cache)
    cache.layers = cache.select([0]).layers
    with pytest.raises(ValueError, match="DecodeGraph: cache has 1 rows now, expected 2 as before"):
        step(prompt(2, 1).to(device))


@torch.no_grad()
def test_generate(model, device):
    tokens, options = prompt(2, 5).to(device), {"temperature": 0.8, "seed": 3}
    got, expected = (model.generate(tokens, 12, cuda_graph=x, **options) for x in (True, False))
    assert got.shape == (2, 17)
    if model.lm_head.weight.dtype == torch.float32:  # in bf16 the order of a sum may decide between two tokens
        assert torch.equal(got, expected)


@pytest.mark.devices("cuda")
@torch.no_grad()
def test_a_step_that_waits_cannot_be_captured(model, device):
    model.lm_head.register_forward_hook(lambda module, args, y: y * float(y.max() > 0))
    cache, other = begun(model, device, [4, 4])
    step = DecodeGraph(model, cache)
    check_steps(model, step, other, 1)
    with pytest.raises(ValueError, match="DecodeGraph: model has a step that cannot be captured, expected one that"):
        step(prompt(2, 1).to(device))
    assert torch.equal(cache.row_lengths(), other.row_lengths())
    assert torch.randn(2, device=str(device)).isfinite().all()  # other work goes on


@pytest.mark.parametrize("length", [0, 1, 3, 4, 255, 256, 4095, 4096, 1 << 20])
def test_bounds(length, monkeypatch):
    monkeypatch.undo()
    bound = decode_graph.bound_after(length)
    assert length < bound <= length + max(256, length / 8) and bound % 256 == 0 == bound % mla.ALIGNED
