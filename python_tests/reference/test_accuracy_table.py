"""What the accuracy table and the CPU benchmark of the reference print is held here, at a size for every run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench.python import accuracy_table, bench_reference

from ..support import accuracy

RESULTS = Path(__file__).parents[2] / "bench" / "results"


@pytest.mark.parametrize("dtype", accuracy_table.DTYPES, ids=str)
@pytest.mark.parametrize("regime", accuracy_table.REGIMES)
def test_every_row_is_within_its_budget(regime, dtype):
    rows = accuracy_table.rows_of(regime, dtype, tokens=100)
    assert {"o", "final_state", "dq", "dk", "dv", "dg", "dbeta", "dinitial_state"} <= {r["tensor"] for r in rows}
    assert [r for r in rows if not accuracy_table.within(r)] == []


def test_the_table_can_exceed():
    row = accuracy_table.rows_of("zero", torch.float32, tokens=10)[0]
    assert accuracy_table.within(row)
    assert not accuracy_table.within({**row, "rms": 2 * row["rms_budget"]})
    assert not accuracy_table.within({**row, "worst_row": 2 * row["worst_row_budget"]})


def test_the_committed_table_keeps_the_promises():
    """1e-5 forward, 3e-5 for gradients in fp32 at 512 tokens, in every regime without collinear keys."""
    table = json.loads((RESULTS / "accuracy_reference.json").read_text())
    assert table["tokens"] == 512
    rows = [r for r in table["rows"] if r["dtype"] == "float32" and "collinear" not in r["regime"]]
    assert {r["regime"] for r in rows} == {r for r in accuracy_table.REGIMES if "collinear" not in r}
    for r in rows:
        assert r["rms"] <= (3e-5 if r["tensor"] in accuracy.GRADIENTS else 1e-5), r


def test_all_that_the_benchmark_times_agrees():
    bench_reference.verify(bench_reference.inputs(150))


def test_errors_are_found_where_they_are():
    """A ratio of norms hides what a single row shows; infinities count by position."""
    truth = torch.ones(1000, 8, dtype=torch.float64)
    one_row = truth.float()
    one_row[7] += 0.01
    error = accuracy.measure(one_row, truth)
    assert error.rms == pytest.approx(0.01 / 1000**0.5, rel=1e-3)
    assert error.worst_row == pytest.approx(0.01, rel=1e-3)
    large = torch.tensor([[1.0, 1e6, -1e6]], dtype=torch.float64)
    assert accuracy.measure(large.half(), large).same_nonfinite
    assert not accuracy.measure(large.half().abs(), large).same_nonfinite
    assert not accuracy.measure(torch.tensor([[float("nan"), 1e6, -1e6]]).half(), large).same_nonfinite
    nothing = torch.zeros(3, dtype=torch.float64)
    assert accuracy.measure(nothing.float(), nothing).rms == 0
    assert accuracy.measure(nothing.float() + 1e-30, nothing).rms == float("inf")
