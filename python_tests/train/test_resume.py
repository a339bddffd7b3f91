"""Checkpoints: a run that is killed ends where the others end; a full disk leaves what was there."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystem

from kda_cuda.training import checkpoints, loop
from kda_cuda.training.ranks import World
from kda_cuda.training.steps import adamw

from ..support.train_runs import STEPS, run, write_inputs

PATIENCE = 300  # seconds; a process takes about five on a machine that does nothing else


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def uninterrupted(arguments, tmp_path_factory) -> tuple[list[dict], Path]:
    out = tmp_path_factory.mktemp("uninterrupted")
    return run(arguments, out), out


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "model.pt", weights_only=True)["weights"]


def moments_of(out: Path) -> bytes:
    """The files of the last checkpoint, which hold the state of the optimizer too."""
    last = checkpoints.latest(out / "checkpoints")
    return b"".join(path.read_bytes() for path in sorted(last.glob("*.distcp")))


PROGRAM = """
import signal, sys
from kda_cuda import train
from kda_cuda.training import checkpoints, metrics

def pausing(function, number):
    def call(*arguments, **options):
        nonlocal number
        function(*arguments, **options)
        number -= 1
        if number == 0:
            signal.pause()
    return call

place, name, number = sys.argv[1:4]
owner = {"line": metrics.Metrics, "save": checkpoints.dcp}[place]
setattr(owner, name, pausing(getattr(owner, name), int(number)))
train.main(sys.argv[4:])
"""  # a run that waits, to be killed, after a call of this number of a function


def killed(arguments: list[str], out: Path, pause: list[str], is_there: Callable[[], bool]) -> None:
    """Starts a run that pauses, and kills it as soon as what the pause follows is there."""
    command = [sys.executable, "-c", PROGRAM, *pause, *arguments, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    end = time.monotonic() + PATIENCE
    try:
        while not is_there():
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("place", ["after a line", "while saving"])
def test_a_killed_run_ends_where_an_uninterrupted_one_does(arguments, uninterrupted, tmp_path, place):
    """After the line of step 3; and after that of step 4, when its checkpoint is written but has no name yet."""
    rows, out = uninterrupted
    saving = place == "while saving"
    lines, half = tmp_path / "metrics.jsonl", tmp_path / "checkpoints" / ".saving"

    def is_there() -> bool:
        written = lines.read_text().count("\n") if lines.is_file() else 0
        return (half / ".metadata").is_file() and written == 4 if saving else written == 3

    killed(arguments, tmp_path, ["save", "save", "2"] if saving else ["line", "write", "3"], is_there)
    assert checkpoints.latest(tmp_path / "checkpoints").name == "step-00000002" and half.exists() == saving
    assert run(arguments, tmp_path, "--resume") == rows and len(rows) == STEPS
    expected, got = weights_of(out), weights_of(tmp_path)
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    assert moments_of(tmp_path) == moments_of(out)


def test_lines_behind_the_checkpoint_are_done_again(arguments, uninterrupted, tmp_path):
    """Also a line that was written in half, and a checkpoint that was: neither counts."""
    rows, out = uninterrupted
    shutil.copytree(out / "checkpoints" / "step-00000004", tmp_path / "checkpoints" / "step-00000004")
    shutil.copytree(out / "checkpoints" / "step-00000006", tmp_path / "checkpoints" / ".saving")
    lines = (out / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:5], lines[5][:20]]))
    assert run(arguments, tmp_path, "--resume") == rows
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in written] == list(range(1, STEPS + 1))
    assert all(row["tokens_per_second"] > 0 and row["tokens"] == 128 * row["step"] for row in written)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000004", "step-00000006"]


def test_random_numbers_go_on(tmp_path):
    world, model = World(0, 1, torch.device("cpu")), torch.nn.Linear(2, 2)
    optimizer = adamw(model)
    torch.manual_seed(5)
    torch.rand(7)
    checkpoints.save(tmp_path, 3, model, optimizer, {}, world, keep=1)
    expected = torch.rand(3)
    torch.manual_seed(6)
    assert checkpoints.load(checkpoints.latest(tmp_path), model, optimizer, world) == 3
    assert torch.equal(torch.rand(3), expected)
    about = checkpoints.latest(tmp_path) / "about.json"
    about.write_text(about.read_text().replace('"cpu"', '"cuda"'))
    torch.manual_seed(6)
    assert checkpoints.load(about.parent, model, optimizer, world) == 3  # those of another device stay
    torch.testing.assert_close(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(6)))


@pytest.mark.parametrize("file", [".distcp", ".metadata", "about.json"])
def test_a_full_disk_leaves_the_old_checkpoint(arguments, uninterrupted, tmp_path, monkeypatch, file):
    rows, out = uninterrupted
    shutil.copytree(out / "checkpoints" / "step-00000004", tmp_path / "checkpoints" / "step-00000004")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    create, fsync = FileSystem.create_stream, os.fsync

    def no_space(self, path, mode):
        if mode == "wb" and file in str(path):
            raise full
        return create(self, path, mode)

    def no_space_at_last(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("about.json"):
            raise full
        fsync(handle)

    if file == "about.json":
        monkeypatch.setattr(checkpoints.os, "fsync", no_space_at_last)
    else:
        monkeypatch.setattr(FileSystem, "create_stream", no_space)
    with pytest.raises(OSError) as raised:
        run(arguments, tmp_path, "--resume")
    assert raised.value.errno == errno.ENOSPC
    name = tmp_path / "checkpoints" / "step-00000006"
    assert f"checkpoint {name} cannot be written, step-00000004 stays: " in str(raised.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]
    monkeypatch.undo()
    assert run(arguments, tmp_path, "--resume") == rows[4:]


def test_ctrl_c_while_saving(tmp_path, monkeypatch):
    def interrupted(self, path, mode):
        raise KeyboardInterrupt

    monkeypatch.setattr(FileSystem, "create_stream", interrupted)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, 3, model, adamw(model), {}, World(0, 1, torch.device("cpu")), keep=1)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["about.json", ".metadata", "__0_0.distcp", "everything"])
def test_a_damaged_checkpoint_is_named(arguments, uninterrupted, tmp_path, damage):
    """It was copied in part, for instance. The one before is there for a run that is told to take it."""
    _, out = uninterrupted
    place = tmp_path / "checkpoints" / "step-00000004"
    shutil.copytree(out / "checkpoints" / "step-00000004", place)
    for path in place.iterdir() if damage == "everything" else [place / damage]:
        path.write_bytes(b"garbage" if damage == "everything" else path.read_bytes()[:10])
    with pytest.raises(ValueError, match=f"checkpoint {place} cannot be read, expected a complete one"):
        run(arguments, tmp_path, "--resume")


def test_gradients_that_are_no_numbers_end_the_run(arguments, tmp_path, monkeypatch):
    """Before a checkpoint is written of what they made of the weights."""
    monkeypatch.setattr(loop, "descend", lambda *_: torch.tensor(torch.inf))
    with pytest.raises(FloatingPointError, match="the gradient norm of step 1 is inf, expected a finite number"):
        run(arguments, tmp_path, "--save-every", "1")
    assert checkpoints.latest(tmp_path / "checkpoints") is None


def test_another_run_is_refused(arguments, uninterrupted, tmp_path):
    _, out = uninterrupted
    with pytest.raises(ValueError, match=r"--out .* has step-00000006, expected --resume or another folder"):
        run(arguments, out)
    about = checkpoints.latest(out / "checkpoints") / "about.json"
    kept = about.read_text()
    about.write_text(kept.replace('"clip"', '"clap"'))  # an option that only another version has
    with pytest.raises(ValueError, match=r"--clap is None, expected 1.0 as in"):
        run(arguments, out, "--resume")
    about.write_text(kept)
    (tmp_path / "text").write_text("another text. " * 20)
    for more, message in (
        (["--seed", "1"], "--seed is 1, expected 0 as in"),
        (["--lr", "0.5"], "--lr is 0.5, expected 0.003 as in"),
        (["--text", str(tmp_path / "text")], r"--text is \d+ tokens .*, expected \d+ tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            run(arguments, out, "--resume", *more)
