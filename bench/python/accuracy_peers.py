"""Gradients beside those of the peers: relative RMS error against the float64 recurrence, in four regimes of gates.

python -m bench.python.accuracy_peers [--out FILE] [--tokens 256] [--heads 32] [--peers [NAME ...]]

bf16, K = V = 128. Fused: raw gate, normalisation, logits; ours beside fla. Core: log-decay and beta in fp32, q and k
normalised; ours beside cudnn-frontend. over_best is our error over that of the most accurate peer, of either form.
fla runs the first configuration that its autotuner would try: none is timed here.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import shapes, timing
from .harness import failure
from .peers import launch_first
from .providers import BACKWARD_PEERS, Call, load_peers, ours
from .truth import errors, leaves_of, nonfinite_share, recurrence, step

REGIMES = ("fast", "long", "heavy", "collinear")
FORMS = ("fused", "core")
ALLOWED = 1.1  # times the error of the best peer


def heavy(a: dict, normal: Callable[..., Tensor]) -> dict:
    """Decays from none at all to far below e^-300, token by token: softplus(g) = e^(2.5 x), x normal."""
    decay = torch.exp(2.5 * normal(a["g"].shape))
    g = decay + torch.log(-torch.expm1(-decay))
    A_log, dt_bias = 0.25 * normal(a["A_log"].shape), 0.1 * normal(a["dt_bias"].shape)
    return a | {"g": g.to(a["g"].dtype), "A_log": A_log, "dt_bias": dt_bias}


def collinear(a: dict, normal: Callable[..., Tensor]) -> dict:
    """All keys of a head almost equal, beta between 0.95 and 1, next to no decay."""
    batch, _, heads, dim = a["k"].shape
    k = normal((batch, 1, heads, dim)) + 1e-3 * normal(a["k"].shape)
    beta = 3 + normal(a["beta"].shape).abs().clamp(max=4)
    gate = {"g": -9 + 0.1 * normal(a["g"].shape), "A_log": 0.25 * normal(a["A_log"].shape)}
    changed = {name: x.to(a[name].dtype) for name, x in {"k": k, "beta": beta, **gate}.items()}
    return a | changed | {"dt_bias": torch.zeros_like(a["dt_bias"])}


def inputs(regime: str, tokens: int, heads: int, device: str) -> tuple[dict, Tensor]:
    """Arguments with everything fused, and the upstream gradient."""
    make = torch.Generator(device).manual_seed(REGIMES.index(regime))

    def normal(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=make, device=device)

    known = regime if regime in shapes.REGIMES else "long"
    (a,), do = shapes.training_inputs("fused", shapes.even(tokens, heads, 1), known, device, sets=1)
    change = {"heavy": heavy, "collinear": collinear}.get(regime)
    return (change(a, normal) if change else a), do


def measure(
    name: str, bind: Callable[[dict], Call], a: dict, do: Tensor, truths: dict[str, Tensor], where: str
) -> dict:
    """Errors of one provider, and whether a second run gives the same bits."""

    def run() -> dict[str, Tensor]:
        leaves = leaves_of(a)
        return step(bind(a | leaves), leaves, do)

    try:
        results, again = run(), run()
    except Exception as e:
        return failure(name, where, e)
    return {
        "errors": errors(results, truths),
        "nonfinite_share": nonfinite_share(results),
        "repeats_bitwise": all(torch.equal(x, again[tensor]) for tensor, x in results.items()),
    }


def rows_of(regime: str, providers: dict[str, dict], tokens: int, heads: int, device: str) -> list[dict]:
    """A row for each form and provider; ours also with ``over_best``."""
    fused, do = inputs(regime, tokens, heads, device)
    rows = []
    for form, a in (("fused", fused), ("core", shapes.core_of(fused))):
        truths = recurrence(a, do)
        for name, bind in providers[form].items():
            said = measure(name, bind, a, do, truths, f"{form}, {regime}")
            rows.append({"regime": regime, "form": form, "provider": name, **said})
    peers = [row["errors"] for row in rows if row["provider"] != "kda_cuda" and "errors" in row]
    for row in rows:
        if row["provider"] == "kda_cuda":
            best = {x: min((p[x] for p in peers if p.get(x) is not None), default=None) for x in row["errors"]}
            row["over_best"] = {
                x: round(row["errors"][x] / e, 2) for x, e in best.items() if e and row["errors"][x] is not None
            }
    return rows


def table_line(row: dict) -> str:
    head = f"{row['regime']:9} {row['form']:5} {row['provider']:8} "
    if "errors" not in row:
        return head + (row.get("failed") or row["unsupported"])
    cells = [f"{x} -" if e is None else f"{x} {e:.1e}" for x, e in row["errors"].items()]
    worst = max(row.get("over_best", {}).items(), key=lambda x: x[1], default=None)
    notes = ["" if row["repeats_bitwise"] else "differs from run to run"]
    notes.append(f"{row['nonfinite_share']:.0%} not finite" if row["nonfinite_share"] else "")
    notes.append(f"{worst[0]} {worst[1]} x the best peer" if worst and worst[1] > ALLOWED else "")
    return head + "  ".join(cells + [x for x in notes if x])


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(name for form in FORMS for name in BACKWARD_PEERS[form]))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--peers", nargs="*", choices=names, default=names)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the reference, to try this out")
    args = parser.parse_args(given)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("our kernels and those of the peers need a CUDA device")
    os.environ["FLA_CACHE_RESULTS"] = "0"  # what it would remember of this run was not timed
    providers, said = {}, {}
    for form in FORMS:
        loaded, versions = load_peers(args.peers, BACKWARD_PEERS[form])
        providers[form] = {"kda_cuda": ours, **loaded}
        said |= versions
    if "fla" in providers["fused"]:
        launch_first()
    result = {
        **timing.machine(args.device), "device": args.device, "tokens": args.tokens, "heads": args.heads,
        "head_dim": 128, "dtype": "bfloat16", "peers": said, "allowed_over_best": ALLOWED, "rows": [],
    }  # fmt: skip
    for regime in REGIMES:
        rows = rows_of(regime, providers, args.tokens, args.heads, args.device)
        result["rows"] += rows
        print("\n".join(table_line(row) for row in rows), flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
