"""Keep what lm-eval logs and prints off the terminal, and its processes off a GPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from lit_ft.terminal.libraries import own_bars_only

_ONE_PROCESS = "DISABLE_MULTIPROC"  # of lm-eval


@contextmanager
def quiet() -> Iterator[None]:
    """Let lm-eval log errors alone in this block, print nothing, and start no process."""
    from lm_eval.api import metrics

    logger = logging.getLogger("lm_eval")
    with ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.ERROR)
        # It announces each bootstrap. Standard output itself is the live line's, too.
        metrics.print = _nothing
        stack.callback(delattr, metrics, "print")
        # A process with a GPU must not fork those that lm-eval would compute errors with.
        stack.callback(_restore, os.environ.get(_ONE_PROCESS))
        os.environ[_ONE_PROCESS] = "1"
        stack.enter_context(own_bars_only())
        yield


def _restore(value: str | None) -> None:
    if value is None:
        os.environ.pop(_ONE_PROCESS, None)
    else:
        os.environ[_ONE_PROCESS] = value


def _nothing(*_: Any, **__: Any) -> None:
    pass
