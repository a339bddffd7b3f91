"""How far the reference is from the recurrence in float64: gate regime x dtype x tensor, error beside its budget.

python -m bench.python.accuracy_table [--json FILE] [--tokens 512]    measures, writes the file, prints every row
python -m bench.python.accuracy_table --markdown [--json FILE]        prints the README's table from the file

Fails if any error exceeds its budget.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from kda_cuda import reference
from python_tests.support import accuracy, oracle
from python_tests.support.cases import Case

_MODEL = {"beta_sigmoid": True}
REGIMES: dict[str, dict] = {
    "bounded at -5, fast": {"gate": "fast", **_MODEL},
    "long memory": {"gate": "long", **_MODEL},
    "violent": {"gate": "violent"},
    "steep, -1e4": {"gate": "steep"},
    "zero": {"gate": "zero"},
    "negative eigenvalues": {"gate": "long", "neg_eigval": True, **_MODEL},
    "collinear keys, beta = 1": {"gate": "zero", "keys": "collinear", "beta": 1.0, "forward_allowance": 5,
                                 "gradient_allowance": 10},
    "collinear keys, beta = 2": {"gate": "zero", "keys": "collinear", "beta": 12.0, "neg_eigval": True, **_MODEL,
                                 "forward_allowance": 20, "gradient_allowance": 50},
}  # fmt: skip
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def results_of(case: Case) -> dict[str, Tensor]:
    x = case.inputs()
    o, final_state, _ = reference.chunk_fwd(*x.fwd_args())
    gradients = zip(accuracy.GRADIENTS, reference.chunk_bwd(*x.bwd_args()), strict=True)
    return {"o": o, "final_state": final_state, **dict(gradients)}


def rows_of(regime: str, dtype: torch.dtype, tokens: int) -> list[dict]:
    case = Case(f"table {regime}", tokens, heads=1, value_heads=2, dtype=dtype, initial_state=True, **REGIMES[regime])
    x = case.inputs()
    results, rounded = results_of(case), accuracy.low_precision_reference(x)
    truths = oracle.named(*oracle.gradients(x.double()))
    rows = []
    for name, result in results.items():
        if name not in truths:
            continue  # a gradient of something that the case does not have
        error = accuracy.measure(result, truths[name])
        allowed = accuracy.budget(case, name, rounded[name], truths[name])
        if dtype == torch.float32:  # no rounding but its own: only the caps say how far it may be
            limit = accuracy.cap(case, dtype, name in accuracy.GRADIENTS)
            allowed = accuracy.Budget(limit, accuracy.ROW_FACTOR * limit)
        rows.append({
            "regime": regime, "dtype": str(dtype).removeprefix("torch."), "tensor": name, "rms": error.rms,
            "rms_budget": allowed.rms, "worst_row": error.worst_row, "worst_row_budget": allowed.worst_row,
            "same_nonfinite": error.same_nonfinite,
        })  # fmt: skip
    return rows


def within(row: dict) -> bool:
    return row["same_nonfinite"] and row["rms"] <= row["rms_budget"] and row["worst_row"] <= row["worst_row_budget"]


def print_rows(rows: list[dict]) -> None:
    print(f"{'regime':26} {'dtype':9} {'tensor':15} {'rms':>8} {'budget':>8} {'worst row':>9} {'budget':>8}")
    for r in rows:
        print(
            f"{r['regime']:26} {r['dtype']:9} {r['tensor']:15} {r['rms']:8.1e} {r['rms_budget']:8.1e} "
            f"{r['worst_row']:9.1e} {r['worst_row_budget']:8.1e}{'' if within(r) else '  EXCEEDED'}"
        )


def markdown(rows: list[dict]) -> str:
    """Per regime and dtype the output and the gradient that come closest to their budgets: error (budget)."""
    dtypes = list(dict.fromkeys(r["dtype"] for r in rows))
    lines = [f"| gate regime | {' | '.join(dtypes)} |", "|---" * (1 + len(dtypes)) + "|"]
    for regime in dict.fromkeys(r["regime"] for r in rows):
        cells = [regime]
        for dtype in dtypes:
            own = [r for r in rows if (r["regime"], r["dtype"]) == (regime, dtype)]
            parts = ([r for r in own if (r["tensor"] in accuracy.GRADIENTS) == gradient] for gradient in (False, True))
            worst = [max(part, key=lambda r: r["rms"] / r["rms_budget"]) for part in parts]
            cells.append("; ".join(f"{r['tensor']} {r['rms']:.1e} ({r['rms_budget']:.0e})" for r in worst))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path(__file__).parents[1] / "results" / "accuracy_reference.json")
    parser.add_argument("--markdown", action="store_true", help="measure nothing")
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    if args.markdown:
        print(markdown(json.loads(args.json.read_text())["rows"]))
        return
    rows = [row for regime in REGIMES for dtype in DTYPES for row in rows_of(regime, dtype, args.tokens)]
    print_rows(rows)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"tokens": args.tokens, "key_dim": 64, "value_dim": 64, "torch": torch.__version__, "rows": rows}
    args.json.write_text(json.dumps(result, indent=1) + "\n")
    exceeded = [f"{r['regime']}, {r['dtype']}: {r['tensor']}" for r in rows if not within(r)]
    if exceeded:
        raise SystemExit("over budget: " + "; ".join(exceeded))


if __name__ == "__main__":
    main()
