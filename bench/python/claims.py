"""What the Kimi Linear report claims of the hybrid: a smaller cache, and faster decoding of long contexts.

python -m bench.python.claims [--out FILE] [--what cache|decode ...] [--tokens N ...] [--layers N] [--experts]
                              [--steps N] [--memory BYTES] [--most-sequences N] [--tiny] [--device cuda|cpu]

models: hybrid has the layers of Kimi-Linear-48B-A3B, 20 of KDA and 7 of MLA; all_mla has MLA in all of them;
strict_3_to_1, whose bytes alone are counted, has one layer of MLA after three of KDA, and its all_mla is as deep.

cache: bytes of one sequence, counted by the layers themselves: KDA states in fp32, all else in bf16. saved: the share
of all_mla's bytes that is not needed. No device is used.

decode: one token for each of ``sequences``, with random weights of the released widths. A feed-forward module is dense
and as wide as the experts that one token uses, or with --experts the released mixture, which needs 98 GB. The cache is
not read from a prompt: it is filled with random latents and states. Both models are verified before: a cached step
gives the logits of the parallel forward.
step_us: device time of a step, replayed from a CUDA graph; eager_us: of a call from Python; both are medians. On the
CPU both are elapsed times. token_us: step_us for each sequence. sequences is 1 in "equal", and in "largest" what fits
into the memory that is free, or into --memory bytes: of each model its own number, at most --most-sequences.
faster: token_us of all_mla over that of hybrid.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
from pathlib import Path

import torch

from kda_cuda.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from kda_cuda.nn.hybrid_cache import HybridCache
from kda_cuda.nn.kda import KimiDeltaAttention
from kda_cuda.nn.latent_attention import ALIGNED

from . import timing

LINEAR, FULL = "linear_attention", "full_attention"
TOKENS = [1 << n for n in (10, 12, 14, 16, 17, 18, 20)]
ROUNDS, WARM_UP = 7, 2
LIMITS = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative RMS difference of the logits of a cached step
FREE_SHARE = 0.9  # of the free memory: the rest is for what a step needs beside the cache
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_token": 2,
}


# ---- the models ------------------------------------------------------------------------------------------------------


def released(layers: int = 27, **fields: object) -> KimiLinearConfig:
    """The released configuration, or one like it of another depth."""
    return KimiLinearConfig(num_hidden_layers=layers, **fields)


def all_mla(config: KimiLinearConfig) -> KimiLinearConfig:
    """A model as deep, without a layer of KDA."""
    return dataclasses.replace(config, layer_types=(FULL,) * config.num_hidden_layers)


def dense(config: KimiLinearConfig) -> KimiLinearConfig:
    """Without experts: every token meets as many weights as the experts that it would use have."""
    return dataclasses.replace(config, mlp_layer_types=("dense",) * config.num_hidden_layers)


def on_meta(config: KimiLinearConfig) -> KimiLinearForCausalLM:
    """The model in bf16, without memory for its weights."""
    with torch.device("meta"):
        return KimiLinearForCausalLM(config).to(torch.bfloat16)


def on_device(config: KimiLinearConfig, device: str, dtype: torch.dtype) -> KimiLinearForCausalLM:
    """The model with random weights."""
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    torch.manual_seed(0)
    model.to(dtype).to_empty(device=device).reset_weights()
    return model.eval()


# ---- the cache, counted ----------------------------------------------------------------------------------------------


def cache_bytes(tokens: list[int]) -> list[dict]:
    """Bytes of one sequence, released and strict, beside all MLA of equal depth."""
    configs = {"hybrid": released(), "strict_3_to_1": released(28, layer_types=((LINEAR,) * 3 + (FULL,)) * 7)}
    rows = []
    for name, config in configs.items():
        model, other = on_meta(dense(config)), on_meta(dense(all_mla(config)))
        kda_layers = sum(isinstance(layer.self_attn, KimiDeltaAttention) for layer in model.model.layers)
        for n in tokens:
            own, full = model.cache_bytes(n), other.cache_bytes(n)
            row = {"what": "cache", "model": name, "kda_layers": kda_layers, "layers": config.num_hidden_layers}
            rows.append(row | {"tokens": n, "bytes": own, "all_mla_bytes": full, "saved": round(1 - own / full, 4)})
    return rows


# ---- decoding, measured ----------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A model that is not timed, because a cached step differs from the parallel forward."""


