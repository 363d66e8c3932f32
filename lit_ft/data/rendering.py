"""Bound what a chat template may cost: its time, and its memory.

transformers renders templates in Jinja's sandbox, which keeps them from everything but the chat.
The sandbox bounds neither the number of loops inside loops nor the size of a text. A template comes
with a model, so it may be anyone's.
"""

from __future__ import annotations

import mmap
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

SECONDS = 5.0
"""The time that the process may compute during a rendering. Chats of training take milliseconds."""

BYTES = 1 << 30
"""The memory that the process may add during a rendering."""

_SIZES = "/proc/self/statm"  # on Linux
_SHOWN = 60  # characters of a template in a message


class CostlyTemplate(Refusal):
    """The error for a chat template that takes too long, or too much memory, to render a chat."""


class _TimeIsUp(BaseException):
    """No `Exception`, because Jinja and its filters catch those."""


@contextmanager
def bounded_rendering(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Bound the rendering of a chat in the block.

    The bounds hold for all threads of the process together, because the system knows no others. So
    only the main thread sets them: two threads would restore each other's. The time is bounded on
    Linux and macOS, and the memory on Linux.

    Args:
        tokenizer: The tokenizer whose chat template renders, for the message.

    Raises:
        CostlyTemplate: If the rendering goes beyond `SECONDS` or `BYTES`, or never ends to call
            itself.
        TemplateError: If an expression of the template fails.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        with _bounded_memory(), _bounded_time():
            yield
    except (_TimeIsUp, MemoryError, RecursionError) as error:
        bound = f"{SECONDS:g} seconds"
        if isinstance(error, MemoryError):
            bound = f"{BYTES >> 20} MiB"
        elif isinstance(error, RecursionError):
            bound = f"{sys.getrecursionlimit()} calls inside each other"
        raise CostlyTemplate(
            f"The chat template that begins {str(tokenizer.chat_template)[:_SHOWN]!r}, of "
            f"{tokenizer.name_or_path or 'a tokenizer'} or given for it, takes more than {bound} "
            "to render a chat",
            remedies.OTHER_TEMPLATE,
            remedies.PLAIN_TEMPLATE,
        ) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        # Of the template's own expressions, such as a division by 0.
        said = f"{type(error).__name__}: {error}"
        raise TemplateError(f"The chat template cannot render this chat ({said}).") from error


@contextmanager
def _bounded_time() -> Iterator[None]:
    if not hasattr(signal, "setitimer"):  # on Windows
        yield
        return
    # The timer counts time of computation, so a process that is suspended does not run out of it.
    due, interval = signal.setitimer(signal.ITIMER_VIRTUAL, 0)  # a profiler of the caller's
    handler = signal.signal(signal.SIGVTALRM, _end)
    left = SECONDS
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            yield
        finally:
            left, _ = signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        signal.signal(signal.SIGVTALRM, handler)
        if due:
            signal.setitimer(signal.ITIMER_VIRTUAL, max(due - (SECONDS - left), 1e-6), interval)


def _end(_: int, __: FrameType | None) -> Any:
    raise _TimeIsUp


@contextmanager
def _bounded_memory() -> Iterator[None]:
    try:
        with open(_SIZES, "rb", buffering=0) as file:  # a rendering takes less than a millisecond
            most = int(file.read().split()[0]) * mmap.PAGESIZE + BYTES
    except FileNotFoundError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        most = min(most, soft)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
