"""The claims: bytes of the released cache, and every line of the decoding benchmark at tiny widths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.python import claims

SMALL = ["--tiny", "--device", "cpu", "--layers", "4", "--tokens", "8", "40", "--steps", "1", "--memory", "25000"]


def test_the_released_cache_is_a_quarter():
    """Kimi Linear report, section 5: up to 75 % less; 20 of 27 layers are KDA, with states in fp32."""
    rows = {(row["model"], row["tokens"]): row for row in claims.cache_bytes([1 << 10, 1 << 17, 1 << 20])}
    released = rows["hybrid", 1 << 20]
    assert (released["kda_layers"], released["layers"]) == (20, 27)
    assert released["all_mla_bytes"] == 27 * (512 + 64) * 2 << 20
    state, conv = 32 * 128 * 128 * 4, 3 * 4096 * 3 * 2
    assert released["bytes"] == (7 * (512 + 64) * 2 << 20) + 20 * (state + conv)
    assert rows["hybrid", 1 << 17]["saved"] >= 0.725 and released["saved"] >= 0.735
    assert rows["strict_3_to_1", 1 << 17]["saved"] > 0.735
    assert 0.748 < rows["strict_3_to_1", 1 << 20]["saved"] < 0.75
    assert rows["hybrid", 1 << 10]["saved"] < 0  # a short context is cheaper in latents


def test_documents_have_these_bytes():
    """Tables and results were counted by the code as it is."""
    root = Path(__file__).parents[2]
    table, written = (root / "docs/claims.md").read_text(), root / "bench/results/claims_cache.json"
    rows = json.loads(written.read_text())["rows"]
    assert claims.cache_bytes(claims.TOKENS) == rows
    for row in rows:
        cell = f"{row['bytes']:,} | {row['all_mla_bytes']:,} | {row['saved']:.2%}"
        assert row["tokens"] not in (1 << 10, 1 << 17, 1 << 20) or cell in table


def test_experts_change_no_byte_of_the_cache():
    config = claims.released()
    with torch.device("meta"):
        whole = claims.KimiLinearForCausalLM(config).to(torch.bfloat16)
    assert whole.cache_bytes(1 << 20) == claims.on_meta(claims.dense(config)).cache_bytes(1 << 20)
    assert sum(p.numel() for p in whole.parameters()) > 48e9


def test_every_row_is_verified_and_timed(tmp_path, capsys):
    out = tmp_path / "claims.json"
    result = claims.main([*SMALL, "--out", str(out)])
    assert json.loads(out.read_text()) == json.loads(json.dumps(result, default=str))
    kinds = [row["what"] for row in result["rows"]]
    assert kinds == ["cache"] * 4 + ["decode"] * 4 + ["faster"] * 4
    assert 0 < max(result["differences"].values()) < 1e-4
    decoded = {(row["model"], row["tokens"]): row for row in result["rows"] if row["what"] == "decode"}
    for (name, tokens), row in decoded.items():
        model = claims.on_device(claims.dense(claims.released(4, **claims.TINY)), "cpu", torch.float32)
        bytes_each = model.cache_bytes(tokens) if name == "hybrid" else 4 * tokens * (16 + 8) * 4
        assert row["equal"]["bytes"] == bytes_each and row["equal"]["sequences"] == 1
        assert row["largest"]["sequences"] == min(256, 25000 // bytes_each)
        assert row["equal"]["token_us"] > 0 and row["equal"]["eager_us"] > 0
    assert "times as fast" in capsys.readouterr().out


def test_experts_decode_too():
    args = claims.arguments([*SMALL, "--what", "decode", "--tokens", "8", "--experts", "--most-sequences", "2"])
    result = {"rows": [], "differences": {}}
    claims.decode(args, result)
    assert [row["largest"]["sequences"] for row in result["rows"]] == [2, 2]


def test_a_batch_that_does_not_fit_is_made_smaller(monkeypatch):
    args, tried, real = claims.arguments(SMALL), [], claims.step_times

    def scarce(model, sequences, *more):
        tried.append(sequences)
        if sequences > 2:
            raise torch.OutOfMemoryError
        return real(model, sequences, *more)

    monkeypatch.setattr(claims, "step_times", scarce)
    monkeypatch.setattr(args, "memory", 60000.0)
    model = claims.on_device(claims.dense(claims.released(4, **claims.TINY)), "cpu", torch.float32)
    assert claims.largest(model, 40, args)["sequences"] == 2 and len(tried) > 2
    monkeypatch.setattr(args, "memory", 1.0)
    assert claims.largest(model, 40, args) == {"failed": "no sequence fits"}


def test_what_is_wrong_is_not_timed(monkeypatch):
    forward = claims.KimiLinearForCausalLM.forward

    def forgets(self, tokens, cache=None, **more):
        if cache is not None and tokens.shape[1] == 1:
            cache.reset_states()
        return forward(self, tokens, cache, **more)

    monkeypatch.setattr(claims.KimiLinearForCausalLM, "forward", forgets)
    with pytest.raises(SystemExit, match=r"2 of 2 rows failed, the first: wrong, not timed: a cached step differs by"):
        claims.main([*SMALL, "--what", "decode"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps is 0, expected at least 1"),
        (["--most-sequences", "0"], "--most-sequences is 0, expected at least 1"),
        (["--tokens", "0"], "--tokens has 0, expected at least 1"),
        (["--device", "cpu"], "--memory is absent with --device cpu, expected the bytes that caches may take"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        claims.main(arguments)
    assert message in capsys.readouterr().err
