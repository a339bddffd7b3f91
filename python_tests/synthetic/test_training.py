"""The command of the synthetic tasks: runs learn, equal seeds are equal runs, all of them are reported and drawn."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from kda_cuda.synthetic import __main__ as command
from kda_cuda.synthetic import training
from kda_cuda.synthetic.models import VARIANTS
from kda_cuda.synthetic.picture import best_runs
from kda_cuda.synthetic.tasks import Task
from kda_cuda.synthetic.training import Run, Sizes, learn

TINY = ["--hidden", "16", "--heads", "1", "--head-dim", "8", "--batch", "8", "--layers", "1", "--held-out", "8"]
TINY += ["--device", "cpu"]
SIZES = Sizes(hidden_size=16, num_layers=1, num_heads=1, head_dim=8, batch=16, steps=1, evaluations=1, held_out=8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_one_step_reduces_the_loss(variant):
    task = Task("mqar", 16, 4, 4)
    torch.manual_seed(0)
    model = training.new_model(task, variant, SIZES)
    batch = task.batch(16, torch.Generator().manual_seed(0))
    before = training.loss_of(model, batch)
    before.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    torch.optim.SGD(model.parameters(), 1e-2).step()
    assert training.loss_of(model, batch).item() < before.item()


def test_a_run_ends_when_it_has_solved_its_task(monkeypatch):
    """Reached at once if a twentieth of the answers is enough."""
    run, sizes = Run(Task("palindrome", 8, 2), "kda", 1e-2, 0), Sizes(**vars(SIZES) | {"steps": 6, "evaluations": 3})
    row = learn(run, sizes)
    assert [point[0] for point in row["curve"]] == [2, 4, 6] and row["solved_at"] is None
    monkeypatch.setattr(training, "SOLVED", 0.05)
    early = learn(run, sizes)
    assert early["curve"] == row["curve"][:1] and early["solved_at"] == 2


@pytest.mark.parametrize("steps", [1, 9, 10, 19])
def test_every_number_of_steps_has_a_schedule(steps, monkeypatch):
    """One whose tenth is one step, too."""
    monkeypatch.setattr(training, "loss_of", lambda model, batch: sum(p.square().sum() for p in model.parameters()))
    sizes = Sizes(**vars(SIZES) | {"steps": steps, "batch": 1, "held_out": 1})
    assert learn(Run(Task("palindrome", 2, 9), "kda", 1e-3, 0), sizes)["curve"][-1][0] <= steps


def test_rows_that_ask_nothing_teach_nothing():
    task = Task("stack", 6, 2, 1)
    seed = next(n for n in range(99) if bool((task.batch(1, torch.Generator().manual_seed(n)).targets < 0).all()))
    model = training.new_model(task, "kda", SIZES)
    loss = training.loss_of(model, task.batch(1, torch.Generator().manual_seed(seed)))
    loss.backward()
    assert loss == 0 and not any(bool(p.grad.any()) for p in model.parameters())


def test_accuracy_counts_what_is_asked():
    task = Task("palindrome", 8, 4)
    batch = task.batch(6, torch.Generator().manual_seed(0))

    def right_in_one_half(tokens: torch.Tensor) -> torch.Tensor:
        """Always right before the separator, where nothing is asked; after it in the first row of each two."""
        rows = [(batch.tokens == row).all(1).nonzero()[0, 0] for row in tokens]
        wanted = batch.targets[torch.stack(rows)].clamp(min=0)
        wanted[1::2] = (wanted[1::2] + 1) % 4
        return torch.nn.functional.one_hot(wanted, task.vocab_size).float()

    assert training.accuracy(right_in_one_half, batch, rows=2) == 0.5


def test_the_command_reports_every_run(tmp_path, capsys):
    task = ["--task", "mqar", "stack", "--length", "12", "--keys", "3", "--symbols", "3", "--steps", "2"]
    grid = ["--seed", "0", "1", "--lr", "1e-2", "--workers", "1"]
    result = command.main([*TINY, *task, *grid, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "synthetic.json").read_text())
    assert written == json.loads(json.dumps(result))
    cells = {(r["task"], r["variant"], r["lr"], r["seed"]) for r in written["rows"]}
    assert len(cells) == len(written["rows"]) == 2 * 3 * 2
    assert (tmp_path / "synthetic.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "[12/12" in printed and "mqar          12 no_delta_rule" in printed


def test_workers_give_the_rows_of_one_process(tmp_path):
    task = ["--task", "palindrome", "--variant", "kda", "--length", "8", "--symbols", "3", "--steps", "2"]
    common = [*TINY, *task, "--seed", "0", "--out", str(tmp_path)]
    one, two = (command.main([*common, "--workers", n])["rows"] for n in "12")
    assert [{**row, "seconds": 0} for row in one] == [{**row, "seconds": 0} for row in two]


def test_the_full_grid_is_that_of_the_report():
    o = command.options(["--full", "--device", "cuda"])
    sizes, runs = command.sizes_of(o), list(command.runs_of(o))
    assert (sizes.num_layers, sizes.num_heads, sizes.head_dim, sizes.steps) == (2, 2, 128, 20000)
    assert {run.lr for run in runs} == {5e-5, 1e-4, 5e-4, 1e-3} and {run.seed for run in runs} == {0, 1, 2}
    assert {run.task.length for run in runs} == {256, 512, 1024, 2048} and len(runs) == 3 * 4 * 3 * 4 * 3
    assert {run.task.keys for run in runs if run.task.name == "stack"} == {64}


def test_the_best_learning_rate_is_drawn():
    def row(variant: str, lr: float, right: float, steps: int) -> dict:
        cell = {"task": "mqar", "length": 8, "variant": variant, "lr": lr}
        return cell | {"accuracy": right, "curve": [[steps, right, 0]]}

    rows = [row("kda", 1, 0.5, 10), row("kda", 2, 0.875, 10), row("kda", 2, 0.75, 10), row("kda", 3, 0.8125, 9)]
    assert [r["lr"] for r in best_runs([*rows, row("x", 1, 1, 1)], "mqar", 8, "kda")] == [3]
    assert best_runs(rows, "mqar", 9, "kda") == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--steps", "0"], "kda_cuda::Sizes: steps is 0, expected at least 1"),
        (["--lr", "2"], "kda_cuda::Run: lr is 2.0, expected 0 < lr < 1"),
        (["--task", "mqar", "--length", "64", "--keys", "1"], "kda_cuda::Task: keys is 1, expected at least 8"),
        (["--workers", "0"], "kda_cuda.synthetic: --workers is 0, expected at least 1"),
    ],
)
def test_bad_options(arguments, message, tmp_path):
    with pytest.raises(ValueError) as error:
        command.main([*TINY, *arguments, "--out", str(tmp_path / "none")])
    assert str(error.value).startswith(message) and not (tmp_path / "none").exists()


def test_an_installed_package_has_no_commit(tmp_path, monkeypatch):
    """Also where it lies in the checkout of another project."""
    package = tmp_path / "site-packages" / "kda_cuda" / "synthetic"
    package.mkdir(parents=True)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path)]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "another project"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(command, "__file__", str(package / "__main__.py"))
    assert command.commit() is None
