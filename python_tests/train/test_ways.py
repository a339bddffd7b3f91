"""Ways to compute the same: ranks, parts, recomputation, the compiler, 16 bits. And the models that can be trained."""

from __future__ import annotations

import json

import pytest
import torch

from kda_cuda.models.kimi_linear import KimiLinearForCausalLM

from ..support.ranks import run_ranks
from ..support.train_runs import PARALLEL, STEPS, run, run_rank, write_inputs

PATIENCE = 300  # seconds; two ranks take about ten on a machine that does nothing else
ROUNDING = 1e-4  # of loss and norm after six steps in fp32, between orders of summation


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def plain(arguments, tmp_path_factory) -> list[dict]:
    return run(arguments, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def of_two_ranks(arguments, tmp_path_factory) -> list[dict[str, list[dict]]]:
    """For each rank, its lines by the name of the run."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(run_rank, 2, folder, PATIENCE, 2, arguments)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def assert_alike(rows: list[dict], plain: list[dict], tolerance: float = ROUNDING) -> None:
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    for got, truth in zip(rows, plain, strict=True):
        assert set(got) == set(truth)
        for key, value in truth.items():
            assert got[key] == pytest.approx(value, rel=tolerance), (got, truth)


def test_plain_training_learns(plain):
    losses = [row["loss"] for row in plain]
    assert losses[-1] < losses[0] - 0.05 and plain[-1]["validation_loss"] < losses[0]
    assert [row["lr"] for row in plain][:2] == [3e-3, pytest.approx(3e-3)] and plain[-1]["lr"] < 1e-3


@pytest.mark.parametrize("name", PARALLEL)
def test_two_ranks_have_the_loss_of_one_process(name, plain, of_two_ranks):
    for rows in of_two_ranks:
        assert_alike(rows[name], plain)


def test_two_ranks_resume(of_two_ranks):
    for rows in of_two_ranks:
        assert rows["resumed"] == rows["fsdp"][-2:]


def test_every_rank_learns_why_rank_0_failed(of_two_ranks):
    full = "OSError: [Errno 28] No space left on device"
    assert [rows["failures"] for rows in of_two_ranks] == [
        [full, "ValueError: a shard"],
        [full, "RuntimeError: rank 0: ValueError: a shard"],
    ]


@pytest.mark.parametrize("options", [["--accumulate", "4"], ["--compile", "eager"]], ids=" ".join)
def test_options_that_change_rounding_alone(options, arguments, plain, tmp_path):
    torch.compiler.reset()
    assert_alike(run(arguments, tmp_path, *options), plain)


def test_recomputation_has_the_bits_of_plain_training(arguments, plain, tmp_path):
    assert run(arguments, tmp_path, "--recompute") == plain


def test_bfloat16_stays_near(arguments, plain, tmp_path):
    """The products have 8 bits; weights, moments and the loss are fp32."""
    rows = run(arguments, tmp_path, "--dtype", "bfloat16")
    assert_alike([{**row, "gradient_norm": 0} for row in rows], [{**row, "gradient_norm": 0} for row in plain], 2e-2)
    assert rows != plain
    weights = torch.load(tmp_path / "model.pt", weights_only=True)["weights"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_kimi_linear_is_trained_and_loads(arguments, tmp_path):
    config = {
        "model_type": "kimi_linear",
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "linear_num_heads": 2,
        "linear_head_dim": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "num_experts_per_token": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    rows = run(arguments, tmp_path / "out", "--config", str(tmp_path / "config.json"), "--steps", "2")
    model = KimiLinearForCausalLM.from_pretrained(tmp_path / "out" / "model")
    saved = {name: weight for name, weight in model.state_dict().items() if "correction_bias" not in name}
    torch.manual_seed(0)
    fresh = KimiLinearForCausalLM(model.config).state_dict()
    assert all(not torch.equal(weight, fresh[name]) for name, weight in saved.items())
    assert len(rows) == 2 and rows[1]["loss"] < rows[0]["loss"]
