"""Reports are drawn from JSON alone; docs/performance.md is what bench/results gives."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.python import report

ROOT = Path(__file__).parents[2]


def columns(us: float) -> dict:
    return {"gpu_us": {"median": us, "spread": 0.01}, "eager_us": {"median": 2 * us}, "host_us": {"median": us / 2}}


RESULT = {
    "benchmark": "chunk_fwd",
    "gpu": "NVIDIA X",
    "driver": "5",
    "torch": "2",
    "commit": "abc",
    "date": "2026-01-02",
    "device": "cuda",
    "copy_bandwidth_tb_s": 2.0,
    "dtype": "bfloat16",
    "peers": {"fla": "flash-linear-attention 0.6.0", "cula": "missing: ImportError: no cula"},
    "rows": [
        {
            "shape": "T8_H1_N1",
            "regime": "fast",
            "bytes": {"forward": 50_000_000},
            "providers": {
                "kda_cuda": {"peak_mib": 12.5, "forward": columns(100.0)},
                "fla": {"forward": columns(250.0)},
                "flash_kda": {"failed": "wrong, not timed: {'o': 0.5}"},
            },
        },
        {
            "shape": "T8_H1_N1",
            "regime": "long",
            "bytes": {"forward": 50_000_000},
            "providers": {
                "kda_cuda": {"forward": columns(1.25)},
                "fla": {"forward": {"failed": "RuntimeError:\n  `no`"}},
                "flash_kda": {"unsupported": "bounded gates only"},
            },
        },
        {"shape": "T9_H1_N1", "regime": "long", "failed": "kda_cuda is wrong"},
        {"shape": "T9_H1_N1", "regime": "fast", "left_out": "the budget of 3 s was spent"},
    ],
}


def test_the_page_is_what_the_results_give():
    assert report.PAGE.read_text() == report.page(), "python -m bench.python.report --page draws it again"
    assert "NVIDIA H200" in report.page() and report.PAGE.with_suffix(".png").is_file()


def test_a_section():
    text = report.section(RESULT, "x.json")
    assert text.startswith(
        "## The forward, without gradients: NVIDIA X, 2026-01-02\n\n`x.json`. Driver 5, torch 2, commit"
    )
    assert "* fla: flash-linear-attention 0.6.0\n* cula: `missing: ImportError: no cula`" in text
    assert "| T8_H1_N1 | fast | 50.0 | 25.0 | 25% | 100 | 250 (2.50) |" in text
    assert "| T8_H1_N1 | long | 50.0 | 25.0 | 2000% | 1.25 | – |" in text
    assert "| T9_H1_N1 | long | – | – | – | – | – |" in text, "a row that failed has no number"
    assert "| T8_H1_N1 | fast | 50.0 | 125 | 12.5 |\n" in text, "host times and memory"
    for reason in (
        "* flash_kda in 1 of 4 rows: `wrong, not timed: {'o': 0.5}`",
        "* flash_kda in 1 of 4 rows: `bounded gates only`",
        "* fla in 1 of 4 rows: `RuntimeError: 'no'`",
        "* T9_H1_N1 long in 1 of 4 rows: `kda_cuda is wrong`",
        "* T9_H1_N1 fast in 1 of 4 rows: `the budget of 3 s was spent`",
    ):
        assert reason in text


def test_the_essential_comes_first():
    """Medians over the rows that both have, and no line for who has none."""
    steps = [
        {
            "shape": str(us),
            "bytes": {"forward": 1},
            "providers": {
                "kda_cuda": {"peak_mib": 2.0, "forward": columns(10.0)},
                "copy": {"forward": columns(1.0)},
                "fla": {"peak_mib": 3.0, "forward": columns(us)},
                "cula": {"unsupported": "no"},
            },
        }
        for us in (5.0, 20.0, 40.0)
    ]
    lines = report.in_short([RESULT | {"rows": [*steps, *RESULT["rows"][2:]]}]).splitlines()
    of_fla = "| The forward, without gradients | NVIDIA X | – | fla | 3 | 2.00 (0.50 to 4.00) |"
    assert lines[2:] == [f"{of_fla} 2.00 (0.50 to 4.00) | 1.50 |"]
    assert report.page().index("## In short") < report.page().index("## How to read it") < 8000


def test_what_a_title_says():
    assert report.title(RESULT | {"gpu": "NVIDIA H200"}, "chunk_fwd_long_h200.json").endswith("(long)")
    assert report.title(RESULT, "chunk_fwd.json") == "The forward, without gradients"


def test_rows_without_any_time_have_no_table():
    text = report.section(RESULT | {"rows": RESULT["rows"][2:]}, "x.json")
    assert "µs |" not in text and "`kda_cuda is wrong`" in text


def test_a_report_needs_neither_torch_nor_matplotlib(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(RESULT))
    program = "import sys; sys.modules |= {'torch': None, 'matplotlib': None}; from bench.python import report; "
    program += f"report.find_spec = lambda name: None; report.main({['x.json', '--out', 'README.md']})"
    environment = {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    text = (tmp_path / "README.md").read_text()
    assert "no figures" in text and "| T8_H1_N1 | fast |" in text


def test_figures(tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    (tmp_path / "x.json").write_text(json.dumps(RESULT))
    report.write([tmp_path / "x.json"], tmp_path / "README.md", {"decode": "exit status 1"})
    assert (tmp_path / "x_0_forward.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "README.md").read_text()
    assert "![Forward](x_0_forward.png)" in text and "* decode failed: `exit status 1`" in text


@pytest.mark.parametrize("bad", [[], ["x.json"], ["--page", "x.json", "--out", "README.md"]])
def test_what_must_be_said(bad):
    with pytest.raises(SystemExit):
        report.main(bad)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "FileNotFoundError"),
        ('{"benchmark": "dec', "JSONDecodeError"),
        ("{}", "it is of no benchmark"),
        ("[1]", "it is of no benchmark"),
    ],
)
def test_files_that_cannot_be_reported_are_named(content, message, tmp_path, capsys):
    path, out = tmp_path / "x.json", tmp_path / "README.md"
    if content:
        path.write_text(content)
    with pytest.raises(SystemExit):
        report.main([str(path), "--out", str(out)])
    assert f"{path}: {message}" in capsys.readouterr().err and not out.exists()
