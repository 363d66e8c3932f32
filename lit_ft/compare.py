"""Compare methods: `python -m lit_ft.compare -m optim=adamw,adamw_8bit seed=0,1,2`.

It takes the arguments of a sweep of train.py, and trains each method at a learning rate of its own:
with the first seed at the method's rate, at twice and at half of it, and further on if the best one
is at the edge. Optuna ends early what is worse than other rates after as many rows. The best rate
then trains with all seeds. `optim.lr=1e-4,3e-4` gives the rates to try. Finished runs are kept, so
the same command goes on where it was stopped, and trains nothing if all is there.

With folders in place of settings it trains nothing, and compares the runs in them and below them:
`python -m lit_ft.compare runs/sweep`.

It prints a table, and writes report.html, with pictures, report.md, report.csv and report.json.
Runs that differ only in the seed are one row, with the mean and the spread of their held-out loss.
Of runs that also differ in the learning rate, the row shows the best rate. Failed and damaged runs
are listed with their reason, and what the runs do not have in common is a warning.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

from lit_ft.comparison.cells import Cell
from lit_ft.comparison.comparison import compare
from lit_ft.comparison.files import write_report
from lit_ft.comparison.grid import Grid
from lit_ft.comparison.pictures import MISSING, can_draw
from lit_ft.comparison.request import request_of
from lit_ft.comparison.runs import gather
from lit_ft.comparison.side_by_side import shares_of
from lit_ft.comparison.text import terminal_table
from lit_ft.compat.refusal import message_on_command_line
from lit_ft.run.arguments import UNREADABLE, why_unreadable
from lit_ft.run.console import outlive_terminal, quieten_libraries
from lit_ft.run.loading import loading_libraries
from lit_ft.run.redaction import redacted_text
from lit_ft.run.verb_parser import parser_of_settings
from lit_ft.terminal import display, stage, use_live_line
from lit_ft.terminal.console import console, format_duration, printable


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, print the table of the runs, and write the report."""
    options = _parser().parse_intermixed_args(arguments)
    use_live_line()
    quieten_libraries()
    settings = [one for one in options.settings if _is_setting(one)]
    folders = [Path(one) for one in options.settings if not _is_setting(one)]
    settings = [*(f"--config={file}" for file in options.config), *settings]
    if not settings and not folders:
        sys.exit("Name what to compare: `optim=adamw,adamw_8bit`, or folders of runs: `runs/sweep`")
    try:
        output = options.output
        if settings:
            trained, own = _trained(settings, options.jobs)
            folders, output = [*trained, *folders], output or own
        runs, damaged = gather(folders)
        comparison = compare(runs, damaged)
        files = write_report(comparison, output or folders[0])
    except UNREADABLE as error:
        sys.exit(redacted_text(why_unreadable(error)))
    except (ValueError, OSError) as error:
        sys.exit(redacted_text(message_on_command_line(error)))
    except KeyboardInterrupt:
        _say("Stopped. The same command goes on with what is left.")
        sys.exit(128 + signal.SIGINT)
    if comparison.rows:
        console().print(terminal_table(comparison))
    for one in comparison.without:
        if one.run is None or not one.run.is_pruned:  # the table counts their rates
            _say(f"{one.folder}: {one.status}: {one.reason}")
    for warning in comparison.warnings:
        _say(f"Warning: {warning}")
    if not can_draw():
        _say(MISSING)
    for file in files:
        _say(str(file))
    if settings and not comparison.rows:  # a report on folders has done what it should
        sys.exit("No run has a result.")


def _is_setting(argument: str) -> bool:
    return ("=" in argument or argument.startswith("~")) and not Path(argument).exists()


def _trained(arguments: Sequence[str], jobs: int) -> tuple[list[Path], Path]:
    """Train what the arguments ask for; return the folders of the runs, and that of them all."""
    request = request_of(arguments)
    grid = request.grid
    if find_spec("optuna") is None:
        raise ValueError(
            "Optuna, which ends runs at a bad learning rate, is not installed: `pip install optuna`"
        )
    # Imported here, because to compare what is there takes no training.
    with loading_libraries():
        import torch

        from lit_ft.comparison.sweep import Sweep
        from lit_ft.run.settings import admit

        shown = _Shown(grid)
        sweep = Sweep(grid, request.folder, shown.train)
        for method in sweep.methods:
            admit(method.config, method.config, method.arguments)
    with stage("training"):
        sweep.run(shares_of(jobs, gpus=torch.cuda.device_count()))
    return [cell.folder for cell in sweep.cells], sweep.folder


class _Shown:
    """Trains runs, and shows which ones they are and what came of them.

    Args:
        grid: The grid of what is trained.
    """

    def __init__(self, grid: Grid) -> None:
        rates = len(grid.rates) or (3 if grid.tune else 1)
        self._about = len(grid.methods) * (rates + len(grid.seeds) - 1)
        self._begun = 0
        self._running: list[str] = []

    def train(
        self, cell: Cell, environment: Mapping[str, str], stopped: Event
    ) -> Mapping[str, Any]:
        """Train a run, and print its result."""
        self._begun += 1
        self._running.append(cell.name)
        self._show()
        began = time.monotonic()
        try:
            summary = cell.run(environment, stopped)
        finally:
            self._running.remove(cell.name)
            self._show()
        loss = summary.get("val_loss")
        result = summary["ended"] if loss is None else f"held-out loss {loss:.4f}"
        _say(f"{cell.name}: {result}  {format_duration(time.monotonic() - began)}")
        return summary

    def _show(self) -> None:
        begun, about = self._begun, max(self._begun, self._about)
        others = f" and {len(self._running) - 1} more" if len(self._running) > 1 else ""
        display().detail(f"run {begun} of about {about}: {''.join(self._running[-1:])}{others}")


def _say(text: str) -> None:
    console().print(printable(text), markup=False, highlight=False, soft_wrap=True)


def _jobs(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, and is {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of_settings(
        "python -m lit_ft.compare", __doc__, example="optim=adamw,sgd, or folders of runs"
    )
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="is accepted, as train.py needs it: a comparison is a sweep",
    )
    parser.add_argument(
        "--jobs",
        type=_jobs,
        default=1,
        metavar="N",
        help="runs that train at a time, each with a GPU or a part of the cores of its own (1)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="folder to write the report to (run_dir, or the first folder that is named)",
    )
    return parser


if __name__ == "__main__":
    outlive_terminal()
    main()
