"""Fixtures of more than one room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lit_ft.data import docstrings
from tests.support.ranks import ranks
from tests.support.tokenizer import byte_level_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of its own for each test, which may change it."""
    return byte_level_tokenizer()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tokenised data in the test's folder."""
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for the standard library: thirty modules of two functions and a class each."""
    (tmp_path / "library").mkdir()
    for name in range(30):
        code = "".join(f'def f{i}():\n    "Function {name} {i}."\n' for i in range(2))
        code += f'class A:\n    "Class {name}."\n'
        (tmp_path / "library" / f"m{name}.py").write_text(code)
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda _: str(tmp_path / "library"))
    return tmp_path / "library"


@pytest.fixture(scope="session")
def on_both() -> Iterator[Callable[..., list]]:
    """Runs a function on two ranks, which are the same two processes for all tests."""
    with ranks() as run:
        yield run


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Callable[..., list]]:
    """Runs a function on one rank, in a process of its own."""
    with ranks(world=1) as run:
        yield run


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Callable[..., list]]:
    """Runs a function on four ranks, which are the same four processes for all tests."""
    with ranks(world=4) as run:
        yield run
