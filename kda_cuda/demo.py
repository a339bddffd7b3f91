"""``python -m kda_cuda.demo``: a small hybrid model learns real text byte by byte, then continues it step by step."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import explain
from .model import HybridConfig, HybridLM
from .training.progress import Progress
from .training.steps import adamw, descend, learning_rate, mean_loss, warm_up_steps
from .training.text import Corpus, validation_windows, windows

__all__ = ["bits_per_byte", "main", "order0_entropy", "step_by_step_difference", "train"]

BATCH, TOKENS = 16, 256
LEARNING_RATE = 3e-3
STEPS = 130  # one to four minutes on two cores
RESET_EVERY = 8
CACHE_TOKENS = {"1k": 1 << 10, "128k": 1 << 17, "1M": 1 << 20}
STEP_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2}  # of the largest logit


def order0_entropy(data: Tensor) -> float:
    """Bits per byte of a model that knows how often each byte of ``data`` occurs and nothing else."""
    p = torch.bincount(data.long(), minlength=256).double() / len(data)
    return float(-(p * p.clamp_min(1e-300).log2()).sum())


def train(model: HybridLM, corpus: Corpus, steps: int, dtype: torch.dtype, seed: int) -> dict:
    """AdamW on random windows. Weights stay fp32; in 16 bits the products run under autocast."""
    device = next(model.parameters()).device.type
    optimizer, warm_up = adamw(model), warm_up_steps(steps)
    generator = torch.Generator().manual_seed(seed)
    held_out = validation_windows(corpus.validation, TOKENS, device)
    history = {"train": [], "validation": []}  # (step, bits per byte)
    progress, validation = Progress(steps), math.nan
    for step in range(steps):
        starts = torch.randint(len(corpus.train) - TOKENS, (BATCH,), generator=generator)
        batch = windows(corpus.train, starts, TOKENS, device)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        descend(model, optimizer, learning_rate(step, steps, LEARNING_RATE, warm_up))
        history["train"].append((step + 1, loss.item() / math.log(2)))
        if (step + 1) % max(1, steps // 12) == 0 or step + 1 == steps:
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                validation = bits_per_byte(model, held_out)
            history["validation"].append((step + 1, validation))
        progress.show(step + 1, f"training batch {history['train'][-1][1]:.3f}, validation {validation:.3f} bits/byte")
    return history


@torch.no_grad()
def bits_per_byte(model: HybridLM, batch: Tensor, reset_every: int | None = None) -> float:
    """Of windows ``[n, tokens + 1]``; with ``reset_every`` the model forgets all but its convolutions that often."""
    if reset_every is None:
        return float(mean_loss(model, batch, BATCH) / math.log(2))
    inputs, targets = batch[:, :-1], batch[:, 1:]
    cache, parts = model.new_cache(len(inputs)), []
    for part in inputs.split(reset_every, dim=1):
        cache.reset_states()
        parts.append(model(part, cache).float())
    return float(F.cross_entropy(torch.cat(parts, dim=1).flatten(0, 1), targets.flatten()) / math.log(2))


@torch.no_grad()
def step_by_step_difference(model: HybridLM, tokens: Tensor) -> tuple[float, float]:
    """The largest difference of logits between one forward over ``[batch, tokens]`` and decoding them one by one,
    and the largest logit."""
    parallel = model(tokens).float()
    cache = model.new_cache(len(tokens))
    steps = torch.cat([model(token, cache).float() for token in tokens.split(1, dim=1)], dim=1)
    return float((parallel - steps).abs().max()), float(parallel.abs().max())


def continue_prompt(model: HybridLM, prompt: str, device: str, seed: int, new_bytes: int = 240) -> str:
    tokens = torch.tensor([list(prompt.encode())], device=device)
    out = model.generate(tokens, new_bytes, temperature=0.7, top_k=40, seed=seed)
    return bytes(out[0].tolist()).decode(errors="replace")


def cache_table(model: HybridLM) -> dict[str, dict[str, int]]:
    """Bytes of one sequence's cache by number of tokens and kind of model."""
    kinds = {
        "hybrid (3 KDA : 1 MLA)": model.cache_bytes,
        "all MLA": model.multi_latent_cache_bytes,
        "all multi-head attention": model.full_attention_cache_bytes,
    }
    return {name: {label: count(tokens) for label, tokens in CACHE_TOKENS.items()} for name, count in kinds.items()}


