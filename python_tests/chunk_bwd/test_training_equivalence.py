"""50 optimizer steps of the demo's model: on kernels as on the reference, and bit for bit the same from run to run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kda_cuda import demo, variants
from kda_cuda.model import HybridConfig, HybridLM

from ..support.bwd_calls import KERNELS
from ..support.devices import forget_recipes

pytestmark = [
    pytest.mark.devices("emulator", "cuda"),
    pytest.mark.usefixtures("chunk_bwd", "poisoned_memory"),  # the second also asks torch's own ops for the same bits
]

STEPS = 50
# One KDA layer of one head below one MLA layer, two chunks of a sequence, the second one partial.
TINY = HybridConfig(
    hidden_size=32, num_layers=2, num_heads=1, head_dim=16, full_attention_every=2, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=16, intermediate_size=64,
)  # fmt: skip
SIZES = {"emulator": (TINY, 1, 80), "cuda": (HybridConfig(), 8, 200)}  # the model, batch, tokens


def corpus(tokens: int) -> demo.Corpus:
    """The demo's own source; validation is one window."""
    text = torch.frombuffer(bytearray(Path(demo.__file__).read_bytes()), dtype=torch.uint8)
    begins = torch.zeros(1, dtype=torch.int64)
    return demo.Corpus("demo.py", text[: -tokens - 2], text[-tokens - 2 :], begins)


@pytest.fixture
def losses(device, monkeypatch):
    """``losses(on_kernels, dtype, seed)``: bits per byte after each step."""
    config, batch, tokens = SIZES[device.name]
    monkeypatch.setattr(demo, "BATCH", batch)
    monkeypatch.setattr(demo, "TOKENS", tokens)

    def run(on_kernels: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[float]:
        torch.manual_seed(seed)
        model = HybridLM(config).to(device)
        with monkeypatch.context() as patch, sdpa_kernel(SDPBackend.MATH):  # the others add with atomics
            patch.setattr(variants._emulation, "on", on_kernels and device.name == "emulator")
            if not on_kernels:
                forget_recipes()
                patch.setattr(variants, "_kernels", dict.fromkeys(variants._kernels, frozenset()))
            history, kernels = device.run(lambda: demo.train(model, corpus(tokens), STEPS, dtype, seed))
        own = {kernel for kernel in kernels if kernel.startswith("chunk_")}
        assert bool(own) == on_kernels and bool(own & set(KERNELS)) == on_kernels, own
        return [loss for _, loss in history["train"]]

    return run


@pytest.mark.filterwarnings("ignore:kda_cuda::.* runs the PyTorch reference")
def test_losses_are_those_of_the_reference(losses):
    """In fp32 within 1e-4 at every step, and learning: the last steps are better than the first ones."""
    on_kernels, on_reference = losses(True), losses(False)
    assert len(on_kernels) == STEPS
    for step, (a, b) in enumerate(zip(on_kernels, on_reference, strict=True)):
        assert abs(a - b) <= 1e-4 * abs(b), f"step {step}: {a} on kernels, {b} on the reference"
    assert sum(on_kernels[-5:]) < 0.8 * sum(on_kernels[:5])
    assert on_kernels == losses(True), "another run has other bits"


@pytest.mark.devices("cuda")
@pytest.mark.filterwarnings("ignore:kda_cuda::.* runs the PyTorch reference")
def test_bf16_ends_within_the_spread_of_seeds(losses):
    """Means of the last ten losses: kernels and reference are no further apart than three seeds are."""

    def final(on_kernels: bool, seed: int) -> float:
        return sum(losses(on_kernels, torch.bfloat16, seed)[-10:]) / 10

    on_reference = [final(False, seed) for seed in range(3)]
    spread = max(on_reference) - min(on_reference)
    for seed, wanted in enumerate(on_reference):
        assert abs(final(True, seed) - wanted) <= spread, (seed, wanted, spread)
