"""bench/device: every step of the script runs here, on the CPU and with stand-ins for the GPU's tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from bench.device import backward, profile_table, racecheck

ROOT = Path(__file__).parents[2]
HEADER = '"ID","Kernel Name","gpu__time_duration.sum","gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"'
TENSOR = "sm__inst_executed_pipe_tensor_op_gmma.avg.pct_of_peak_sustained_active"
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
PROFILE = f"""==PROF== Connected to process 1
{HEADER},"{TENSOR}","launch__registers_per_thread","{STALLED.format("barrier")}","{STALLED.format("selected")}"
"","","msecond","%","%","register/thread","inst","inst"
"0","void kda::chunk_bwd_kernel<kda::Bf16K128>(kda::Params, int)","1.25","61.5","n/a","168","4.04","1.0"
"""

PYTHON = f"""#!/usr/bin/env bash
# Stands in for python3: the same programs on the CPU, small.
run() {{ exec {sys.executable} "$@"; }}
[[ "$*" != *"${{BROKEN:-nothing}}"* ]] || {{ echo "no NVRTC"; exit 1; }}
[ -z "${{PRETEND:-}}" ] || case "$*" in *" bench."*) echo "one_token    ok"; exit ;; esac
case "$*" in
  -) cat >/dev/null; echo "a GPU" ;;
  "-c import xdist") exit 1 ;;
  *"pip install"*) ;;
  *compile-cudnn*) ;;
  *compile-fla*) echo "$*" >>"$COMPILED"; touch "$TRITON_CACHE_DIR/a.autotune.json" ;;
  *"bench.device.backward cases") run -m bench.device.backward --device cpu cases --names one_token ;;
  *bench.device.backward*) shift 2; run -m bench.device.backward --device cpu "$@" ;;
  *bench_chunk_bwd*) run "$@" --device cpu --shapes T20_H1_N1 --rounds 1 --what core --regimes fast ;;
  *accuracy_peers*) run "$@" --device cpu --tokens 20 --heads 1 ;;
  *"-m pytest"*) shift 2; echo "pytest $*" >"$PYTEST_SAW"; echo "FAILED x.py::y"; echo "1 failed"; exit 1 ;;
  *) run "$@" ;;
esac
"""
TOOL = """#!/usr/bin/env bash
# Stands in for ncu and compute-sanitizer: notes how it was called, and runs the program behind its options.
echo "$(basename "$0") $*" >>"$TOOLS_SAW"
case "$*" in
  *--help*) echo "  --kernel-regex arg"; exit ;;
  *--import*) cat "$PROFILE_CSV"; exit ;;
esac
while [ $# -gt 0 ] && [[ "$1" != *python_stand_in ]]; do shift; done
"$@" || exit
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def device_run(tmp_path):
    """Runs a step; gives the finished process and $OUT."""
    tools, out = tmp_path / "tools", tmp_path / "out"
    tools.mkdir()
    for name, text in {
        "python_stand_in": PYTHON,
        "ncu": TOOL,
        "compute-sanitizer": TOOL,
        "nvcc": "#!/bin/sh\n",
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "profile.csv").write_text(PROFILE)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(out), "PYTHON": str(tools / "python_stand_in"),
        "CACHE": str(tmp_path / "cache"), "COMPILED": str(tmp_path / "compiled"), "KDA_CUDA_COMMIT": "abc",
        "TOOLS_SAW": str(tmp_path / "tools_saw"), "PROFILE_CSV": str(tmp_path / "profile.csv"), "WORKERS": "3",
        "PYTEST_SAW": str(tmp_path / "pytest_saw"), 
    }  # fmt: skip

    def run(*arguments: str, **more: str):
        command = [ROOT / "bench/device/run.sh", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment | more), out

    return run


def test_bwd(device_run, tmp_path):
    done, out = device_run("bwd")
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("bwd: 0 failures", "core     core T20_H1_N1", "collinear core"):
        assert expected in done.stdout
    result = json.loads((out / "chunk_bwd.json").read_text())
    assert len(result["rows"]) == 1 and result["commit"] == "abc"
    assert json.loads((out / "accuracy_peers.json").read_text())["tokens"] == 20
    assert "--backward --workers 3" in (tmp_path / "compiled").read_text()
    with tarfile.open(out / "fla_autotune.tgz") as tuned:
        assert "./a.autotune.json" in tuned.getnames()
    assert len(list(out.iterdir())) <= 8, "more than a machine gives back"