def draw(path: Path, model: HybridLM, history: dict, entropy: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    left.plot(*zip(*history["train"], strict=True), color="0.75", linewidth=0.8, label="training batch")
    left.plot(*zip(*history["validation"], strict=True), marker="o", markersize=3, label="validation")
    left.axhline(entropy, linestyle="--", color="C3", label=f"order-0 entropy, {entropy:.2f}")
    left.set(xlabel="step", ylabel="bits per byte", title="Learning real text, byte by byte", ylim=(0, 8.2))
    tokens = [1 << n for n in range(6, 21)]
    right.loglog(tokens, [model.full_attention_cache_bytes(t) for t in tokens], label="all multi-head attention")
    right.loglog(tokens, [model.multi_latent_cache_bytes(t) for t in tokens], label="all MLA")
    right.loglog(tokens, [model.cache_bytes(t) for t in tokens], label="hybrid, 3 KDA : 1 MLA")
    kda = model.cache_bytes(0)
    right.loglog(tokens, [kda] * len(tokens), linestyle="--", label="of which KDA: constant")
    right.set(xlabel="tokens", ylabel="bytes a sequence", title="Inference cache of this model")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kda_cuda.demo", description=__doc__)
    parser.add_argument("--text", type=Path, help="a file to learn; default: the Python standard library's sources")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--prompt", default="    def __init__(self, ")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for demo.png, demo.json, model.pt")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}, expected >= 1")
    if not arguments.prompt:
        parser.error("--prompt is empty, expected at least one byte")
    if arguments.text is not None and not arguments.text.is_file():
        parser.error(f"--text {arguments.text} is no file")
    return arguments


def served_by(config: HybridConfig, device: str, dtype: torch.dtype) -> str:
    """Says whether kernels or the PyTorch reference run the attention of the demo, and why."""
    x = torch.zeros(1, TOKENS, config.num_heads, config.head_dim, device=device, dtype=dtype, requires_grad=True)
    call = explain(x, x, x, x, x[..., 0])
    steps = {"forward": call.forward, "backward": call.backward}
    return "\n".join(
        f"KDA {name}: {'a CUDA kernel' if step.kernel else 'the PyTorch reference'} ({step.reason})"
        for name, step in steps.items()
    )


def report_decoding(model: HybridLM, held_out: Tensor, dtype: torch.dtype) -> dict:
    """Prints and returns how far decoding is from the parallel forward, and what forgetting costs."""
    difference, largest = step_by_step_difference(model, held_out[:2, :-1])
    tolerance = STEP_TOLERANCE[dtype] * largest
    verdict = "equal" if difference <= tolerance else "DIFFERENT"
    print(f"step by step against parallel, {TOKENS} tokens: {verdict}, largest difference of logits {difference:.2e} "
          f"(allowed {tolerance:.2e})")  # fmt: skip
    whole, forgetful = bits_per_byte(model, held_out), bits_per_byte(model, held_out, RESET_EVERY)
    cost = forgetful / whole - 1
    print(f"forgetting KDA state and MLA cache every {RESET_EVERY} bytes: {whole:.3f} -> {forgetful:.3f} bits/byte "
          f"({cost:+.1%})")  # fmt: skip
    return {"difference": difference, "tolerance": tolerance, "bits_per_byte": whole, "forgetful": forgetful}


def main(argv: list[str] | None = None) -> dict:
    """Runs the demo and returns what it measured."""
    arguments = parse_arguments(argv)
    device = arguments.device
    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))
    corpus = Corpus.read([arguments.text] if arguments.text else [], TOKENS)
    entropy = order0_entropy(corpus.validation)
    torch.manual_seed(arguments.seed)
    model = HybridLM(HybridConfig()).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{corpus.name}: {len(corpus.train):,} bytes to learn, {len(corpus.validation):,} to be judged on, "
          f"order-0 entropy {entropy:.3f} bits/byte\n{parameters:,} parameters, {device}, {dtype}")  # fmt: skip
    print(served_by(model.config, device, dtype))
    start = time.monotonic()
    history = train(model, corpus, arguments.steps, dtype, arguments.seed)
    seconds = time.monotonic() - start
    model.to(dtype).eval()
    result = {"text": corpus.name, "steps": arguments.steps, "device": device, "dtype": str(dtype), "order0": entropy}
    result |= {"seconds": seconds, "threads": torch.get_num_threads(), "torch": torch.__version__}
    result |= report_decoding(model, validation_windows(corpus.validation, TOKENS, device), dtype)
    final = result["bits_per_byte"]
    print(f"validation {final:.3f} bits/byte = {final / entropy:.2f} x order-0 entropy, {seconds:.0f} s of training")
    text = continue_prompt(model, arguments.prompt, device, arguments.seed)
    print("--- a prompt, continued by single-step decoding\n" + text + "\n---")
    result["cache_bytes"] = cache_table(model)
    print(f"{'cache bytes of one sequence':28}" + "".join(f"{label:>16}" for label in CACHE_TOKENS))
    for name, row in result["cache_bytes"].items():
        print(f"{name:28}" + "".join(f"{count:16,}" for count in row.values()))
    save(arguments.out, model, history, result)
    if result["difference"] > result["tolerance"]:
        raise SystemExit("demo: step-by-step decoding differs from the parallel forward")
    return result


def save(out: Path, model: HybridLM, history: dict, result: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    learned = [{"step": step, "bits_per_byte": bits} for step, bits in history["validation"]]
    (out / "demo.json").write_text(json.dumps({**result, "validation": learned}, indent=1) + "\n")
    torch.save({"config": vars(model.config), "weights": model.state_dict()}, out / "model.pt")
    if importlib.util.find_spec("matplotlib"):
        draw(out / "demo.png", model, history, result["order0"])
        print(f"wrote {out / 'demo.png'}, demo.json and model.pt")
    else:
        print(f"wrote {out / 'demo.json'} and model.pt; no figure: matplotlib is not installed")


if __name__ == "__main__":
    main()
