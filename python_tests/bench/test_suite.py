"""`make bench`, whole, on the CPU: every table is filled or says why not; what is wrong has no time anywhere."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kda_cuda
from bench.python import bench_chunk_fwd, bench_decode, bench_layer, harness, report, suite, timing
from kda_cuda import testing

ROOT = Path(__file__).parents[2]
COLUMNS = ("gpu_us", "eager_us", "host_us")
FILES = ("chunk_fwd", "chunk_bwd", "decode", "layer", "surround")


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    monkeypatch.setenv("KDA_CUDA_STRICT", "1")  # which begin sets: restored afterwards


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A run of everything on the emulator."""
    if not testing.emulator_path().exists():
        # `make test` builds it first; pytest alone, in a fresh checkout, is without.
        pytest.skip("no emulator: make emulator builds it")
    out = tmp_path_factory.mktemp("performance")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDA_CUDA_STRICT", "1")
        for module in ("fla", "cudnn", "cula", "flashinfer", "flash_kda", "causal_conv1d"):
            patch.setitem(sys.modules, module, None)  # not installed, wherever this runs
        patch.setattr(report, "find_spec", lambda name: None)  # no figures, which test_report.py draws
        suite.main(["--device", "emulator", "--out", str(out)])
    return out


def test_kernels_and_reference_are_timed_everywhere(measured):
    seen = set()
    for name in FILES:
        result = json.loads((measured / f"{name}.json").read_text())
        assert result["device"] == "emulator" and result["commit"] and result["date"] and result["torch"]
        assert all(why.startswith("missing") for peer, why in result["peers"].items() if peer not in LIBRARIES)
        for row in result["rows"]:
            for provider, said in row["providers"].items():
                if said.get("failed", "").startswith("transformers is missing"):
                    continue
                for what in row["bytes"]:
                    assert all(said[what][column]["median"] > 0 for column in COLUMNS), (name, row, provider)
                    seen.add((name, row.get("form"), what, row.get("regime"), provider))
    for regime in ("fast", "long"):
        for provider in ("kda_cuda", "reference"):
            assert ("chunk_fwd", None, "forward", regime, provider) in seen
            assert ("decode", None, "decode", regime, provider) in seen
            assert {("chunk_bwd", "fused", x, regime, provider) for x in ("forward", "backward", "step")} <= seen
            assert ("chunk_bwd", "general", "step", regime, provider) in seen
            assert ("layer", None, "step", regime, provider) in seen


LIBRARIES = ("fla-core", "transformers", "causal-conv1d")  # what the layer's result says it found


def test_the_report_has_a_filled_table_of_each(measured):
    text = (measured / "README.md").read_text()
    assert all(f"## {title}: a CPU, device emulator" in text for title in report.TITLES.values())
    for title in (
        "Everything fused, forward and backward",
        "The core alone, backward",
        "A step",
        "`short_conv`, forward",
    ):
        assert f"### {title}" in text
    tables = re.findall(r"^\|.*µs.*\|\n\| ---.*\n((?:\|.*\n)+)", text, re.M)
    assert len(tables) > 20
    assert all(re.search(r"\d", cell) for table in tables for cell in table.split("|")[-2:-1] if cell.strip())
    assert "* cudnn: `missing: ModuleNotFoundError" in text and "* flash_kda: `missing" in text
    assert "no figures" in text


def test_a_killed_run_keeps_its_rows(tmp_path, monkeypatch):
    """The JSON is written after every row: here the second one never comes back."""
    real, out = bench_chunk_fwd.bench, tmp_path / "run.json"
    given = ["--device", "cpu", "--only", "T20_H1_N1", "--no-peers", "--rounds", "1", "--out", str(out)]

    def bench(shape, regime, *rest):
        if regime == "long":
            raise KeyboardInterrupt
        return real(shape, regime, *rest)

    monkeypatch.setattr(bench_chunk_fwd, "bench", bench)
    with pytest.raises(KeyboardInterrupt):
        bench_chunk_fwd.main(given)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["regime"] == "fast" and "forward" in row["providers"]["kda_cuda"]


