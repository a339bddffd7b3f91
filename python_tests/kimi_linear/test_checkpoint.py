"""Checkpoints: the names that are met, shards, fp32 parameters, damage, and a disk that is full."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from kda_cuda.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kda_cuda.models.kimi_linear.names import released

from ..support.kimi_linear import relative_error, theirs, tokens, transformers

CONFIG = KimiLinearConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    linear_num_heads=2,
    linear_head_dim=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=16,
    moe_intermediate_size=16,
    num_experts=4,
    num_experts_per_token=2,
    initializer_range=0.2,
)
SHARD = 20_000  # bytes: several files


@pytest.fixture
def model() -> KimiLinearForCausalLM:
    torch.manual_seed(0)
    return KimiLinearForCausalLM(CONFIG)


def assert_equal(a: KimiLinearForCausalLM, b: KimiLinearForCausalLM) -> None:
    theirs, ours = a.state_dict(), b.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_saved_model_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=SHARD)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 5 and all((tmp_path / file).stat().st_size < SHARD + 10_000 for file in files)
    assert set(index["weight_map"]) == set(released(model))
    restored = KimiLinearForCausalLM.from_pretrained(tmp_path)
    assert_equal(restored, model)
    assert restored.config.to_dict() == json.loads((tmp_path / "config.json").read_text()) | {
        "architectures": ["KimiLinearForCausalLM"]
    }


@pytest.mark.parametrize("name", ["released", "groups"])
@torch.no_grad()
def test_what_we_save_transformers_loads(name, tmp_path):
    """And what it saves, and the names of its own modules, load here."""
    library, model, x = transformers(), theirs(name), tokens(2, 20)
    expected = model(x).logits
    model.save_pretrained(tmp_path / "saved")
    ours = KimiLinearForCausalLM.from_pretrained(tmp_path / "saved")
    ours.save_pretrained(tmp_path / "released", max_shard_bytes=SHARD)
    back = library.KimiLinearForCausalLM.from_pretrained(tmp_path / "released")
    assert relative_error(back(x).logits, expected) <= 1e-5
    assert relative_error(KimiLinearForCausalLM.from_pretrained(tmp_path / "released")(x), expected) <= 1e-4
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/config.json").write_text((tmp_path / "saved/config.json").read_text())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert any("forget_gate" in name for name in state) and any("experts.gate_up_proj" in name for name in state)
    safetensors.torch.save_file(state, tmp_path / "modules/model.safetensors")
    assert_equal(KimiLinearForCausalLM.from_pretrained(tmp_path / "modules"), ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_and_correction_biases_stay_in_fp32(model, dtype, tmp_path):
    model.save_pretrained(tmp_path)
    low = KimiLinearForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, tensor in low.state_dict().items():
        is_kept = name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))
        assert tensor.dtype == (torch.float32 if is_kept else dtype), name
        if is_kept:
            assert torch.equal(tensor, model.state_dict()[name])
    low.save_pretrained(tmp_path / "low")
    again = KimiLinearForCausalLM.from_pretrained(tmp_path / "low")  # the dtype that its config says
    assert again.weights_dtype() == dtype
    assert_equal(again, low)


def test_one_error_lists_every_tensor_that_does_not_fit(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    tensors = {name: tensor.clone() for name, tensor in released(model).items()}
    del tensors["model.norm.weight"], tensors["model.layers.1.block_sparse_moe.experts.2.w1.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        KimiLinearForCausalLM.from_pretrained(tmp_path)
    assert str(raised.value) == (
        f"kda_cuda::from_pretrained: the tensors in {tmp_path} are not those of its config.json\n"
        "  2 missing: model.layers.1.block_sparse_moe.experts.2.w1.weight, model.norm.weight\n"
        "  1 unexpected: model.layers.9.mlp.up_proj.weight\n"
        "  1 misshapen: lm_head.weight has shape [60, 32], expected [61, 32]"
    )


def test_a_tensor_that_is_there_twice(model, tmp_path):
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    tensors = {name: tensor.clone() for name, tensor in released(model).items()}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name.replace("mlp", "block_sparse_moe")] = tensors[name].clone()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 twice: {name} is in .* and "):
        KimiLinearForCausalLM.from_pretrained(tmp_path)


def test_another_shape_of_a_gate_parameter(model, tmp_path):
    """A_log [heads], as newer files have it."""
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    tensors = {name: tensor.clone() for name, tensor in released(model).items()}
    for name in [name for name in tensors if name.endswith("A_log")]:
        tensors[name] = tensors[name].flatten()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    assert_equal(KimiLinearForCausalLM.from_pretrained(tmp_path), model)


def test_damaged_and_missing_files(model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        KimiLinearForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_bytes=SHARD)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[2]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=f"kda_cuda::from_pretrained: {shard} is damaged: "):
        KimiLinearForCausalLM.from_pretrained(tmp_path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"kda_cuda::from_pretrained: {shard} is missing"):
        KimiLinearForCausalLM.from_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(ValueError, match=f"{index} is damaged"):
        KimiLinearForCausalLM.from_pretrained(tmp_path)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"has neither model\.safetensors\.index\.json nor model\.safetensors"):
        KimiLinearForCausalLM.from_pretrained(tmp_path)


def test_a_second_save_replaces_the_first(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_bytes=SHARD)
    (tmp_path / "tokenizer.json").write_text("{}")
    before = set(tmp_path.glob("model-*.safetensors"))
    other = KimiLinearForCausalLM(CONFIG)
    other.save_pretrained(tmp_path, max_shard_bytes=10**9)
    assert_equal(KimiLinearForCausalLM.from_pretrained(tmp_path), other)
    after = set(tmp_path.glob("*.safetensors"))
    assert len(before) > 5 and len(after) == 1 and not before & after
    other.save_pretrained(tmp_path)
    assert len(set(tmp_path.glob("*.safetensors"))) == 1
    names = {path.name for path in tmp_path.iterdir()} - {path.name for path in tmp_path.glob("*.safetensors")}
    assert names == {"config.json", "model.safetensors.index.json", "tokenizer.json"}


def test_a_full_disk_leaves_the_old_checkpoint(model, tmp_path):
    """The limit on the size of a file stands for the disk."""
    model.save_pretrained(tmp_path, max_shard_bytes=SHARD)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with pytest.raises(
            OSError, match=r"kda_cuda::save_pretrained: .* cannot be written, the checkpoint in it stays"
        ):
            KimiLinearForCausalLM(CONFIG).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_equal(KimiLinearForCausalLM.from_pretrained(tmp_path), model)


PEAK = """
import resource, sys, torch
from kda_cuda.models.kimi_linear import KimiLinearForCausalLM
torch.zeros(4) @ torch.zeros(4)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = KimiLinearForCausalLM.from_pretrained(sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_loading_takes_one_file_beside_the_model(tmp_path):
    """At the peak of resident memory: a second copy would be 50 MB more."""
    sizes = {"hidden_size": 64, "intermediate_size": 16_000, "mlp_layer_types": ("dense",) * 4}
    model = KimiLinearForCausalLM(KimiLinearConfig(**vars(CONFIG) | sizes))
    model.save_pretrained(tmp_path, max_shard_bytes=8_000_000)
    size = sum(t.nbytes for t in model.state_dict().values())
    del model
    grown = int(subprocess.check_output([sys.executable, "-c", PEAK, str(tmp_path)], text=True))
    assert size > 49e6 and grown < size + 30e6


def test_without_safetensors(model, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    message = "safetensors is not installed, expected it: pip install safetensors"
    with pytest.raises(ImportError, match=f"kda_cuda::save_pretrained: {message}"):
        model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match=f"kda_cuda::from_pretrained: {message}"):
        KimiLinearForCausalLM.from_pretrained(tmp_path)
