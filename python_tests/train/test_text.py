"""Text, its division into rows, and the bar."""

from __future__ import annotations

import itertools
import weakref

import pytest
import tokenizers
import torch

from kda_cuda.tokenizers import tokenizer
from kda_cuda.training import progress
from kda_cuda.training.steps import learning_rate, mean_loss, warm_up_steps
from kda_cuda.training.text import NO_TARGET, Corpus, PackedRows, validation_windows


def write_documents(folder, number: int) -> list[bytes]:
    texts = [b"document %d: " % i + bytes([97 + i]) * (10 + i) for i in range(number)]
    for i, text in enumerate(texts):
        path = folder / "below" / f"{i:02}" if i % 2 else folder / f"{i:02}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "file").write_text("not a document")
    return [texts[i] for i in (*range(0, number, 2), *range(1, number, 2))]  # in the order of paths


def test_documents_of_a_folder(tmp_path):
    texts = write_documents(tmp_path, 20)
    corpus = Corpus.read([tmp_path], 8)
    learned = [text for i, text in enumerate(texts) if i % 10]
    assert bytes(corpus.train.tolist()) == b"\n".join(learned)
    assert bytes(corpus.validation.tolist()) == b"\n".join(texts[::10])
    assert [bytes(corpus.train[b : b + 9].tolist()) for b in corpus.begins] == [b"document "] * 18


def test_few_documents_are_one_text(tmp_path):
    texts = write_documents(tmp_path, 4)
    corpus = Corpus.read([tmp_path], 8)
    whole = b"\n".join(texts)
    assert bytes(corpus.train.tolist()) + bytes(corpus.validation.tolist()) == whole
    assert len(corpus.validation) == 9 and corpus.begins.tolist() == [whole.index(text) for text in texts]


def test_too_short_a_text(tmp_path):
    (tmp_path / "short").write_bytes(b"x" * 300)
    with pytest.raises(ValueError, match=r"short has 300 bytes, expected at least 514"):
        Corpus.read([tmp_path / "short"], 256)
    write_documents(tmp_path, 12)
    with pytest.raises(ValueError, match=r"has \d+ bytes, \d+ of them for validation, expected 257 for each part"):
        Corpus.read([tmp_path], 256)


def test_tokens_of_a_tokenizer(tmp_path):
    words = {word: i for i, word in enumerate("?abcdef")}
    saved = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    saved.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    saved.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text("a b c d e f " * 4)
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        corpus = Corpus.read([tmp_path / "text"], 4, tokenizer(where, "test")[0])
        assert corpus.train.tolist() == [1, 2, 3, 4, 5, 6] * 3 + [1] and corpus.train.dtype == torch.int32
        assert corpus.validation.tolist() == [2, 3, 4, 5, 6]


def test_the_standard_library_is_the_default():
    """Files of validation are not learned from."""
    corpus = Corpus.read([], 256)
    assert len(corpus.train) > 5 * len(corpus.validation) > 1_000_000
    sample = bytes(corpus.validation[100_000:100_200].tolist())
    assert sample not in corpus.train.numpy().tobytes()


def rows_of(lengths: list[int], tokens: int, seed: int = 3) -> PackedRows:
    """The tokens are their own places."""
    total = sum(lengths)
    ends = torch.tensor(lengths).cumsum(0)
    data = torch.arange(total, dtype=torch.int32)
    return PackedRows(Corpus("", data, data, torch.cat((ends.new_zeros(1), ends[:-1]))), tokens, seed)


def test_rows_are_documents_with_targets():
    lengths = [5, 1, 20, 3, 11, 1, 1, 8, 30, 7]
    rows = rows_of(lengths, 8)
    begins = set(rows.begins.tolist())
    numbers = range(3, 23)  # through the ends of epochs of nine rows
    inputs, targets, bounds = rows.batch(numbers)
    assert inputs.shape == (1, 160) and bounds.dtype == torch.int32
    places = inputs[0].tolist()
    expected = [0] + [i for i in range(1, 160) if i % 8 == 0 or places[i] in begins] + [160]
    assert bounds.tolist() == expected
    assert targets.tolist() == [NO_TARGET if place + 1 in begins else place + 1 for place in places]
    assert rows.targets_in(numbers) == int((targets != NO_TARGET).sum()) < 160


def test_the_order_depends_on_seed_and_number_alone():
    lengths = [87]
    rows, again, other = rows_of(lengths, 8), rows_of(lengths, 8), rows_of(lengths, 8, seed=4)
    assert rows.rows == 9
    whole = rows.starts(range(36))
    assert [again.starts(range(n, n + 1))[0] for n in reversed(range(36))] == whole[::-1]
    assert other.starts(range(36)) != whole
    for epoch in range(4):
        starts = sorted(whole[9 * epoch : 9 * epoch + 9])
        assert starts == list(range(starts[0], starts[0] + 72, 8)) and starts[-1] + 8 < 87
    assert len({min(whole[9 * epoch : 9 * epoch + 9]) for epoch in range(4)}) > 1
    assert [whole[i : i + 9] for i in (0, 9)] != [sorted(whole[i : i + 9]) for i in (0, 9)]


def test_validation_windows_end_with_the_text():
    """Their starts are exact where fp32 is not."""
    data = torch.zeros(2**25 + 12, dtype=torch.uint8)
    data[-1] = 1
    assert validation_windows(data, 8, "cpu")[-1].tolist() == [0] * 8 + [1]


def test_the_mean_loss_keeps_the_logits_of_a_few_rows():
    torch.manual_seed(0)
    batch, table, made = torch.randint(5, (7, 9)), torch.randn(5, 5), []

    def model(tokens: torch.Tensor) -> torch.Tensor:
        assert len(tokens) <= 3 and all(logits() is None for logits in made)
        logits = table[tokens]
        made.append(weakref.ref(logits))
        return logits

    expected = torch.nn.functional.cross_entropy(table[batch[:, :-1]].flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(mean_loss(model, batch, 3), expected)
    assert len(made) == 3


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 100, 2.0, 10, 0.25) for step in range(100)]
    assert rates[:10] == [pytest.approx(0.2 * n) for n in range(1, 11)]
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1.25) and rates[99] == pytest.approx(0.5, abs=1e-3)
    assert [warm_up_steps(n) for n in (1, 100, 10_000)] == [1, 10, 50]


def test_the_bar_says_how_much_time_is_left(monkeypatch, capsys):
    """Elsewhere than on a terminal: one line every tenth of the way, from the pace so far."""
    seconds = iter(range(0, 10_000, 3))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    bar = progress.Progress(20)
    for done in range(1, 21):
        bar.show(done, "text")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0] == "[###...........................] 2/20  0:27 left  text"
    assert lines[-1] == f"[{'#' * 30}] 20/20  took 0:30  text"


def test_the_bar_of_a_resumed_run_has_its_own_pace(monkeypatch, capsys):
    seconds = iter((0, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    progress.Progress(20, begin=15).show(16, "text")
    assert " 16/20  0:24 left  text" in capsys.readouterr().out
