"""Fixtures of more than one room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.support.tiers import mark_tier, unit_tier

# xdist's controller reads this file too: what takes seconds to import, fixtures import.
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# No test is timed: another program may have the cores.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its tier before `-m` chooses among them."""
    for item in items:
        mark_tier(item)


@pytest.fixture(autouse=True)
def tier(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hold a unit test to what it may do."""
    if request.node.get_closest_marker("unit") is None:
        yield
    else:
        with unit_tier():
            yield


@pytest.fixture(autouse=True, scope="session")
def _console() -> None:
    """Make the console, which a process makes once, before a test pretends to be a terminal."""
    from lit_ft.terminal.console import console

    console()


@pytest.fixture
def signals_as_usual() -> Iterator[None]:
    """Let signals end this process and those that it starts, under nohup and in the background too.

    What a shell has chosen to ignore would be ignored by all of them.
    """
    import signal

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    earlier = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in earlier.items():
        signal.signal(number, handler)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of its own for each test, which may change it."""
    from tests.support.tokenizer import byte_level_tokenizer

    return byte_level_tokenizer()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tokenised data in the test's folder."""
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for the standard library: thirty modules of two functions and a class each."""
    from lit_ft.data import docstrings

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
    from tests.support.ranks import ranks

    with ranks() as run:
        yield run


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Callable[..., list]]:
    """Runs a function on one rank, in a process of its own."""
    from tests.support.ranks import ranks

    with ranks(world=1) as run:
        yield run


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Callable[..., list]]:
    """Runs a function on four ranks, which are the same four processes for all tests."""
    from tests.support.ranks import ranks

    with ranks(world=4) as run:
        yield run


@pytest.fixture(scope="session")
def model_with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small pretrained model with dropout."""
    from tests.support.jobs import write_model_with_dropout

    return write_model_with_dropout(tmp_path_factory.mktemp("models") / "dropout")


@pytest.fixture(scope="session")
def thirteen_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of seven micro-batches of two, the last one short."""
    from tests.support.jobs import write_thirteen_rows

    return write_thirteen_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture
def job(model_with_dropout: Path, thirteen_rows: Path, tmp_path: Path) -> Callable[..., dict]:
    """Runs a short job in a folder of the given name, with these overrides."""
    from tests.support.jobs import run_on_thirteen_rows

    def run(name: str, *overrides: str) -> dict:
        return run_on_thirteen_rows(tmp_path / name, model_with_dropout, thirteen_rows, *overrides)

    return run