def test_a_run_killed_while_it_writes_keeps_the_rows_before(tmp_path, monkeypatch):
    out, result = tmp_path / "run.json", {"rows": []}
    timing.note({"row": 1}, [], result, out, "cpu")
    real = Path.write_text

    def killed(path, text):
        real(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        timing.note({"row": 2}, [], result, out, "cpu")
    assert json.loads(out.read_text())["rows"] == [{"row": 1}]


def test_a_benchmark_that_breaks_does_not_end_the_others(tmp_path, monkeypatch, capfd):
    """And no report, not even the first one, shows what an earlier run left."""
    ran, reports = [], []

    def breaks(arguments):
        raise RuntimeError("planted")

    for name, main in {"decode": breaks, "surround": ran.append}.items():
        (tmp_path / f"{name}.json").write_text("of an earlier run")
        monkeypatch.setitem(suite.STEPS, name, replace(suite.STEPS[name], main=main))
    monkeypatch.setattr(report, "write", lambda files, *rest, **more: reports.append(files))
    with pytest.raises(SystemExit, match=r"1 of 2 benchmarks failed: {'decode': 'RuntimeError: planted'}"):
        suite.main(["--device", "cpu", "--out", str(tmp_path), "--only", "decode", "surround", "decode"])
    assert len(ran) == 1 and reports == [[], []]
    assert "planted" in capfd.readouterr().err


def test_a_planted_wrong_result_has_no_time(tmp_path, monkeypatch, capsys):
    """In o of the forward, in a state of a decoding step: the report says so, and shows no number of that row."""
    monkeypatch.setattr(bench_chunk_fwd, "ours", lambda a: lambda: 1.05 * kda_cuda.chunk_kda(**a)[0])

    def spoiled(a):
        call = bench_decode_ours(a)

        def run():
            o = call()
            a["initial_state"].mul_(1.05)
            return o

        return run

    bench_decode_ours = bench_decode.ours
    monkeypatch.setattr(bench_decode, "ours", spoiled)
    given = ["--device", "cpu", "--out", str(tmp_path), "--only", "chunk_fwd", "decode"]
    with pytest.raises(SystemExit, match="2 of 2 benchmarks failed"):
        suite.main(given)
    text = (tmp_path / "README.md").read_text()
    assert "kda_cuda is wrong in T20_H1_N1, fast, nothing is timed: {'o': 0.05" in text
    assert "nothing is timed: {'state': 0.05" in text and "µs |" not in text
    printed = capsys.readouterr().out
    assert "FAILED" in printed and " gpu " not in printed
    for name in ("chunk_fwd", "decode"):
        rows = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        assert rows and all(set(row) & {"bytes", "providers"} == set() for row in rows)


def test_processes_on_a_gpu(monkeypatch, capfd):
    """What only a machine with a GPU does: each benchmark in a process, with a limit, its peers compiled before."""
    assert suite.in_process(["-c", "raise SystemExit(3)"], 60) == "exit status 3"
    assert suite.in_process(["-c", "import time; time.sleep(60)"], 0.2) == "killed after 0.2 s"
    assert suite.in_process(["-c", "print('seen')"], 60) is None and "seen" in capfd.readouterr().out
    ran = []

    def in_process(command, seconds):
        ran.append(" ".join(command))
        return "exit status 1" if "compile-fla" in command else None

    monkeypatch.setattr(suite, "in_process", in_process)
    monkeypatch.setattr(suite, "find_spec", lambda name: True)
    for size in ("full", "quick"):
        args = suite.argparse.Namespace(device=harness.device_argument("cuda"), size=size, seconds=None)
        for name, step in suite.STEPS.items():
            assert suite.measure(step, args, Path(f"{name}.json")) is None
    assert "-m bench.python.peers compile-fla --backward --only T8192_H16_N1 --seconds 90" in ran
    assert "-m bench.python.bench_chunk_bwd --quick --device cuda --out chunk_bwd.json --budget 180" in ran
    assert any(command.endswith("--out layer.json --compile 300 --budget 600") for command in ran)
    assert "fla's kernels are not all compiled: exit status 1" in capfd.readouterr().out
    args.seconds, args.only = 64, list(suite.STEPS)
    assert [suite.seconds_of(step, args) for step in suite.STEPS.values()] == pytest.approx([12, 18, 6, 24, 4])
    for name, step in suite.STEPS.items():
        assert step.module == f"bench.python.bench_{name}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, and it is about what is said without one")
def test_what_is_said_where_things_are_missing(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit, match="this benchmark needs a CUDA device"):
        bench_layer.main([])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kda_cuda, "build_info", lambda: {"ops": None})
    with pytest.raises(SystemExit, match=r"kda_cuda/_ops\.so is missing"):
        bench_decode.main([])
    for bad in (["--device", "tpu"], ["--size", "quick", "--device", "cpu"], ["--size", "small", "--device", "cuda"]):
        with pytest.raises(SystemExit):
            suite.main([*bad, "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        bench_decode.main(["--rounds", "0"])
    said = capsys.readouterr().err
    assert "device is 'tpu', expected one of cpu, emulator, cuda" in said
    assert "--rounds: got 0, expected at least 1" in said
    monkeypatch.setattr(testing, "load_emulator", testing.load_emulator.__wrapped__)  # whatever was loaded before
    monkeypatch.setenv("KDA_CUDA_EMULATE_LIB", str(tmp_path / "none.so"))
    with pytest.raises(SystemExit, match=r"none\.so does not exist: build it with `make emulator`"):
        bench_decode.main(["--device", "emulator"])


def test_the_commit_is_that_of_the_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KDA_CUDA_COMMIT", raising=False)
    head = timing.said_by("git", "-C", str(ROOT), "rev-parse", "HEAD") or ""
    assert timing.commit() in (head, f"{head}-dirty")


def test_the_device_of_this_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(testing, "emulator_path", lambda: ROOT / "README.md")
    assert suite.here() == "emulator"
    monkeypatch.setattr(testing, "emulator_path", lambda: ROOT / "none")
    assert suite.here() == "cpu"
