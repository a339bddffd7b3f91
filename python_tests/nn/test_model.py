"""The hybrid model: 3 KDA to 1 MLA, a cache that agrees with the parallel forward, generation."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from kda_cuda.layers import KimiDeltaAttention, NoPEMultiLatentAttention
from kda_cuda.model import HybridConfig, HybridLM

CONFIG = HybridConfig(
    vocab_size=50, hidden_size=32, num_layers=8, head_dim=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> HybridLM:
    torch.manual_seed(0)
    return HybridLM(CONFIG)


def prompt(batch: int = 2, tokens: int = 70) -> torch.Tensor:
    return torch.randint(50, (batch, tokens), generator=torch.Generator().manual_seed(1))


def test_three_kda_layers_to_one_mla(model):
    kinds = [type(layer.self_attn) for layer in model.model.layers]
    assert kinds == ([KimiDeltaAttention] * 3 + [NoPEMultiLatentAttention]) * 2


def test_parameter_names_are_those_of_the_released_model(model):
    names = set(model.state_dict())
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= names
    block = {"input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight"}
    block |= {f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
    assert {f"model.layers.{n}.{name}" for n in range(8) for name in block} <= names


@pytest.mark.parametrize("parts", [[1] * 70, [64, 1, 1, 4], [3, 67]], ids=["ones", "prefill", "pieces"])
@torch.no_grad()
def test_cached_equals_parallel(model, parts):
    tokens, cache = prompt(), model.new_cache(2)
    pieces = torch.cat([model(part, cache) for part in tokens.split(parts, dim=1)], 1)
    torch.testing.assert_close(pieces, model(tokens), rtol=1e-4, atol=1e-4)
    assert cache.nbytes() == 2 * model.cache_bytes(70)


def test_a_model_that_forgets_is_not_the_same(model):
    """So that the comparison above can fail."""
    tokens, cache = prompt(), model.new_cache(2)
    model(tokens[:, :69], cache)
    cache.reset_states()
    assert (model(tokens[:, 69:], cache) - model(tokens)[:, 69:]).abs().max() > 1e-2


def test_cache_sizes(model):
    kda = model.cache_bytes(0)
    assert kda == 6 * (3 * 32 * 3 * 4 + 2 * 16 * 16 * 4)
    assert model.cache_bytes(1000) - kda == 2 * 1000 * (16 + 8) * 4
    assert model.multi_latent_cache_bytes(1000) == 4 * (model.cache_bytes(1000) - kda)
    assert model.full_attention_cache_bytes(1000) == 8 * 1000 * 2 * 32 * 4
    assert 2 * copy.deepcopy(model).bfloat16().full_attention_cache_bytes(7) == model.full_attention_cache_bytes(7)


@torch.no_grad()
def test_greedy_generation_takes_the_most_likely_token(model):
    tokens = prompt(tokens=9)
    out = model.generate(tokens, 6)
    assert torch.equal(out[:, :9], tokens)
    for t in range(9, 15):
        assert torch.equal(out[:, t], model(out[:, :t])[:, -1].argmax(-1))


def test_sampling_is_seeded_and_keeps_to_top_k(model):
    tokens = prompt(tokens=9)
    draws = [model.generate(tokens, 20, temperature=1.0, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    few = model.generate(tokens, 20, temperature=5.0, top_k=2, seed=5)
    with torch.no_grad():
        best = model(few[:, :-1])[:, 8:].topk(2).indices
    assert (few[:, 9:, None] == best).any(-1).all()
    assert not (few[:, 9:] == best[..., 0]).all()
    assert torch.equal(model.generate(tokens, 5, temperature=2.0, top_k=1), model.generate(tokens, 5))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tokens": torch.zeros(1, 0).long()}, "tokens has shape [1, 0], expected [batch, prompt], prompt >= 1"),
        ({"tokens": torch.zeros(3).long()}, "tokens has shape [3], expected [batch, prompt], prompt >= 1"),
        ({"temperature": -1.0}, "temperature is -1.0, expected >= 0"),
        ({"top_k": 0}, "top_k is 0, expected >= 1"),
    ],
)
def test_bad_generation_arguments(model, arguments, message):
    with pytest.raises(ValueError) as error:
        model.generate(**{"tokens": prompt(), "max_new_tokens": 1, **arguments})
    assert str(error.value) == f"generate: {message}"


def test_bad_config():
    with pytest.raises(ValueError, match="HybridConfig: num_heads is 0, expected a positive number"):
        HybridConfig(num_heads=0)


def test_survives_deepcopy_pickle_and_state_dict(model):
    tokens, saved = prompt(), io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    restored = HybridLM(CONFIG)
    restored.load_state_dict(torch.load(saved, weights_only=True))
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), restored):
            assert torch.equal(twin(tokens), model(tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_decoding(model, dtype):
    tokens, low = prompt(), copy.deepcopy(model).to(dtype)
    cache = low.new_cache(2)
    with torch.no_grad():
        exact = model(tokens)
        for logits in (low(tokens), torch.cat([low(t, cache) for t in tokens.split(1, 1)], 1)):
            assert logits.dtype == dtype
            assert (logits - exact).square().mean().sqrt() <= 0.05 * exact.square().mean().sqrt()


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model, tokens = HybridLM(CONFIG), prompt(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
