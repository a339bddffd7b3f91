"""Kimi Linear against the implementation of transformers: logits, cached steps, padding, gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from kda_cuda.models.kimi_linear import KimiLinearForCausalLM
from kda_cuda.models.kimi_linear.names import readable, released

from ..support.kimi_linear import CONFIGS, relative_error, theirs, tokens

LOGITS, GRADIENTS = 1e-4, 1e-3
BF16 = 2  # times the error that transformers has in bf16, against its own fp32


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """A model of transformers and ours, which has read what the former saved."""
    folder = tmp_path_factory.mktemp("theirs")
    model = theirs(request.param)
    model.save_pretrained(folder)
    return model, KimiLinearForCausalLM.from_pretrained(folder)


@torch.no_grad()
def test_prefill(pair):
    model, ours = pair
    x = tokens(2, 70)
    assert relative_error(ours(x), model(x).logits) <= LOGITS


@torch.no_grad()
def test_cached_steps(pair):
    model, ours = pair
    x, cache = tokens(2, 37 + 32), ours.new_cache(2)
    outputs = model(x[:, :37], use_cache=True)
    past, expected, got = outputs.past_key_values, [outputs.logits], [ours(x[:, :37], cache)]
    for t in range(37, 37 + 32):
        step = x[:, t : t + 1]
        expected.append(model(step, past_key_values=past, use_cache=True).logits)
        got.append(ours(step, cache))
    assert relative_error(torch.cat(got, 1), torch.cat(expected, 1)) <= LOGITS


@torch.no_grad()
def test_left_padding(pair):
    """A prefill of three lengths and four steps on top of it, with the masks of transformers."""
    model, ours = pair
    x, mask = tokens(3, 24), torch.ones(3, 24, dtype=torch.long)
    mask[1, :13], mask[2, :17] = 0, 0
    outputs = model(x[:, :20], attention_mask=mask[:, :20], use_cache=True)
    past, cache = outputs.past_key_values, ours.new_cache(3)
    expected, got = [outputs.logits], [ours(x[:, :20], cache, attention_mask=mask[:, :20])]
    for t in range(20, 24):
        step, seen = x[:, t : t + 1], mask[:, : t + 1]
        expected.append(model(step, attention_mask=seen, past_key_values=past, use_cache=True).logits)
        got.append(ours(step, cache, attention_mask=seen))
    valid = mask.bool()
    assert relative_error(torch.cat(got, 1)[valid], torch.cat(expected, 1)[valid]) <= LOGITS


@torch.no_grad()
def test_right_padding_of_a_prefill(pair):
    model, ours = pair
    x, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[1, 11:] = 0
    expected = model(x, attention_mask=mask).logits[mask.bool()]
    assert relative_error(ours(x, attention_mask=mask)[mask.bool()], expected) <= LOGITS


def in_bf16(model: torch.nn.Module, device: str) -> torch.nn.Module:
    return copy.deepcopy(model).to(device, torch.bfloat16)


def test_bf16(pair, device):
    """Logits of a prefill and of steps on top of it, and the gradient of the embedding."""
    x = tokens(2, 70).to(device)
    exact = copy.deepcopy(pair[0]).to(device)
    found = {}
    for name, model in {"exact": exact, "theirs": in_bf16(pair[0], device), "ours": in_bf16(pair[1], device)}.items():
        logits = model(x) if name == "ours" else model(x).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), x[:, 1:].flatten()).backward()
        found[name] = {"logits": logits.detach().float(), "embedding": model.model.embed_tokens.weight.grad.float()}
        with torch.no_grad():
            found[name]["steps"] = steps_in(model, x, name == "ours")
    for what, truth in found["exact"].items():
        ours, theirs = ((found[name][what] - truth).norm() for name in ("ours", "theirs"))
        assert ours <= BF16 * theirs, what


def steps_in(model: torch.nn.Module, x: torch.Tensor, is_ours: bool) -> torch.Tensor:
    """Logits of the last eight tokens, one at a time."""
    cache, past, logits = model.new_cache(len(x)) if is_ours else None, None, []
    for piece in (x[:, :-8], *x[:, -8:].split(1, 1)):
        if is_ours:
            logits.append(model(piece, cache))
        else:
            outputs = model(piece, past_key_values=past, use_cache=True)
            past = outputs.past_key_values
            logits.append(outputs.logits)
    return torch.cat(logits[1:], 1).float()


def test_gradients_of_all_parameters(pair):
    model, ours = copy.deepcopy(pair[0]), copy.deepcopy(pair[1])
    x = tokens(2, 50, seed=3)
    for logits in (model(x).logits, ours(x)):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    gradients = copy.deepcopy(ours)
    with torch.no_grad():
        for p, q in zip(gradients.parameters(), ours.parameters(), strict=True):
            p.copy_(q.grad)
    pieces = released(gradients)
    sources, seen = readable(pieces), set()
    # The router of one expert, renormalised, has a weight of 1 and no gradient: what is left of it is rounding.
    floor = 1e-6 * max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    for name, parameter in model.named_parameters():
        source = sources[name]
        got = torch.cat([pieces[piece] for piece in source.pieces]).view_as(parameter)
        expected = torch.zeros_like(got) if parameter.grad is None else parameter.grad
        assert (got - expected).abs().max() <= GRADIENTS * expected.abs().max().clamp(min=floor), name
        seen |= set(source.pieces)
    assert {name for name in pieces if "correction_bias" not in name} == seen
