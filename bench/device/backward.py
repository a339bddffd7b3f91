"""One backward under a tool: named cases for the sanitizer, one large shape for the profiler.

python -m bench.device.backward cases [--names NAME ...]    each against the reference on the CPU
python -m bench.device.backward shape T8192_H16_N1 [--form fused|core] [--regime fast|long]

Inputs of the cases are made on the CPU and copied, so that next to no kernel but ours runs. The profiler shall start
where the program asks for it: around one step, forward and backward, after one that warms up.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch
from torch import Tensor

import kda_cuda
from bench.python import shapes
from bench.python.bench_chunk_bwd import GRADIENT_LIMIT
from bench.python.providers import ours
from bench.python.truth import leaves_of, relative_error, step
from python_tests.support.cases import CASES, Inputs

NAMES = ("fast", "steep", "tail_chunk", "gva", "varlen", "v_first", "one_token", "many_chunks")


def gradients(x: Inputs) -> dict[str, Tensor]:
    """Through the public function, from do and the gradient of the final state."""
    leaves = {name: y.detach().requires_grad_() for name, y in x.differentiable().items()}
    given = x.public() | leaves
    if x.dt_bias is not None:
        given["dt_bias"] = leaves["dt_bias"].flatten()
    o, final_state = kda_cuda.chunk_kda(**given)
    found = torch.autograd.grad((o, final_state), list(leaves.values()), (x.do, x.dfinal_state))
    return {"o": o.detach()} | {f"d{name}": y for name, y in zip(leaves, found, strict=True)}


def wrong_in(name: str, device: str) -> dict[str, float]:
    """The results of a case that are further from the reference than a result in 16 bits may be."""
    x = CASES[name].inputs("cpu")
    truths, results = gradients(x), gradients(x.to(device))
    found = {tensor: relative_error(y.cpu(), truths[tensor]) for tensor, y in results.items()}
    return {tensor: error for tensor, error in found.items() if not error <= GRADIENT_LIMIT}


def run_cases(names: list[str], device: str) -> int:
    """Prints a line for each case; the number of wrong ones."""
    wrong = {name: wrong_in(name, device) for name in names}
    for name, found in wrong.items():
        print(f"{name:12} {'ok' if not found else f'WRONG: {found}'}", flush=True)
    return sum(bool(found) for found in wrong.values())


def run_shape(shape: shapes.Shape, form: str, regime: str, device: str) -> None:
    (a,), do = shapes.training_inputs(form, shape, regime, device, sets=1)
    leaves = leaves_of(a)
    forward = ours(a | leaves)
    step(forward, leaves, do)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    step(forward, leaves, do)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    commands = parser.add_subparsers(dest="command", required=True)
    cases = commands.add_parser("cases")
    cases.add_argument("--names", nargs="+", choices=CASES, default=NAMES)
    large = commands.add_parser("shape")
    large.add_argument("shape", type=shapes.shape_argument)
    large.add_argument("--form", choices=shapes.FORMS, default="fused")
    large.add_argument("--regime", choices=shapes.REGIMES, default="long")
    args = parser.parse_args(given)
    os.environ["KDA_CUDA_STRICT"] = "1"  # a missing kernel is an error here
    if args.command == "shape":
        return run_shape(args.shape, args.form, args.regime, args.device)
    sys.exit(run_cases(args.names, args.device) != 0)


if __name__ == "__main__":
    main()