@torch.no_grad()
def verify(model: KimiLinearForCausalLM, device: str) -> float:
    """The relative RMS difference between the logits of a cached step and of the parallel forward."""
    tokens = torch.arange(18, device=device).view(2, 9) % model.config.vocab_size
    whole, cache = model(tokens)[:, -1].float(), model.new_cache(2)
    model.prefill(tokens[:, :-1], cache)
    step = model(tokens[:, -1:], cache)[:, -1].float()
    difference = float((step - whole).norm() / whole.norm())
    limit = LIMITS[model.weights_dtype()]
    if not difference <= limit:
        raise Wrong(f"wrong, not timed: a cached step differs by {difference:.1e}, allowed {limit:.0e}")
    return difference


def filled_cache(model: KimiLinearForCausalLM, sequences: int, tokens: int, room: int) -> HybridCache:
    """As if ``tokens`` had been read, with random contents and room for ``room`` tokens more."""
    cache = model.new_cache(sequences)
    for layer in cache.layers:
        if hasattr(layer, "state"):
            layer.state.normal_(std=0.1)
            layer.conv.normal_()
        else:
            held = -(-(tokens + room) // ALIGNED) * ALIGNED  # a step reads so many
            layer.buffer = layer.buffer.new_empty(sequences, held, layer.buffer.shape[2]).normal_()
        layer.length = tokens
    return cache


@torch.no_grad()
def step_times(model: KimiLinearForCausalLM, sequences: int, tokens: int, steps: int, device: str) -> dict:
    """Of one step for all sequences after ``tokens``; a replayed graph writes the same place again and again."""
    cache = filled_cache(model, sequences, tokens, room=WARM_UP + 1 + ROUNDS * steps)
    counted = cache.nbytes()
    if counted != sequences * model.cache_bytes(tokens):
        raise Wrong(f"wrong, not timed: the cache has {counted} bytes, expected {model.cache_bytes(tokens)} a sequence")
    token = torch.zeros(sequences, 1, dtype=torch.int64, device=device)

    def step() -> torch.Tensor:
        return model(token, cache, last_only=True)

    with timing.side_stream(device):
        for _ in range(WARM_UP):
            logits = step()
        if not bool(logits.isfinite().all()):
            raise Wrong("wrong, not timed: a step gives logits that are not finite")
        eager = [timing.eager_us([step] * steps, device)[1] for _ in range(ROUNDS)]
        for layer in cache.layers:
            layer.length = tokens
        replay = timing.graph_of([step], device)
        times = [timing.elapsed_us(replay, device) for _ in range(ROUNDS * steps if device == "cuda" else ROUNDS)]
    us = statistics.median(times)
    said = {"sequences": sequences, "bytes": counted, "step_us": round(us, 1), "token_us": round(us / sequences, 2)}
    return said | {"eager_us": round(statistics.median(eager), 1)}


def sequences_that_fit(model: KimiLinearForCausalLM, tokens: int, args: argparse.Namespace) -> int:
    memory = args.memory
    if memory is None:
        if args.device != "cuda":
            raise ValueError("claims: --memory is absent, expected the bytes that caches may take on this device")
        torch.cuda.empty_cache()
        memory = FREE_SHARE * torch.cuda.mem_get_info()[0]
    return min(args.most_sequences, int(memory // model.cache_bytes(tokens)))


def largest(model: KimiLinearForCausalLM, tokens: int, args: argparse.Namespace) -> dict:
    """With as many sequences as fit: an eighth fewer as often as memory runs out."""
    sequences = sequences_that_fit(model, tokens, args)
    while sequences:
        try:
            return step_times(model, sequences, tokens, args.steps, args.device)
        except torch.OutOfMemoryError:
            sequences = sequences * 7 // 8
        gc.collect()
    return {"failed": "no sequence fits"}


def bench(name: str, model: KimiLinearForCausalLM, tokens: int, args: argparse.Namespace) -> dict:
    """One row: a model at one length, by itself and with all sequences that fit."""
    row = {"what": "decode", "model": name, "tokens": tokens}
    try:
        try:
            equal = step_times(model, 1, tokens, args.steps, args.device)
        except torch.OutOfMemoryError:
            equal = {"failed": "one sequence does not fit"}
        return row | {"equal": equal, "largest": largest(model, tokens, args)}
    except Wrong as e:
        return row | {"failed": str(e)}


def ratios(rows: list[dict]) -> list[dict]:
    """How many times longer a token takes with MLA alone."""
    found = {(row["model"], row["tokens"]): row for row in rows if row["what"] == "decode"}
    said = []
    for tokens in sorted({n for _, n in found}):
        pair = [found.get((model, tokens), {}) for model in ("all_mla", "hybrid")]
        for how in ("equal", "largest"):
            us = [row.get(how, {}).get("token_us") for row in pair]
            if all(us):
                said.append({"what": "faster", "tokens": tokens, "sequences": how, "faster": round(us[0] / us[1], 2)})
    return said


# ---- what is said ----------------------------------------------------------------------------------------------------


def lines(row: dict) -> list[str]:
    head = f"{row['what']:7} {row.get('model', row.get('sequences', '')):14} {row['tokens']:>8} tokens  "
    if row["what"] == "cache":
        return [f"{head}{row['bytes']:>15,} bytes beside {row['all_mla_bytes']:>15,}: {row['saved']:.2%} saved"]
    if row["what"] == "faster":
        return [f"{head}{row['faster']} times as fast"]
    if "failed" in row:
        return [head + row["failed"]]
    cells = []
    for how in ("equal", "largest"):
        said = row[how]
        times = "{sequences} sequences, {step_us} us a step, {token_us} each"
        cells.append(f"{how}: {said.get('failed') or times.format(**said)}")
    return [head + " | ".join(cells)]


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--what", nargs="+", choices=("cache", "decode"), default=["cache", "decode"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--layers", type=int, default=27, help="of the models that decode: fewer if memory asks for it")
    parser.add_argument("--experts", action="store_true", help="the released mixtures of experts")
    parser.add_argument("--steps", type=int, default=10, help="in each of seven rounds")
    parser.add_argument("--memory", type=float, help="bytes for the caches of the largest batch")
    parser.add_argument("--most-sequences", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="small widths in fp32, to try the command without a GPU")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args(given)
    for name in ("layers", "steps", "most_sequences"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 1")
    if min(args.tokens) < 1:
        parser.error(f"--tokens has {min(args.tokens)}, expected at least 1")
    if "decode" in args.what and args.device != "cuda" and args.memory is None:
        parser.error(f"--memory is absent with --device {args.device}, expected the bytes that caches may take")
    return args


def decode(args: argparse.Namespace, result: dict) -> None:
    """Both models, one after the other, so that each has the memory to itself."""
    hybrid = released(args.layers, **(TINY if args.tiny else {}))
    hybrid = hybrid if args.experts else dense(hybrid)
    for name, config in (("hybrid", hybrid), ("all_mla", all_mla(hybrid))):
        model = on_device(config, args.device, torch.float32 if args.tiny else torch.bfloat16)
        try:
            result["differences"][name] = float(f"{verify(model, args.device):.2e}")
        except Wrong as e:
            row = {"what": "decode", "model": name, "tokens": 9, "failed": str(e)}
            timing.note(row, lines(row), result, args.out, args.device)
            continue
        for tokens in args.tokens:
            row = bench(name, model, tokens, args)
            timing.note(row, lines(row), result, args.out, args.device)
        del model
        gc.collect()


def main(given: list[str] | None = None) -> dict:
    args = arguments(given)
    if "decode" in args.what and args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("decoding is measured on a CUDA device; --what cache needs none")
    if args.what == ["cache"]:
        args.device = "cpu"  # nothing runs
    os.environ["KDA_CUDA_STRICT"] = "1"  # the reference is never timed in place of a kernel
    result = {
        **timing.machine(args.device),
        "options": {k: v for k, v in vars(args).items() if k != "out"},
        "columns": __doc__[__doc__.index("models:") :].strip(),
        "differences": {},
        "rows": [],
    }
    for row in cache_bytes(args.tokens) if "cache" in args.what else ():
        timing.note(row, lines(row), result, args.out, args.device)
    if "decode" in args.what:
        decode(args, result)
        for row in ratios(result["rows"]):
            timing.note(row, lines(row), result, args.out, args.device)
    timing.end_if_failed(result["rows"])
    return result


if __name__ == "__main__":
    main()
