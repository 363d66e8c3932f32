"""One line at the bottom of the terminal that shows what is being done."""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from lit_ft.terminal.console import console, format_duration
from lit_ft.terminal.display import Display
from lit_ft.terminal.held_signals import held_signals


@dataclass
class _Stage:
    name: str
    detail: str = ""
    began: float = field(default_factory=time.monotonic)

    def facts(self) -> list[str]:
        seconds = time.monotonic() - self.began
        return [fact for fact in (self.name, self.detail, format_duration(seconds)) if fact]


class LiveLine(Display):
    """Shows one line that changes; whatever the process prints meanwhile appears above it.

    The line is never longer than the terminal is wide, and is gone when there is nothing to show.
    """

    def __init__(self) -> None:
        self._stages: list[_Stage] = []
        self._facts: Sequence[str] = ()
        self._spinner = Spinner("line" if console().options.ascii_only else "dots")
        self._live: Live | None = None
        atexit.register(self.close)
        # At a fork, the thread that refreshes the line may hold the lock of standard output, which
        # nobody would release in the child.
        os.register_at_fork(
            before=self.close, after_in_parent=self._update, after_in_child=self._leave_to_parent
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show in this block what is being done, and for how long."""
        one = _Stage(name)
        try:
            self._stages.append(one)
            self._update()
            yield
        finally:
            self._stages = [other for other in self._stages if other is not one]
            self._update()

    def detail(self, text: str) -> None:
        """Show how far the innermost stage is."""
        if self._stages:
            self._stages[-1].detail = text

    def progress(self, facts: Sequence[str]) -> None:
        """Show facts while there is no stage."""
        self._facts = facts
        self._update()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Render the line, on the thread that refreshes it."""
        stages = self._stages[-1:]
        facts = stages[0].facts() if stages else self._facts
        spinner = self._spinner.render(console.get_time())
        assert isinstance(spinner, Text)
        separator = " | " if options.ascii_only else " · "
        yield one_line(spinner, facts, separator, options.max_width)

    def _update(self) -> None:
        """Show the line if there is something to show; the refreshing thread does the rest."""
        if not (self._stages or self._facts):
            self.close()
        elif self._live is None:
            self._live = Live(
                self,
                console=console(),
                refresh_per_second=8,
                transient=True,
                redirect_stderr=sys.stderr.isatty(),
            )
            with held_signals():
                self._live.start()

    def close(self) -> None:
        """Remove the line, and show the cursor again."""
        with held_signals():
            live, self._live = self._live, None
            if live is not None:
                live.stop()

    def _leave_to_parent(self) -> None:
        """Forget what is shown: that is what the parent does."""
        self._stages, self._facts = [], ()


def one_line(start: Text, facts: Sequence[str], separator: str, width: int) -> Text:
    """Return as many facts as fit into one line, from the first on; a first one may be cut.

    Args:
        start: What stands before the facts.
        facts: The facts, the most important one first.
        separator: What stands between two facts.
        width: The largest number of columns.
    """
    line = Text.assemble(start, " ", no_wrap=True, overflow="ellipsis")
    for index, fact in enumerate(facts):
        longer = line.copy().append(separator, "dim") if index else line.copy()
        longer.append(" ".join(fact.split()), "" if index else "bold")
        if index and longer.cell_len > width:
            break
        line = longer
    return line
