"""The runner of fla's own tests, on a folder that looks like fla's with a test that calls one of its functions."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kda_cuda.integrations import fla_tests

from .peers import ROOT, environment_with


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


@pytest.fixture
def folder_of_ranks(tmp_path):
    """A file with the words that are replaced, whose ranks call one function."""
    tests = tmp_path / "tests" / "context_parallel"
    tests.mkdir(parents=True)
    (tests / "test_cp_kda.py").write_text(
        "import torch\n"
        "import torch.distributed as dist\n"
        "import torch.multiprocessing as mp\n"
        "from kda_cuda.integrations import fla\n"
        "def rank_of_two(rank, file):\n"
        '    dist.init_process_group(backend="nccl", init_method=file, rank=rank, world_size=2)\n'
        "    torch.cuda.set_device(rank)\n"
        "    device = torch.device(f'cuda:{rank}')\n"
        "    x, beta = torch.rand(1, 5, 1, 4, device=device), torch.rand(1, 5, 1, device=device)\n"
        "    fla.run('chunk_kda', (x, x, x, -x, beta), {})\n"
        "    dist.barrier()\n"
        "def test_two(tmp_path):\n"
        "    assert torch.cuda.device_count() >= 2, 'H=12, D=128'\n"
        "    mp.start_processes(rank_of_two, args=(f'file://{tmp_path}/meet',), nprocs=2, start_method='spawn')\n"
    )
    return tmp_path


def run(folder, *options: str, peers: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    code = (
        "import sys; from kda_cuda.integrations import fla, fla_tests; fla.register = lambda: None;"
        "sys.exit(fla_tests.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, str(folder), "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=ROOT, env=environment_with(peers), capture_output=True, text=True)


def test_it_says_what_was_served(folder):
    done = run(folder)
    assert done.returncode == 0 and "2 passed" in done.stdout and "served      1 x chunk_kda" in done.stdout


def test_ranks_on_cpus_say_what_they_served(folder_of_ranks):
    done = run(folder_of_ranks, "--context-parallel", peers=("fla-0.6.0", "triton"))
    assert done.returncode == 0 and "served      2 x chunk_kda" in done.stdout, done.stdout + done.stderr


def test_a_file_of_ranks_without_the_words(folder_of_ranks):
    file = folder_of_ranks / fla_tests.RANKS_TESTS
    file.write_text(file.read_text().replace("nccl", "gloo"))
    with pytest.raises(SystemExit, match=r"has no 'backend=.nccl.', expected the file of fla 0\.5 or 0\.6"):
        fla_tests.ranks_tests(folder_of_ranks, folder_of_ranks, on_cpus=True)


@pytest.mark.slow
def test_tests_that_reach_nothing_of_ours_are_a_failure(folder):
    done = run(folder, "-k", "nothing")
    assert done.returncode == 1 and "no call was served by kda_cuda" in done.stdout


def test_a_folder_without_the_tests(tmp_path):
    with pytest.raises(SystemExit, match=r"there is no tests/ops/test_kda.py in"):
        fla_tests.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="usage"):
        fla_tests.main([])
