from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.support.ranks import ranks


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
