"""Text to learn from and text to be judged on, as tokens; windows and packed rows of it."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NO_TARGET", "Batch", "Corpus", "PackedRows", "validation_windows", "windows"]

NO_TARGET = -100  # what torch's cross entropy leaves out


@dataclass
class Corpus:
    """Tokens to learn from and tokens to be judged on, from different documents where there are ten or more."""

    name: str
    train: Tensor  # [tokens] uint8, or int32 of a tokenizer
    validation: Tensor  # [tokens]
    begins: Tensor  # int64 [documents]: the first token of each document of ``train``

    @classmethod
    def read(cls, paths: Sequence[Path], tokens: int, encode: Callable[[str], Sequence[int]] | None = None) -> Corpus:
        """The files of ``paths``, a document each. Every tenth document is for validation.

        Fewer than ten documents are one text, whose last tenth is for validation.

        Args:
            paths: files, and folders whose files count, except hidden ones. Without any: Python's standard library.
            tokens: of one window. Both parts have at least one token more.
            encode: of a tokenizer, for text in UTF-8. Default: a byte is a token.

        Raises:
            ValueError: the text is too short.
        """
        name, texts = _texts_of(paths) if paths else _standard_library()
        unit = "bytes" if encode is None else "tokens"
        several = len(texts) >= 10
        train, begins = _joined([text for i, text in enumerate(texts) if i % 10 or not several], encode)
        if several:
            validation, _ = _joined(texts[::10], encode)
        else:
            split = max(0, len(train) - max(len(train) // 10, tokens + 1))
            train, validation, begins = train[:split], train[split:], begins[begins < split]
        if min(len(train), len(validation)) <= tokens:
            total = len(train) + len(validation)
            parts = f", {len(validation)} of them for validation" if several else ""
            least = f"{tokens + 1} for each part" if several else f"at least {2 * tokens + 2}"
            raise ValueError(f"text: {name} has {total} {unit}{parts}, expected {least}")
        return cls(name, train, validation, begins)


def _texts_of(paths: Sequence[Path]) -> tuple[str, list[bytes]]:
    files = [file for path in paths for file in (_files_below(path) if path.is_dir() else [path])]
    return ", ".join(str(path) for path in paths), [file.read_bytes() for file in files]


def _files_below(folder: Path) -> list[Path]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]


def _standard_library() -> tuple[str, list[bytes]]:
    """Python's own sources. Tests and character tables are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "site-packages", "dist-packages", "encodings", "pydoc_data"}
    files = [p for p in sorted(root.rglob("*.py")) if not left_out & set(p.relative_to(root).parts)]
    return f"Python standard library, {len(files)} files", [p.read_bytes() for p in files]


def _joined(texts: list[bytes], encode: Callable[[str], Sequence[int]] | None) -> tuple[Tensor, Tensor]:
    """The tokens of all texts, and where each text begins. As bytes, a newline follows each text but the last."""
    if encode is None:
        ended = [*(text + b"\n" for text in texts[:-1]), *texts[-1:]]
        tokens = torch.frombuffer(bytearray(b"".join(ended)) or bytearray(1), dtype=torch.uint8)
        lengths = [len(text) for text in ended]
        tokens = tokens[: sum(lengths)]
    else:
        pieces = [torch.tensor(encode(text.decode(errors="replace")), dtype=torch.int32) for text in texts]
        tokens = torch.cat([torch.empty(0, dtype=torch.int32), *pieces])
        lengths = [len(piece) for piece in pieces]
    ends = torch.tensor(lengths, dtype=torch.int64).cumsum(0)
    return tokens, torch.cat((ends.new_zeros(1), ends)).unique()[:-1]


def windows(data: Tensor, starts: Tensor, tokens: int, device: torch.device | str) -> Tensor:
    """int64 ``[len(starts), tokens + 1]``: inputs and, one further, targets."""
    return data[starts[:, None] + torch.arange(tokens + 1)].long().to(device)


def validation_windows(data: Tensor, tokens: int, device: torch.device | str) -> Tensor:
    """At most 48 windows, spread evenly over the data: always the same ones."""
    last = len(data) - tokens - 1
    starts = torch.linspace(0, last, max(1, min(48, last // tokens)), dtype=torch.float64)  # fp32 rounds beyond 2^24
    return windows(data, starts.long(), tokens, device)


class Batch(NamedTuple):
    """Rows of text, laid end to end as one row of documents."""

    inputs: Tensor  # int64 [1, rows * tokens]
    targets: Tensor  # int64 [rows * tokens]; NO_TARGET at the last token of a document
    cu_seqlens: Tensor  # int32 [documents + 1]: documents, and pieces of documents that a row cuts

    def to(self, device: torch.device) -> Batch:
        return Batch(*(x.to(device, non_blocking=True) for x in self))


class PackedRows:
    """A text in rows of equal length, shuffled anew in every epoch.

    Which tokens a row has is a function of the seed and the number of the row alone. So a run that is resumed, or that
    has other ranks, reads what it would have read.

    Args:
        corpus: its ``train`` tokens are cut.
        tokens: of one row. The text has at least one more.
        seed: of the order.
    """

    def __init__(self, corpus: Corpus, tokens: int, seed: int):
        self.data, self.begins, self.tokens, self.seed = corpus.train, corpus.begins, tokens, seed
        self.rows = max(1, (len(self.data) - 1) // tokens - 1)  # of an epoch; one is left for the shift
        self._epoch, self._starts = -1, torch.empty(0)

    def starts(self, numbers: range) -> list[int]:
        """The first token of each of the rows, which are counted through all epochs."""
        return [self._start(*divmod(number, self.rows)) for number in numbers]

    def _start(self, epoch: int, place: int) -> int:
        if epoch != self._epoch:
            mixed = zlib.crc32(f"{self.seed} {epoch}".encode())  # a generator of the CPU looks at 32 bits of its seed
            generator = torch.Generator().manual_seed(mixed)
            slack = min(self.tokens, len(self.data) - 1 - self.rows * self.tokens)
            shift = int(torch.randint(slack + 1, (), generator=generator))
            self._starts = shift + self.tokens * torch.randperm(self.rows, generator=generator)
            self._epoch = epoch
        return int(self._starts[place])

    def _begins_in(self, start: int, end: int) -> Tensor:
        """Where documents begin from token ``start`` on, and before token ``end``."""
        first, last = torch.searchsorted(self.begins, torch.tensor([start, end])).tolist()
        return self.begins[first:last]

    def targets_in(self, numbers: range) -> int:
        """How many tokens of the rows have a target: all but the last of a document."""
        ends = sum(len(self._begins_in(start + 1, start + self.tokens + 1)) for start in self.starts(numbers))
        return self.tokens * len(numbers) - ends

    def batch(self, numbers: range) -> Batch:
        """The rows of these numbers."""
        inputs, targets, bounds = [], [], []
        for row, start in enumerate(self.starts(numbers)):
            piece = self.data[start : start + self.tokens + 1].long()
            inputs.append(piece[:-1])
            last = self._begins_in(start + 1, start + self.tokens + 1) - start - 1  # of a document
            targets.append(piece[1:].index_fill(0, last, NO_TARGET))
            inside = self._begins_in(start + 1, start + self.tokens) - start
            bounds += [row * self.tokens, *(row * self.tokens + inside).tolist()]
        cu_seqlens = torch.tensor([*bounds, len(numbers) * self.tokens], dtype=torch.int32)
        return Batch(torch.cat(inputs).unsqueeze(0), torch.cat(targets), cu_seqlens)
