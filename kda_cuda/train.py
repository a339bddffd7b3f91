"""``python -m kda_cuda.train``: trains a language model on packed text, on one process or on those of ``torchrun``."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from .model import HybridConfig, HybridLM
from .models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from .nn.decoder import CausalLM
from .tokenizers import tokenizer
from .training.loop import Run
from .training.options import DTYPES, Options
from .training.ranks import PARALLEL, World
from .training.text import Corpus

__all__ = ["main"]

WHO = "kda_cuda.train"


def _parser() -> argparse.ArgumentParser:
    """Defaults are those of :class:`Options`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {WHO}", description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False
    )
    add = parser.add_argument
    text = "files and folders of text, a file a document; default: Python's standard library"
    add("--text", type=Path, nargs="+", help=text)
    add("--tokenizer", help="a tokenizer.json, a folder, or a name for transformers; default: a byte is a token")
    add(
        "--config", type=Path, help="JSON of a HybridConfig, or a config.json of Kimi Linear; default: a small HybridLM"
    )
    add("--out", type=Path, help="folder of checkpoints, metrics.jsonl, curves.png and the model; default: train_out")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, or begin if there is none")
    add("--steps", type=int, help="of the optimizer; default: 1000")
    add("--batch", type=int, help="rows a step, of all processes together; default: 16")
    add("--tokens", type=int, help="tokens a row; default: 256")
    add("--accumulate", type=int, help="parts of a process's rows that are computed one after another; default: 1")
    add("--lr", type=float, help="the highest learning rate; default: 0.003")
    add("--lr-last", type=float, help="the last learning rate as a share of the highest; default: 0.1")
    add("--warm-up", type=int, help="steps up to the highest learning rate; default: a tenth, at most 50")
    add("--weight-decay", type=float, help="of matrices; default: 0.1")
    add("--clip", type=float, help="the largest norm of all gradients; default: 1")
    add("--seed", type=int, help="of the first weights and of the order of the text; default: 0")
    add("--save-every", type=int, help="steps from checkpoint to checkpoint; default: 100")
    add("--evaluate-every", type=int, help="steps from validation to validation; default: 100")
    add("--keep", type=int, help="how many checkpoints stay; default: 2")
    add("--device", help="cpu or cuda; default: cuda if there is one")
    add("--dtype", help=f"{' or '.join(DTYPES)}, by autocast; default: float32 on the CPU, else bfloat16")
    add("--parallel", help=f"{' or '.join(PARALLEL)}, with more processes than one; default: fsdp")
    add("--recompute", action="store_true", help="keep the inputs of blocks alone (activation checkpointing)")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile; BACKEND: inductor")
    return parser


def _options(arguments: Sequence[str] | None) -> Options:
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    try:
        return Options(**given | {"text": tuple(given.get("text", ()))})
    except ValueError as error:
        parser.error(str(error))


def _config(path: Path | None) -> HybridConfig | KimiLinearConfig:
    """Of a file whose ``model_type`` is ``kimi_linear``, or of one with fields of a :class:`HybridConfig`."""
    if path is None:
        return HybridConfig()
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{WHO}: --config {path} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{WHO}: --config {path} is a {type(values).__name__}, expected fields with their values")
    if values.get("model_type") == "kimi_linear":
        if not importlib.util.find_spec("safetensors"):
            raise ImportError(f"{WHO}: checkpoints of Kimi Linear need safetensors: pip install safetensors")
        return KimiLinearConfig.from_dict(values)
    unknown = sorted(set(values) - set(vars(HybridConfig())))
    if unknown:
        raise ValueError(f"{WHO}: --config {path} has {unknown}, expected fields of HybridConfig or a model_type")
    return HybridConfig(**values)


def _model(config: HybridConfig | KimiLinearConfig) -> CausalLM:
    return HybridLM(config) if isinstance(config, HybridConfig) else KimiLinearForCausalLM(config)


def _corpus(o: Options, vocab_size: int) -> Corpus:
    encode = None if o.tokenizer is None else tokenizer(o.tokenizer, WHO)[0]
    corpus = Corpus.read(o.text, o.tokens, encode)
    largest = max(int(corpus.train.max()), int(corpus.validation.max()))
    if largest >= vocab_size:
        raise ValueError(
            f"{WHO}: the text has token {largest}, expected less than the vocab_size {vocab_size} of --config"
        )
    return corpus


def main(arguments: Sequence[str] | None = None) -> list[dict]:
    """Trains, and returns the lines of ``metrics.jsonl``.

    Raises:
        ValueError, TypeError: the text, the config, the checkpoint or the number of processes does not fit.
        ImportError: a package that an option needs is not installed.
        OSError: a file cannot be written. The checkpoints that were there are left.
    """
    o = _options(arguments)
    with World.joined(o.device) as world:
        config = _config(o.config)
        corpus = _corpus(o, config.vocab_size)
        torch.manual_seed(o.seed)
        model = _model(config)
        parameters = sum(p.numel() for p in model.parameters())
        fields = vars(config) if isinstance(config, HybridConfig) else config.to_dict()
        run = Run(model, fields, corpus, o, world)
        if world.rank == 0:
            where = f"{world.size} x {world.device.type} ({o.parallel})" if world.size > 1 else str(world.device)
            print(
                f"{corpus.name}: {len(corpus.train):,} tokens to learn, {len(corpus.validation):,} to be judged on\n"
                f"{parameters:,} parameters, {where}, {o.dtype}; from step {run.done}"
            )
        rows = run.train()
        with torch.device("meta"):
            whole = _model(config)
        run.finish(whole, rows)
    return rows


if __name__ == "__main__":
    main()
