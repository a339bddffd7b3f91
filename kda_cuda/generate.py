"""``python -m kda_cuda.generate --model DIR --prompt TEXT``: continues a text with a checkpoint of Kimi Linear."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .models.kimi_linear import KimiLinearForCausalLM
from .tokenizers import tokenizer

__all__ = ["main"]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m kda_cuda.generate", description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--model", required=True, type=Path, help="folder with config.json, safetensors and a tokenizer"
    )
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--piece", type=int, default=8192, help="tokens of the prompt that are read at a time")
    parser.add_argument("--device", default=device)
    parser.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="replay single steps from a CUDA graph; default: on a GPU, with weights of 16 bits",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code of the folder for its tokenizer")
    parser.add_argument("--dtype", help="of the weights, such as bfloat16; default: what config.json says")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the continuation token by token; what is measured goes to standard error."""
    o = _options(arguments)
    encode, decode = tokenizer(o.model, "kda_cuda.generate", o.trust_remote_code)
    dtype = None if o.dtype is None else getattr(torch, o.dtype, None)
    if o.dtype is not None and not isinstance(dtype, torch.dtype):
        raise SystemExit(f"kda_cuda.generate: --dtype is {o.dtype}, expected a dtype of torch such as bfloat16")
    begin = time.perf_counter()
    model = KimiLinearForCausalLM.from_pretrained(o.model, dtype=dtype, device=o.device)
    _tell(f"loaded {sum(p.numel() for p in model.parameters()):,} parameters in {time.perf_counter() - begin:.1f} s")
    prompt = torch.tensor([encode(o.prompt)], dtype=torch.int64, device=o.device)
    stops = model.config.extra.get("eos_token_id")
    stops = [] if stops is None else stops if isinstance(stops, list) else [stops]
    graph = o.cuda_graph
    if graph is None:
        graph = prompt.is_cuda and model.weights_dtype().itemsize == 2
    steps = model.stream(
        prompt,
        o.max_new_tokens,
        temperature=o.temperature,
        top_k=o.top_k,
        top_p=o.top_p,
        seed=o.seed,
        piece=o.piece,
        stop_tokens=stops,
        cuda_graph=graph,
    )
    found, shown, begin, first = [], "", time.perf_counter(), None
    for step in steps:
        token = int(step)
        first = time.perf_counter() if first is None else first
        if token in stops:
            break
        found.append(token)
        text = decode(found)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character is shown with its other half
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(decode(found)[len(shown) :])
    if first is not None:
        rate = (len(found) - 1) / max(time.perf_counter() - first, 1e-9)
        _tell(
            f"{prompt.shape[1]} tokens read in {first - begin:.2f} s, {len(found)} added, {max(rate, 0):.1f} a second"
        )


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