def test_a_step_that_fails_says_so(device_run):
    done, out = device_run("bwd", BROKEN="compile-cudnn", PRETEND="1")
    assert done.returncode == 1 and "cudnn-frontend: no NVRTC" in done.stdout and "bwd: 1 failures" in done.stdout
    assert (out / "bench.log").exists(), "the others are measured"
    done, out = device_run("bwd", BROKEN="backward cases", PRETEND="1")
    assert done.returncode == 1 and "check          FAILED (1)" in done.stdout and "compile" not in done.stdout
    done, _ = device_run("tests", "-k", "gate")
    assert done.returncode == 1 and "FAILED x.py::y" in done.stdout and "tests          FAILED (1)" in done.stdout


def test_tests_are_those_of_the_gpu(device_run, tmp_path):
    device_run("tests", "-k", "gate")
    told = "-o faulthandler_timeout=150 --durations=8"  # which test waits for ever, and which take longest
    assert (tmp_path / "pytest_saw").read_text() == f"pytest -m gpu -q -p no:cacheprovider {told} -k gate\n"


def test_bench(device_run):
    done, out = device_run("bench", "--size", "quick", PRETEND="1")
    assert done.returncode == 0 and "suite          ok" in done.stdout and "bench: 0 failures" in done.stdout
    assert (out / "suite.log").exists()


def test_sanitize(device_run, tmp_path):
    done, out = device_run("sanitize", "one_token", PRETEND="1")
    assert done.returncode == 0, done.stdout + done.stderr
    control, *calls = [line for line in (tmp_path / "tools_saw").read_text().splitlines() if "--tool" in line]
    assert "handover" in control and "control    racecheck of a hand-over" in done.stdout
    assert len(calls) == 4 and done.stdout.count("1 cases ok, ERROR SUMMARY: 0 errors") == 4
    assert len(list(out.iterdir())) == 5
    assert {"initcheck" in call for call in calls if "kns=kda" not in call} == {True}


def report(kernel: str) -> str:
    return f"========= Error: Race reported between Read access at void kda::{kernel}(kda::Params)+0x4df0\n"


@pytest.mark.parametrize(
    ("kernels", "status"),
    [
        (["chunk_fwd_scan_kernel<kda::Fp32K64>", "chunk_bwd_scan_kernel<kda::Bf16K256>"], 0),
        (["chunk_fwd_scan_kernel<kda::Fp32K64>", "chunk_bwd_keys_kernel<kda::Fp32K64>"], 1),
        (["chunk_fwd_scan_kernel<kda::Bf16K64Sm90>"], 1),
        (["chunk_bwd_clear_kernel"], 1),
    ],
)
def test_hazards_of_a_known_limit_are_told_from_others(kernels, status, tmp_path, capsys):
    log = tmp_path / "racecheck.log"
    log.write_text("".join(report(kernel) for kernel in kernels))
    assert racecheck.main(str(log)) == status
    assert ("HAZARD" in capsys.readouterr().out) == bool(status)


def test_profile(device_run, tmp_path):
    done, _ = device_run("profile", "T20_H1_N1", "--regime", "fast")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "chunk_bwd_kernel<Bf16K128>" in done.stdout and "1250.0" in done.stdout
    assert "--clock-control none" in (tmp_path / "tools_saw").read_text()


def test_an_unknown_step_is_refused(device_run):
    done, _ = device_run("sideways")
    assert done.returncode == 2 and "step is 'sideways', expected tests, bwd, bench, sanitize or profile" in done.stderr


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there may be a GPU")
def test_without_a_gpu_nothing_runs(device_run):
    done, out = device_run("bwd", PYTHON=sys.executable)
    assert done.returncode == 2 and "torch sees no GPU" in done.stderr and not list(out.iterdir())


def test_cases_are_held_to_the_reference(monkeypatch, capsys):
    assert backward.run_cases(["gva", "v_first"], "cpu") == 0
    real = backward.gradients
    results = iter([1.0, 1.1])
    monkeypatch.setattr(backward, "gradients", lambda x: {"dq": next(results) * real(x)["dq"]})
    assert backward.run_cases(["gva"], "cpu") == 1
    assert "gva          WRONG: {'dq': 0.1" in capsys.readouterr().out


def test_profile_table():
    head, line = profile_table.table(PROFILE)
    cells = line.split()
    assert cells[0] == "chunk_bwd_kernel<Bf16K128>" and cells[1] == "1250.0" and cells[2] == "61.5"
    assert dict(zip(head.split("  ")[-1:], [line.split("  ")[-1]], strict=True)) == {
        "waiting warps an instruction": "barrier 4.0"
    }
    assert cells[3:9] == ["-", "-", "-", "-", "168.0", "-"]
    with pytest.raises(ValueError, match='begins with "ID"'):
        profile_table.table("no kernels were profiled")
