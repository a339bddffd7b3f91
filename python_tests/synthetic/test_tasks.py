"""Every row of the synthetic tasks, against the task told again in plain Python."""

from __future__ import annotations

import pytest
import torch

from kda_cuda.synthetic.tasks import IGNORED, TASKS, Task

CASES = [
    Task("palindrome", 2, 2),
    Task("palindrome", 16, 5),
    Task("palindrome", 17, 3),
    Task("mqar", 4, 2, 1),
    Task("mqar", 48, 5, 9),
    Task("stack", 6, 2, 1),
    Task("stack", 60, 4, 3),
]


def palindrome(task: Task, row: list[int]) -> list[int]:
    at = row.index(task.symbols)
    forth, back = row[:at], row[at + 1 :]
    assert at == task.length // 2 and all(0 <= x < task.symbols for x in forth)
    answers = forth[::-1]
    assert back == answers[:-1]
    return [IGNORED] * at + answers


def mqar(task: Task, row: list[int]) -> list[int]:
    known, targets = {}, []
    for key, value in zip(row[::2], row[1::2], strict=True):
        assert task.symbols <= key < task.symbols + task.keys and 0 <= value < task.symbols
        targets += [known.get(key, IGNORED), IGNORED]
        assert known.setdefault(key, value) == value
    assert len(known) <= max(1, task.length // 8)
    return targets


def stack(task: Task, row: list[int]) -> list[int]:
    stacks: dict[int, list[int]] = {}
    targets, push = [], task.symbols + task.keys
    for i in range(0, len(row), 3):
        operation, which, symbol = row[i : i + 3]
        assert operation in (push, push + 1) and 0 <= which - task.symbols < task.keys
        if operation == push:
            stacks.setdefault(which, []).append(symbol)
        else:
            assert stacks[which].pop() == symbol
        targets += [IGNORED, IGNORED if operation == push else symbol, IGNORED]
    return targets


PLAIN = {"palindrome": palindrome, "mqar": mqar, "stack": stack}


@pytest.mark.parametrize("task", CASES, ids=str)
def test_every_answer(task):
    batch = task.batch(20, torch.Generator().manual_seed(3))
    assert batch.tokens.shape == batch.targets.shape and batch.tokens.dtype == torch.int64
    assert task.length - 2 <= batch.tokens.shape[1] <= task.length
    assert int(batch.tokens.max()) < task.vocab_size and int(batch.tokens.min()) >= 0
    for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        assert PLAIN[task.name](task, row) == targets


@pytest.mark.parametrize("task", [t for t in CASES if t.length > 17], ids=str)
def test_rows_ask_and_differ(task):
    batch = task.batch(50, torch.Generator().manual_seed(0))
    asked = (batch.targets != IGNORED).sum(1)
    assert int(asked.min()) > 0 and batch.tokens.unique(dim=0).shape[0] == 50
    assert set(batch.targets.unique().tolist()) == {
        IGNORED,
        *range(task.symbols),
    }  # no answer is more likely by absence


def test_stacks_are_as_often_popped_as_pushed():
    batch = Task("stack", 300, 4, 8).batch(40, torch.Generator().manual_seed(0))
    pops = float((batch.tokens[:, ::3] == 4 + 8 + 1).double().mean())
    assert 0.4 < pops < 0.5  # a pop needs something to pop


def test_equal_seeds_give_equal_rows():
    task = CASES[4]
    a, b, c = (task.batch(4, torch.Generator().manual_seed(seed)).tokens for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("sorting", 8, 2), "kda_cuda::Task: name is 'sorting', expected one of ['palindrome', 'mqar', 'stack']"),
        (("palindrome", 1, 2), "kda_cuda::Task: length is 1, expected at least 2 for palindrome"),
        (("mqar", 3, 2, 1), "kda_cuda::Task: length is 3, expected at least 4 for mqar"),
        (("stack", 5, 2, 1), "kda_cuda::Task: length is 5, expected at least 6 for stack"),
        (("palindrome", 8, 1), "kda_cuda::Task: symbols is 1, expected at least 2"),
        (("mqar", 64, 4, 7), "kda_cuda::Task: keys is 7, expected at least 8 for mqar of this length"),
        (("stack", 64, 4), "kda_cuda::Task: keys is 0, expected at least 1 for stack of this length"),
    ],
)
def test_bad_tasks(arguments, message):
    with pytest.raises(ValueError) as error:
        Task(*arguments)
    assert str(error.value) == message


def test_a_length_is_a_whole_number():
    with pytest.raises(TypeError, match=r"kda_cuda::Task: length is 8.0 \(float\), expected an int"):
        Task("palindrome", 8.0, 2)


def test_every_task_is_tested():
    assert {task.name for task in CASES} == set(PLAIN) == set(TASKS)
