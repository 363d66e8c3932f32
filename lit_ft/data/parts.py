"""Parts of a large source, which several processes encode at the same time.

Each process reads the source from its start, but encodes only the rows of its own part. Reading a
row takes about a tenth of the time of encoding it, so rows need not be sent between processes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from lit_ft.compat.cores import usable_cores
from lit_ft.data.rows import WHOLE, Part
from lit_ft.data.sources import Source

ROWS_PER_PROCESS = 2000
"""The number of rows for which a process saves more time than its start takes."""


def parts_of(source: Source) -> list[Part]:
    """Cut a source into one part for each process that should encode it.

    There is at most one part for each core. A source is not cut if its rows cannot be counted
    without reading them, or if processes cannot be forked safely. A process that is not forked
    would run the user's script again. A process that uses CUDA may be forked all the same, because
    encoding does not use CUDA.
    """
    rows = getattr(source, "num_rows", lambda: None)()
    may_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if rows is None or not may_fork:
        return [WHOLE]
    count = max(1, min(usable_cores(), rows // ROWS_PER_PROCESS))
    firsts = [rows * number // count for number in range(count)]
    return [Part(first, last) for first, last in zip(firsts, [*firsts[1:], None], strict=True)]


def work_on(parts: list[Part], work: Callable[[Part], Iterator[int]]) -> Iterator[int]:
    """Work on parts, in a process of its own for each if there are several.

    Args:
        parts: The parts to work on.
        work: The function that works on a part, and yields the numbers of rows that it has done.

    Yields:
        The numbers of rows that are done, from any of the parts.

    Raises:
        Exception: The first error that a process raises. The other processes are stopped.
    """
    if len(parts) == 1:
        yield from work(parts[0])
        return
    processes: dict[Any, Any] = {}
    try:
        with _one_thread_each():
            for part in parts:
                pipe, process = _start(work, part)
                processes[pipe] = process
        running = set(processes)
        while running:
            for pipe in wait(running):
                received = _received(pipe, processes[pipe])
                if isinstance(received, Exception):
                    raise received
                if received is None:
                    running.remove(pipe)
                else:
                    yield received
    finally:
        for process in processes.values():
            process.terminate()
        for pipe, process in processes.items():
            process.join()
            pipe.close()


def _start(work: Callable[[Part], Iterator[int]], part: Part) -> tuple[Any, Any]:
    """Start a process that works on a part, and return the pipe to it and the process."""
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(work, part, theirs), daemon=True)
    try:
        with theirs:  # while it is open here, the pipe does not end with the process
            process.start()
    except OSError:  # the user may have no more processes, or the machine no more memory
        ours.close()
        raise
    return ours, process


def _received(pipe: Any, process: Any) -> int | Exception | None:
    """Return what a process sends: a number of rows, its error, or None at its end."""
    try:
        received: int | Exception | None = pipe.recv()
    except EOFError:
        process.join()
        return RuntimeError(
            f"A process that encoded a part of the data ended with status {process.exitcode}. "
            "The machine may have too little memory."
        )
    return received


def _send(work: Callable[[Part], Iterator[int]], part: Part, pipe: Connection) -> None:
    """Work on a part in a process of its own, and send the numbers of rows, or the error."""
    _leave_signals_to_parent()
    parent = multiprocessing.parent_process()
    assert parent is not None
    try:
        for count in work(part):
            if os.getppid() != parent.pid:
                return  # the parent was killed
            pipe.send(count)
        pipe.send(None)
    except Exception as error:
        pipe.send(_portable(error))


def _leave_signals_to_parent() -> None:
    """Reset the parent's handlers, which save checkpoints and queue a job again.

    Signals may come to all processes of a job. A warning, after which the parent goes on, must not
    end this process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which the parent ends this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number, action in (
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGUSR1, signal.SIG_IGN),
        (signal.SIGUSR2, signal.SIG_IGN),
    ):
        if callable(signal.getsignal(number)):  # nohup's choice, to ignore SIGHUP, stays
            signal.signal(number, action)


def _portable(error: Exception) -> Exception:
    """Return an error, or its text if a copy of the error cannot be made in another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let the tokenizers of processes that are started here use one thread."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
