"""Options of the program: what is refused, what the document shows, what is written."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from kda_cuda import train
from kda_cuda.training import metrics
from kda_cuda.training.options import Options
from kda_cuda.training.ranks import World

DOCUMENT = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps is 0, expected >= 1"),
        (["--save-every", "0"], "--save-every is 0, expected >= 1"),
        (["--warm-up", "9", "--steps", "8"], "--warm-up is 9, expected 1 to --steps 8"),
        (["--lr", "nan"], "--lr is nan, expected a finite positive number"),
        (["--clip", "0"], "--clip is 0.0, expected a finite positive number"),
        (["--lr-last", "2"], "--lr-last is 2.0, expected 0 to 1"),
        (["--weight-decay", "-1"], "--weight-decay is -1.0, expected a finite number >= 0"),
        (["--seed", "-1"], "--seed is -1, expected 0 to 2147483647"),
        (["--device", "abacus"], "--device is abacus, expected cpu or cuda"),
        (["--device", "cpu:1"], "--device is cpu:1, expected cpu or cuda"),
        (["--dtype", "float16"], "--dtype is float16, expected one of float32, bfloat16"),
        (["--parallel", "tensor"], "--parallel is tensor, expected one of fsdp, ddp"),
        (["--text", "no/such/file"], "--text is no/such/file, expected a file or a folder"),
        (["--config", "no/such/file"], "--config is no/such/file, expected a file"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert f"error: {message}\n" in capsys.readouterr().err


def test_rows_are_divided_among_processes():
    o, world = Options(batch=12, accumulate=2), World(0, 4, "cpu")
    with pytest.raises(ValueError, match=r"--batch is 12, expected a multiple of 8: 4 processes times --accumulate 2"):
        o.check_world(world)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is no JSON: "),
        ('{"hidden": 3}', r"has \['hidden'\], expected fields of HybridConfig or a model_type"),
        ("[1]", "is a list, expected fields with their values"),
        ('{"num_heads": 0.5}', r"HybridConfig: num_heads is 0.5 \(float\), expected an int"),
        ('{"norm_eps": NaN}', "HybridConfig: norm_eps is nan, expected a positive number"),
        ('{"hidden_size": 0}', "HybridConfig: hidden_size is 0, expected a positive number"),
        ('{"model_type": "kimi_linear", "layers": 3}', r"unknown fields \['layers'\]"),
        ('{"vocab_size": 100}', "the text has token 120, expected less than the vocab_size 100 of --config"),
    ],
)
def test_bad_configs(config, message, tmp_path):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "text").write_text("x" * 1000)
    with pytest.raises((ValueError, TypeError), match=message):
        train.main(["--config", str(tmp_path / "config.json"), "--text", str(tmp_path / "text"), "--device", "cpu"])


def test_what_a_tokenizer_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"kda_cuda\.train: .* has no tokenizer\.json: pip install transformers"):
        train.main(["--tokenizer", str(tmp_path), "--device", "cpu"])


def test_what_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"kda_cuda\.train: .*tokenizer\.json is no tokenizer\.json: "):
        train.main(["--tokenizer", str(tmp_path), "--device", "cpu"])


def test_the_results_are_not_read_as_text(tmp_path, capsys):
    """A run that is resumed would have another text."""
    (tmp_path / "link").symlink_to(tmp_path)
    for out in (tmp_path, tmp_path / "run", tmp_path / "link" / "run"):
        with pytest.raises(SystemExit):
            train.main(["--text", str(tmp_path), "--out", str(out), "--device", "cpu"])
        assert f"error: --out is {out}, expected a folder outside of --text {tmp_path}" in capsys.readouterr().err


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        train.main(["--device", "cuda"])
    assert "error: --device is cuda, expected cpu, since torch finds no GPU\n" in capsys.readouterr().err


def test_commands_of_the_document_are_understood():
    commands = re.findall(r"^(?:python|torchrun .*) -m kda_cuda\.train(.*?)(?:  +#.*)?$", DOCUMENT, re.M)
    assert len(commands) == 5
    for command in commands:
        train._parser().parse_args(shlex.split(command))
    known = {option for action in train._parser()._actions for option in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", DOCUMENT)) <= known | {"--nproc-per-node"}


def test_defaults_in_the_help_are_the_defaults():
    o = Options(device="cpu")
    for action in train._parser()._actions:
        told = re.search(r"default: ([\d.]+)$", action.help)
        if told:
            assert float(told[1]) == getattr(o, action.dest), action.dest


def test_metrics_are_kept_up_to_a_step_and_drawn(tmp_path):
    path, keys = tmp_path / "metrics.jsonl", ("loss", "lr", "gradient_norm", "tokens_per_second")
    rows = [{"step": n, **dict.fromkeys(keys, n)} for n in range(1, 5)]
    rows[1]["validation_loss"] = 1.0
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '\0\0\n[1]\n{"step": 5, "lo')
    log = metrics.Metrics(path, 3)
    with pytest.raises(OSError, match="another run writes into --out"):
        metrics.Metrics(path, 0)
    log.write(rows[3] | {"loss": 9})
    log.close()
    assert metrics.read(path) == [*rows[:3], rows[3] | {"loss": 9}]
    assert metrics.draw(tmp_path / "curves.png", metrics.read(path))
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_nothing_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not metrics.draw(tmp_path / "curves.png", []) and not any(tmp_path.iterdir())
