"""What a decoding step costs the host: torch.ops.<namespace>.decode against an empty stable-ABI op of the same schema.

python -m bench.python.bench_host_overhead [--json FILE] [--calls N]

Without a GPU the emulated library is measured with its launches switched off: the dispatcher, the glue with every check
and the choice of the kernel remain. On a GPU the launch is part of it, and the empty op still runs on CPU tensors.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kda_cuda import library, testing

from .timing import commit

ALLOWED = 1.5


def arguments(batch: int = 8, heads: int = 32, dim: int = 128, device: str = "cpu") -> tuple:
    """A step on a pool as a serving engine calls it, with every buffer given."""
    make = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=make).to(device, torch.bfloat16)

    packed = normal(batch, 1, 3 * heads * dim)
    q, k, v = packed.unflatten(-1, (3, heads, dim)).unbind(2)
    state = torch.zeros(2 * batch, heads, dim, dim, device=device)
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    A_log, dt_bias = torch.zeros(heads, device=device), torch.zeros(heads, dim, device=device)
    out = torch.empty(batch, 1, heads, dim, dtype=torch.bfloat16, device=device)
    return (
        q, k, v, normal(batch, 1, heads, dim), normal(batch, 1, heads), A_log, dt_bias, out, state, slots, None, None,
        None, None, None, None, None, dim**-0.5, True, True, True, False, None, True, True, False, False,
    )  # fmt: skip


def nanoseconds(op: Callable, args: tuple, calls: int) -> float:
    for _ in range(calls // 10):
        op(*args)
    begin = time.perf_counter_ns()
    for _ in range(calls):
        op(*args)
    return (time.perf_counter_ns() - begin) / calls


def empty_op() -> Callable:
    """The implementation is in the emulated library alone (csrc/torch/decode.cpp); the schema is decode's."""
    fragment = torch.library.Library(library.NAMESPACE_EMULATED, "FRAGMENT")
    fragment.define("decode_empty" + library.SCHEMAS["decode"])
    empty_op.keep = fragment
    return torch.ops.kda_cuda_emulated.decode_empty.default


def compare(calls: int, rounds: int = 15) -> dict[str, float]:
    """Alternating rounds in one process; the fastest of each, which the rest of the machine disturbed least."""
    emulator = testing.load_emulator()
    empty, args = empty_op(), arguments()
    decode, decode_args = torch.ops.kda_cuda_emulated.decode.default, args
    if torch.cuda.is_available():
        decode, decode_args = torch.ops.kda_cuda.decode.default, arguments(device="cuda")
    emulator.kda_emulator_skip_launches(1)
    try:
        with torch.inference_mode():
            times = [(nanoseconds(empty, args, calls), nanoseconds(decode, decode_args, calls)) for _ in range(rounds)]
    finally:
        emulator.kda_emulator_skip_launches(0)
    empty_ns, decode_ns = (min(column) for column in zip(*times, strict=True))
    return {
        "empty_us": round(empty_ns / 1000, 3),
        "decode_us": round(decode_ns / 1000, 3),
        "ratio": round(decode_ns / empty_ns, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--calls", type=int, default=2000)
    args = parser.parse_args()
    result = {
        "launches": "on the GPU" if torch.cuda.is_available() else "switched off, emulated library",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__, "commit": commit(), "allowed_ratio": ALLOWED,
        **compare(args.calls),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
