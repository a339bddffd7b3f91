"""The demo: a short run learns, remembers and decodes; its options, files and refusals."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch

from kda_cuda import demo


@pytest.fixture(scope="module")
def short_run(tmp_path_factory) -> tuple[dict, Path]:
    """The real demo on the real text, fewer steps of it."""
    out = tmp_path_factory.mktemp("demo")
    return demo.main(["--steps", "100", "--device", "cpu", "--out", str(out)]), out


def test_the_model_uses_its_memory(short_run):
    """Forgetting the KDA state and the MLA cache every 8 bytes, the convolutions kept, costs at least 5 %."""
    result, _ = short_run
    assert result["forgetful"] >= 1.05 * result["bits_per_byte"]


def test_a_short_run_learns(short_run):
    result, _ = short_run
    assert 4 < result["order0"] < 5.5
    assert 1.0 < result["bits_per_byte"] <= 0.65 * result["order0"]


def test_decoding_equals_the_parallel_forward(short_run):
    result, _ = short_run
    assert 0 < result["difference"] <= result["tolerance"] < 0.01


def test_kda_makes_the_cache_small(short_run):
    sizes = short_run[0]["cache_bytes"]
    hybrid, full = sizes["hybrid (3 KDA : 1 MLA)"], sizes["all multi-head attention"]
    assert full["1M"] == 1024 * full["1k"]
    assert hybrid["1M"] < full["1M"] / 10 and hybrid["1k"] < full["1k"]


def test_files(short_run):
    result, out = short_run
    written = json.loads((out / "demo.json").read_text())
    assert written["bits_per_byte"] == result["bits_per_byte"] == written["validation"][-1]["bits_per_byte"]
    assert (out / "demo.png").read_bytes()[:4] == b"\x89PNG"
    saved = torch.load(out / "model.pt", weights_only=True)
    model = demo.HybridLM(demo.HybridConfig(**saved["config"]))
    model.load_state_dict(saved["weights"])


def small_text(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_bytes(b"".join(b"line %d of a small text\n" % n for n in range(400)))
    return path


def test_own_text_in_bfloat16_without_matplotlib(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    text, out = small_text(tmp_path), tmp_path / "out"
    demo.main(["--text", str(text), "--steps", "3", "--device", "cpu", "--dtype", "bfloat16", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "torch.bfloat16" in printed and "3/3" in printed and "no figure" in printed and ": equal" in printed
    assert not (out / "demo.png").exists()


def test_the_same_seed_gives_the_same_run(tmp_path):
    text = str(small_text(tmp_path))
    common = ["--text", text, "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]
    runs = [demo.main([*common, "--seed", seed])["bits_per_byte"] for seed in ("5", "5", "6")]
    assert runs[0] == runs[1] != runs[2]


def test_the_demo_says_that_the_reference_runs_on_the_cpu():
    told = demo.served_by(demo.HybridConfig(), "cpu", torch.float32).splitlines()
    assert told[0] == "KDA forward: the PyTorch reference (CPU tensors run the PyTorch reference)"
    assert told[1].startswith("KDA backward: the PyTorch reference (")


@pytest.mark.parametrize("gpu", [False, True])
def test_make_demo_builds_kernels_for_a_gpu_alone(tmp_path, gpu):
    """What `make` would run, without a GPU and with one (by the name of its tool)."""
    tools = [tmp_path / name for name in ("sh", "make", *["nvidia-smi"] * gpu)]
    for tool in tools:
        tool.symlink_to(f"/usr/bin/{tool.name}" if tool.name != "nvidia-smi" else "/bin/true")
    told = subprocess.check_output(
        ["/usr/bin/make", "-n", "demo", f"VENV={tmp_path}/venv"], text=True, cwd=Path(demo.__file__).parent.parent,
        env={"PATH": str(tmp_path), "HOME": os.environ.get("HOME", "/")},
    )  # fmt: skip
    assert ("pip install -q --no-build-isolation" in told) == gpu
    assert ("No GPU: no kernel is compiled" in told) and "-m kda_cuda.demo" in told


def test_a_difference_between_decoding_and_forward_fails_the_demo(tmp_path, monkeypatch):
    reset = demo.HybridLM.forward

    def forgets(self, tokens, cache=None, **more):
        if cache is not None and tokens.shape[1] == 1:
            cache.reset_states()
        return reset(self, tokens, cache, **more)

    monkeypatch.setattr(demo.HybridLM, "forward", forgets)
    with pytest.raises(SystemExit, match="step-by-step decoding differs from the parallel forward"):
        demo.main(["--text", str(small_text(tmp_path)), "--steps", "1", "--device", "cpu", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "--steps is 0, expected >= 1"),
        (["--text", "no/such/file"], "--text no/such/file is no file"),
        (["--prompt", ""], "--prompt is empty, expected at least one byte"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert message in capsys.readouterr().err


def test_order0_entropy():
    assert demo.order0_entropy(torch.arange(256, dtype=torch.uint8)) == pytest.approx(8)
    assert demo.order0_entropy(torch.zeros(9, dtype=torch.uint8)) == 0
    quarter = torch.tensor([1, 0, 0, 0], dtype=torch.uint8)
    assert demo.order0_entropy(quarter) == pytest.approx(2 - 0.75 * math.log2(3))
