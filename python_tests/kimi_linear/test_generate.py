"""``python -m kda_cuda.generate`` with a checkpoint and a tokenizer of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import tokenizers
import torch

from kda_cuda import generate
from kda_cuda.models.kimi_linear import KimiLinearForCausalLM

from .test_checkpoint import CONFIG

WORDS = [f"w{i}" for i in range(61)]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    KimiLinearForCausalLM(CONFIG).save_pretrained(tmp_path)
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_the_program_continues_a_prompt(folder):
    arguments = ["--model", folder, "--prompt", "w3 w5 w8", "--max-new-tokens", "6", "--piece", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "kda_cuda.generate", *arguments], capture_output=True, text=True, check=True
    )
    expected = KimiLinearForCausalLM.from_pretrained(folder).generate(torch.tensor([[3, 5, 8]]), 6)[0, 3:]
    assert done.stdout.split() == [WORDS[i] for i in expected.tolist()]
    assert "3 tokens read" in done.stderr and "6 added" in done.stderr


def test_bad_arguments(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="--dtype is bf61, expected a dtype of torch"):
        generate.main(["--model", str(folder), "--prompt", "w3", "--dtype", "bf61"])
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        generate.tokenizer(folder, "kda_cuda.generate")
    (folder / "tokenizer.json").unlink()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install transformers"):
        generate.tokenizer(folder, "kda_cuda.generate")
