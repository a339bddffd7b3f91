"""The runner of fla's own tests, on a folder that looks like fla's with a test that calls one of its functions."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kda_cuda.integrations import fla_tests

from .peers import ROOT


@pytest.fixture
def folder(tmp_path):
    tests = tmp_path / "tests" / "ops"
    tests.mkdir(parents=True)
    (tests / "test_kda.py").write_text(
        "import torch\n"
        "from kda_cuda.integrations import fla\n"
        "def test_served():\n"
        "    x, beta = torch.rand(1, 5, 1, 4), torch.rand(1, 5, 1)\n"
        "    o, _ = fla.run('chunk_kda', (x, x, x, -x, beta), {})\n"
        "    assert o.shape == x.shape\n"
        "def test_nothing():\n"
        "    pass\n"
    )
    return tmp_path


def run(folder, *options: str) -> subprocess.CompletedProcess:
    code = (
        "import sys; from kda_cuda.integrations import fla, fla_tests; fla.register = lambda: None;"
        "sys.exit(fla_tests.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(folder), "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_it_says_what_was_served(folder):
    done = run(folder)
    assert done.returncode == 0 and "2 passed" in done.stdout and "served      1 x chunk_kda" in done.stdout


@pytest.mark.slow
def test_tests_that_reach_nothing_of_ours_are_a_failure(folder):
    done = run(folder, "-k", "nothing")
    assert done.returncode == 1 and "no call was served by kda_cuda" in done.stdout


def test_a_folder_without_the_tests(tmp_path):
    with pytest.raises(SystemExit, match=r"there is no tests/ops/test_kda.py in"):
        fla_tests.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="usage"):
        fla_tests.main([])
