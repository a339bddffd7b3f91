"""Prefill in pieces, sampling, stop tokens, logits of last tokens alone, tokens beyond the vocabulary."""

from __future__ import annotations

import pytest
import torch

from kda_cuda.model import HybridConfig, HybridLM
from kda_cuda.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kda_cuda.nn.generation import next_token

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
SIZES = {"vocab_size": 50, "hidden_size": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8}
KIMI = {
    "num_hidden_layers": 3,
    "layer_types": ("linear_attention", "full_attention", "linear_attention"),
    "num_attention_heads": 2,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "intermediate_size": 48,
    "v_head_dim": 16,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module", params=["hybrid", "kimi linear"])
def model(request):
    """Both models, by one code path."""
    torch.manual_seed(0)
    if request.param == "hybrid":
        return HybridLM(HybridConfig(**SIZES, num_layers=4, head_dim=16, v_head_dim=16, intermediate_size=64))
    return KimiLinearForCausalLM(KimiLinearConfig(**SIZES, **KIMI))


def prompt(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(50, (batch, tokens), generator=torch.Generator().manual_seed(1))


def mask_of(lengths: list[int], side: str) -> torch.Tensor:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return mask if side == "right" else mask.flip(1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("piece", [1, 7, 20, 100])
@torch.no_grad()
def test_prefill_in_pieces_is_one_prefill(model, piece, side):
    """Logits after the last token of rows of three lengths, and the cache that is left."""
    tokens, mask, lengths = prompt(3, 20), mask_of([20, 3, 9], side), [20, 3, 9]
    cache, whole = model.new_cache(3), model.new_cache(3)
    got = model.prefill(tokens, cache, mask, piece)
    torch.testing.assert_close(got, model.prefill(tokens, whole, mask), **CLOSE)
    for b in range(3):
        torch.testing.assert_close(got[b], model(tokens[b : b + 1, mask[b]])[0, -1], **CLOSE)
    assert cache.row_lengths().tolist() == lengths
    step = prompt(3, 1)
    torch.testing.assert_close(model(step, cache), model(step, whole), **CLOSE)


@torch.no_grad()
def test_decoding_of_three_lengths_is_the_parallel_forward(model):
    lengths, tokens = [20, 3, 9], prompt(3, 26)
    mask, cache = mask_of(lengths, "left"), model.new_cache(3)
    steps = [model.prefill(tokens[:, :20], cache, mask)]
    steps += [model(tokens[:, t : t + 1], cache)[:, 0] for t in range(20, 26)]
    for b, length in enumerate(lengths):
        parallel = model(tokens[b : b + 1, 20 - length :])[0, length - 1 :]
        torch.testing.assert_close(torch.stack(steps, 1)[b], parallel, **CLOSE)


@torch.no_grad()
def test_last_only(model):
    tokens, mask = prompt(3, 8), mask_of([8, 3, 5], "right")
    mask[1] = False
    logits, last = model(tokens, attention_mask=mask), model(tokens, attention_mask=mask, last_only=True)
    torch.testing.assert_close(last[[0, 2]], logits[[0, 2], [7, 4]])
    assert last.shape == (3, 50) and not last[1].any()
    with pytest.raises(ValueError, match="last_only is given with tokens"):
        model(tokens[:1], cu_seqlens=torch.tensor([0, 8]), last_only=True)


def test_top_p_draws_from_the_most_likely():
    probabilities = torch.tensor([[0.05, 0.4, 0.3, 0.25]])
    generator = torch.Generator().manual_seed(0)

    def drawn(**options) -> set[int]:
        chosen = {"temperature": 1.0, "top_k": None, "top_p": None} | options
        return {int(next_token(probabilities.log(), *chosen.values(), generator)) for _ in range(200)}

    assert drawn(top_p=0.3) == {1} and drawn(top_p=0.41) == drawn(top_p=0.65) == {1, 2}
    assert drawn(top_p=0.9) == {1, 2, 3} and drawn(top_p=1.0) == drawn() == {0, 1, 2, 3}
    assert drawn(top_p=0.9, top_k=2) == {1, 2} and drawn(temperature=0.0) == {1}


def test_generation_is_seeded_and_read_in_pieces(model):
    tokens = prompt(2, 9)
    options = {"temperature": 1.0, "top_p": 0.9}
    first, again, other = (model.generate(tokens, 12, seed=seed, **options) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(model.generate(tokens, 6, piece=4), model.generate(tokens, 6))


def test_stop_tokens(model):
    tokens = prompt(2, 9)
    free = model.generate(tokens, 10)[:, 9:]
    first = int(free[0, 1])
    got = model.generate(tokens, 10, stop_tokens=[first])[:, 9:]
    for row, whole in zip(got.tolist(), free.tolist(), strict=True):
        end = whole.index(first) + 1 if first in whole else 10
        assert row[:end] == whole[: min(end, len(row))] and set(row[end:]) <= {first}
    stops = sorted(set(free[:, 1].tolist()))
    ends = [min(row.index(t) for t in stops if t in row) for row in free.tolist()]
    assert model.generate(tokens, 10, stop_tokens=stops).shape[1] == 9 + max(ends) + 1


def test_errors(model):
    name, tokens = type(model).__name__, prompt(2, 4)
    cache = model.new_cache(2)
    beyond = tokens.clone()
    beyond[1, 2] = 50
    calls = [
        (lambda: model(beyond), f"kda_cuda::{name}: tokens has 50, expected 0 <= token < 50, vocab_size"),
        (lambda: model(-beyond), f"kda_cuda::{name}: tokens has -50, expected 0 <= token < 50, vocab_size"),
        (lambda: model.prefill(tokens, cache, piece=0), "kda_cuda::prefill: piece is 0, expected >= 1"),
        (lambda: model.prefill(tokens[:, :0], cache), "kda_cuda::prefill: tokens has shape [2, 0]"),
        (lambda: model.stream(tokens, 1, top_p=0.0), "generate: top_p is 0.0, expected 0 < top_p <= 1"),
        (lambda: model.stream(tokens, 1, piece=0), "generate: piece is 0, expected >= 1"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError) as raised:
            call()
        assert str(raised.value).startswith(message)
    with pytest.raises(TypeError, match="tokens has dtype float32, expected int32 or int64"):
        model(tokens.float())
    assert cache.row_lengths().tolist() == [0, 0]
