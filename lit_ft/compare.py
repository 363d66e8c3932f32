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
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lit_ft.comparison.comparison import compare
from lit_ft.comparison.files import write_report
from lit_ft.comparison.request import request_of
from lit_ft.comparison.runs import gather
from lit_ft.comparison.shown import ShownRuns, show
from lit_ft.comparison.side_by_side import shares_of
from lit_ft.comparison.verb import alone_in, errors_end_the_verb, parser_of_runs
from lit_ft.run.arguments import path_exists
from lit_ft.run.console import outlive_terminal, quieten_libraries
from lit_ft.run.loading import loading_libraries
from lit_ft.terminal import stage, use_live_line


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
    with errors_end_the_verb():
        output = options.output
        if settings:
            trained, own = _trained(settings, options.jobs)
            folders, output = [*trained, *folders], output or own
        comparison = compare(*gather(folders))
        files = write_report(comparison, output or folders[0])
    show(comparison, files)
    if settings and not comparison.rows:  # a report on folders has done what it should
        sys.exit("No run has a result.")


def _is_setting(argument: str) -> bool:
    return ("=" in argument or argument.startswith("~")) and not path_exists(argument)


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
        from lit_ft.comparison.workers import Workers
        from lit_ft.run.settings import admit

        sweep = Sweep(grid, request.folder)
        for method in sweep.methods:
            admit(method.config, method.config, method.arguments)
    rates = len(grid.rates) or (3 if grid.tune else 1)
    shown = ShownRuns(about=len(grid.methods) * (rates + len(grid.seeds) - 1))
    with alone_in(request.folder), stage("training"):
        sweep.run(Workers(shown.train, shares_of(jobs, gpus=torch.cuda.device_count())))
    return [cell.folder for cell in sweep.cells], sweep.folder


def _parser() -> argparse.ArgumentParser:
    parser = parser_of_runs(
        "python -m lit_ft.compare", __doc__, example="optim=adamw,sgd, or folders of runs"
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
