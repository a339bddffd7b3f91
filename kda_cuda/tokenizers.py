"""Tokenizers of other packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

__all__ = ["tokenizer"]


def tokenizer(
    where: str | Path, asked_by: str, trust_remote_code: bool = False
) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """The functions that encode a text and decode tokens.

    Args:
        where: a ``tokenizer.json``, a folder that has one, or whatever ``AutoTokenizer`` of transformers finds: another
            folder, or a name.
        asked_by: who names the package that is missing.
        trust_remote_code: let transformers run code of the folder.

    Raises:
        ImportError: the package that the tokenizer needs is not installed.
        ValueError: the file is no ``tokenizer.json``.
    """
    path = Path(where)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ImportError(f"{asked_by}: {file} is a tokenizer.json: pip install tokenizers") from None
        try:
            of_file = Tokenizer.from_file(str(file))
        except Exception as error:  # the package raises nothing more special
            raise ValueError(f"{asked_by}: {file} is no tokenizer.json: {error}") from None
        return lambda text: of_file.encode(text).ids, lambda ids: of_file.decode(ids)
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ImportError(f"{asked_by}: {where} has no tokenizer.json: pip install transformers") from None
    found = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
    return found.encode, lambda ids: found.decode(ids, skip_special_tokens=True)
