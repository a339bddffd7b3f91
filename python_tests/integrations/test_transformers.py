"""transformers' models with KDA: the operation registered, and whole layers patched, against transformers itself."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch

from kda_cuda import testing
from kda_cuda.integrations import transformers as door

from .peers import documented

# `make test` installs both; a GPU machine without a network may lack them, and then says so.
transformers = pytest.importorskip("transformers", minversion="5.17", reason="no transformers >= 5.17 here")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "linear_head_dim": 16,
    "linear_num_heads": 2,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = ["model.layers.0.self_attn", "model.layers.2.self_attn"]
TOKENS = torch.arange(140).reshape(2, 70) * 7 % 61 + 3


def new_model():
    torch.manual_seed(0)
    model = transformers.KimiLinearForCausalLM(transformers.KimiLinearConfig(**SIZES)).eval()
    with torch.no_grad():  # away from the initialisation, at which some gradients are tiny
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape))
    return model


@pytest.fixture(scope="module")
def plain():
    return new_model()


@pytest.fixture
def model(plain):
    return copy.deepcopy(plain)


@pytest.fixture
def registered():
    yield door.register()
    door.unregister()


def outputs(model, tokens=TOKENS, mask=None) -> dict[str, torch.Tensor]:
    """The logits and every gradient, by name."""
    model.zero_grad()
    logits = model(tokens, attention_mask=mask).logits
    torch.manual_seed(1)
    (logits * torch.randn(logits.shape)).sum().backward()
    return {"logits": logits.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(results: dict, expected: dict, limit: float = 1e-4) -> None:
    assert results.keys() == expected.keys()
    for name, x in expected.items():
        error = (results[name] - x).double().norm() / x.double().norm().clamp_min(1e-12)
        assert error < limit, f"{name}: {error:.1e}"


def kernels(call) -> list[str]:
    """The kernels that ran on the emulator."""
    with testing.emulated():
        call()
        return testing.take_record()


def test_registered(plain, model):
    expected = outputs(plain)
    assert "kimi_linear" in door.register()
    try:
        assert_same(outputs(model), expected)
        ran = kernels(lambda: outputs(model, TOKENS[:1, :5]))
    finally:
        door.unregister()
    for op in ("chunk_fwd", "chunk_bwd"):
        assert any(op in k for k in ran)
    assert kernels(lambda: outputs(model, TOKENS[:1, :5])) == []


@pytest.mark.parametrize("masked", [False, True])
def test_patched(plain, model, masked):
    mask = torch.ones_like(TOKENS) if masked else None
    if masked:
        mask[0, :9] = 0
    expected = outputs(plain, mask=mask)
    names = {n: id(p) for n, p in model.named_parameters()}
    assert door.patch(model) == LAYERS == door.patch(model)
    assert {n: id(p) for n, p in model.named_parameters()} == names
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert_same(outputs(model, mask=mask), expected)
    assert door.unpatch(model) == LAYERS and door.unpatch(model) == []
    assert_same(outputs(model, mask=mask), expected, limit=1e-12)


def test_patched_layers_run_on_kernels(model):
    door.patch(model)
    ran = kernels(lambda: outputs(model, TOKENS[:1, :5]))
    for op in ("chunk_fwd", "chunk_bwd"):
        assert sum(op in k for k in ran) >= len(LAYERS)


@pytest.mark.parametrize("way", ["register", "patch"])
def test_generation(plain, model, way):
    """Prefill and cached steps give the tokens and scores of the model itself."""
    options = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    prompt, mask = TOKENS[:, :9], torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    expected = plain.generate(prompt, attention_mask=mask, **options)
    if way == "patch":
        door.patch(model)
    else:
        door.register()
    try:
        got = model.generate(prompt, attention_mask=mask, **options)
    finally:
        door.unregister()
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)


def test_a_cache_is_continued_in_pieces_by_either(plain, model):
    """Pieces of 40, 1, 2 and 27 tokens, patched and not in turn, are the whole row."""
    with torch.no_grad():
        whole, cache, logits, begin = plain(TOKENS).logits, None, [], 0
        for size, change in ((40, door.patch), (1, door.unpatch), (2, door.patch), (27, None)):
            if change:
                change(model)
            out = model(TOKENS[:, begin : begin + size], past_key_values=cache, use_cache=True)
            logits, cache, begin = [*logits, out.logits], out.past_key_values, begin + size
    torch.testing.assert_close(torch.cat(logits, dim=1), whole, rtol=1e-4, atol=1e-4)


def test_steps_run_the_decoding_kernel(model):
    door.patch(model)
    with torch.no_grad():
        cache = model(TOKENS[:1, :5], use_cache=True).past_key_values
        ran = kernels(lambda: model(TOKENS[:1, 5:6], past_key_values=cache, use_cache=True))
    assert sum("decode" in k for k in ran) == len(LAYERS)


def test_hooks_and_copies(plain, model):
    door.patch(model)
    layer, seen = model.get_submodule(LAYERS[0]), []
    for module in (layer, layer.q_proj, layer.forget_gate, layer.o_norm):
        module.register_forward_hook(lambda m, *_: seen.append(m))
    twin = copy.deepcopy(model)
    assert_same(outputs(model), outputs(plain))
    assert {id(m) for m in seen} == {id(m) for m in (layer, layer.q_proj, layer.forget_gate, layer.o_norm)}
    with torch.no_grad():
        twin.get_submodule(LAYERS[0]).o_proj.weight.zero_()
        assert not torch.equal(twin(TOKENS).logits, model(TOKENS).logits)
    assert door.unpatch(twin) == LAYERS and twin.get_submodule(LAYERS[0]).forward.__self__ is not layer


def test_checkpoints_pass_the_patch_both_ways(plain, model):
    def saved(x):
        file = io.BytesIO()
        torch.save(x.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    before, patched = saved(plain), new_model()
    door.patch(patched)
    with torch.no_grad():
        for p in patched.parameters():
            p.mul_(1.5)
    trained = saved(patched)
    patched.load_state_dict(before)
    model.load_state_dict(trained)
    with torch.no_grad():
        torch.testing.assert_close(patched(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)
        door.unpatch(patched)
        patched.load_state_dict(trained)
        assert torch.equal(patched(TOKENS).logits, model(TOKENS).logits)


def test_lora(model):
    peft = pytest.importorskip("peft", reason="no peft here")
    door.patch(model)
    targets = ["q_proj", "v_proj", "f_b_proj", "o_proj"]
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapters = [p for n, p in tuned.named_parameters() if "layers.0.self_attn" in n and "lora" in n]
    assert len(adapters) == 2 * len(targets) and all(p.grad.norm() > 0 for p in adapters)
    with torch.no_grad():
        logits = tuned(TOKENS).logits
        cache = tuned(TOKENS[:, :60], use_cache=True).past_key_values
        steps = [tuned(TOKENS[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(60, 64)]
        torch.testing.assert_close(torch.cat(steps, 1), logits[:, 60:64], rtol=1e-4, atol=1e-4)
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
        assert door.unpatch(merged) == LAYERS
        torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


def test_the_document(model):
    """Its blocks in order, with a model and inputs."""
    register, patch = documented("transformers")
    given = {"model": model, "inputs": {"input_ids": TOKENS[:1, :5], "max_new_tokens": 2}}
    try:
        exec(register, given)
    finally:
        door.unregister()
    exec(patch, given)
    assert given["names"] == LAYERS and door.unpatch(model) == []


def test_what_cannot_be_patched_is_named(model):
    with pytest.raises(ValueError, match=r"kda_cuda::patch: Linear has no KDA layer"):
        door.patch(torch.nn.Linear(2, 2))
    model.get_submodule(LAYERS[1]).head_dim = 512
    with pytest.raises(ValueError, match=r"model.layers.2.self_attn has head_dim=512, expected at most 256"):
        door.patch(model)
    assert door.unpatch(model) == []


def test_unserved_calls_run_in_transformers(registered):
    """An argument that the operation does not take, and a head that is too wide."""
    from transformers.models.kimi_linear import modeling_kimi_linear as own

    def call(width, **options):
        torch.manual_seed(0)
        q, k, v, g = (torch.randn(1, 8, 1, width) for _ in range(4))
        return own.chunk_kimi_delta_attention(
            q, k, v, g=-g.abs(), beta=torch.rand(1, 8, 1), use_qk_l2norm_in_kernel=True, **options
        )[0]

    with testing.emulated(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        too_wide = call(512)
        assert testing.take_record() == []
        odd_chunk = call(16, chunk_size=8)
        assert testing.take_record() == []
        served = call(16)
        assert any("chunk_fwd" in kernel for kernel in testing.take_record())
    assert too_wide.isfinite().all()
    torch.testing.assert_close(odd_chunk, served, rtol=1e-4, atol=1e-5)
