"""Small training runs: a text, a model, and what two ranks do with them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from kda_cuda import train
from kda_cuda.training import metrics
from kda_cuda.training.ranks import on_first_rank

MODEL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_layers": 2,
    "full_attention_every": 2,
    "num_heads": 2,
    "head_dim": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "intermediate_size": 24,
}
STEPS = 6
EVERY = ["--tokens", "32", "--batch", "4", "--steps", str(STEPS), "--device", "cpu", "--save-every", "2"]
PARALLEL = {  # a name for a run of two ranks -> its options
    "fsdp": ["--parallel", "fsdp"],
    "fsdp, recomputed": ["--parallel", "fsdp", "--recompute", "--accumulate", "2"],
    "ddp": ["--parallel", "ddp"],
}


def write_inputs(folder: Path) -> list[str]:
    """Options of a run of six steps on twelve documents, but for ``--out``."""
    text, config = folder / "text", folder / "config.json"
    text.mkdir()
    for i in range(12):
        (text / f"{i:02}.txt").write_text("".join(f"{n} times {i} is {n * i}. " for n in range(3 + i)))
    config.write_text(json.dumps(MODEL))
    return ["--text", str(text), "--config", str(config), *EVERY]


def run(arguments: list[str], out: Path, *more: str) -> list[dict]:
    """The lines of a run, without what depends on the machine. No picture is drawn: that takes longer than the run."""
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.object(metrics, "draw", return_value=False):
        rows = train.main([*arguments, "--out", str(out), *more])
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in rows]


def failures_on_rank_0() -> list[str]:
    """What this rank gets to know of errors on rank 0."""

    def fail(error: Exception) -> None:
        raise error

    found = []
    for error in (OSError(28, "No space left on device"), ValueError("a shard")):
        try:
            on_first_rank(lambda error=error: fail(error))
        except Exception as raised:
            found.append(f"{type(raised).__name__}: {raised}")
    return found


def run_rank(rank: int, folder: str, ranks: int, arguments: list[str]) -> None:
    """All of ``PARALLEL`` on one rank, and the last two steps of the first one again, from its checkpoint."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = {name: run(arguments, Path(folder, name), *options) for name, options in PARALLEL.items()}
    dist.barrier()
    if rank == 0:
        shutil.rmtree(Path(folder, "fsdp", "checkpoints", f"step-{STEPS:08}"))
    dist.barrier()
    found["resumed"] = run(arguments, Path(folder, "fsdp"), *PARALLEL["fsdp"], "--resume")[-2:]
    found["failures"] = failures_on_rank_0()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    # Everything is on file. An interpreter that ends while threads of torch still run aborts now and then.
    os._exit(0)
