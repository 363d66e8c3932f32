"""Train several runs at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any, TypeVar

from lit_ft.comparison.cells import Cell

T = TypeVar("T")

Train = Callable[[Cell, Mapping[str, str], Event], Mapping[str, Any]]
"""Trains a run with variables to set in the environment, until it ends or the event is set."""


class Workers:
    """Trains runs, each with a share of the machine.

    Args:
        train: The function that trains a run and returns its summary.
        shares: The variables to set for each of the runs at a time; see `side_by_side.shares_of`.
    """

    def __init__(self, train: Train, shares: Sequence[Mapping[str, str]] = ({},)) -> None:
        self._train = train
        self._number = len(shares)
        self._stopped = Event()
        self._guard = Lock()
        self._of_folder: dict[Path, Lock] = {}
        self._shares: SimpleQueue[Mapping[str, str]] = SimpleQueue()
        for share in shares:
            self._shares.put(share)

    def summary(self, cell: Cell, environment: Mapping[str, str]) -> Mapping[str, Any]:
        """Return the summary of a run, which is trained unless it has finished.

        Args:
            cell: The run.
            environment: The variables to set in addition to those of the share.
        """
        with self._guard:
            of_folder = self._of_folder.setdefault(cell.folder, Lock())
        with of_folder:  # one that is asked for twice trains once
            if (found := cell.finished()) is not None:
                return found
            share = self._shares.get()
            try:
                return self._train(cell, {**share, **environment}, self._stopped)
            finally:
                self._shares.put(share)

    def each(self, work: Callable[[T], None], things: Iterable[T]) -> None:
        """Call a function with each thing, as many at a time as there are shares.

        An error ends the runs that are under way.
        """

        def unless_stopped(thing: T) -> None:
            if not self._stopped.is_set():
                try:
                    work(thing)
                except BaseException:
                    self._stopped.set()
                    raise

        with ThreadPoolExecutor(self._number) as pool:
            running = [pool.submit(unless_stopped, thing) for thing in things]
            try:
                for done in as_completed(running):
                    done.result()
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
