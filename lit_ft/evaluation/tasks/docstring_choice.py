"""The questions of `docstring_choice`: which of four docstrings belongs to a function?"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from lit_ft.data.docstrings import Docstrings, Pair, in_validation, prompt, read_pairs

QUESTIONS = 200
CHOICES = 4
_LONGEST_CODE = 400  # characters
_LENGTHS_OF_DOCSTRINGS = range(20, 151)  # characters


def questions(**_: Any) -> dict[str, Dataset]:
    """Return the split `test`, with the columns `prompt`, `choices` and `answer`.

    The prompts are those of the embedded data. The wrong docstrings are those whose length is the
    nearest, because a short text is likelier than a long one. The questions depend on the version
    of Python alone.

    Raises:
        ValueError: If the interpreter ships no source of its library, or too few docstrings.
    """
    return {"test": Dataset.from_list(_rows(_short_pairs()))}


def _rows(pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """Return a row for each question."""
    if len(pairs) < CHOICES:
        raise ValueError(
            f"docstring_choice needs {CHOICES} short docstrings of modules for validation, and the "
            f"standard library of this Python interpreter has {len(pairs)}."
        )
    asked = sorted(pairs, key=lambda pair: _digest(pair.docstring))[:QUESTIONS]
    return [_row(pair, pairs) for pair in asked]


def _row(pair: Pair, pairs: Sequence[Pair]) -> dict[str, Any]:
    others = sorted(
        (one for one in pairs if one is not pair),
        key=lambda one: (
            abs(len(one.docstring) - len(pair.docstring)),
            _digest(pair.docstring, one.docstring),
        ),
    )
    choices = [pair.docstring, *(one.docstring for one in others[: CHOICES - 1])]
    choices.sort(key=lambda one: _digest(pair.code, one))
    return {"prompt": prompt(pair), "choices": choices, "answer": choices.index(pair.docstring)}


def _short_pairs() -> list[Pair]:
    """Return the functions to ask about. Each has a code and a docstring of its own."""
    source = Docstrings("function")
    files = [file for file in source.files if in_validation(file.as_posix())]
    pairs = [pair for file in files for pair in read_pairs(source.library, file)]
    copies = Counter(text for pair in pairs for text in (pair.code, pair.docstring))
    return [
        pair
        for pair in pairs
        if pair.kind == "function"
        and copies[pair.code] == copies[pair.docstring] == 1
        and len(pair.code) <= _LONGEST_CODE
        and len(pair.docstring) in _LENGTHS_OF_DOCSTRINGS
    ]


def _digest(*texts: str) -> str:
    """Return what sorts texts in an order that has nothing to do with what they say."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()
