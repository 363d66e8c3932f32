"""Search for the best settings: `python -m lit_ft.search galore.rank=64,128 --trials 12`.

It takes the arguments of a sweep of train.py, and trains one run after another, each with values
that Optuna draws, looking at what the earlier runs have shown (TPE). A setting has several values,
`galore.rank=64,128`, or a range, `optim.lr=tag(log,interval(1e-5,1e-3))`. `hparams_search=galore`
takes them from conf/hparams_search. Runs that are worse than others after as many rows end early,
and a run whose loss is not finite is a failed trial.

The study is kept in run_dir (runs/search), so the same command goes on where it was stopped, and a
larger number of trials adds to it. It prints the best trial and its command, and writes the report
of `python -m lit_ft.compare` on all trials.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lit_ft.comparison.comparison import compare
from lit_ft.comparison.files import write_report
from lit_ft.comparison.runs import gather
from lit_ft.comparison.shown import ShownRuns, say, show
from lit_ft.comparison.side_by_side import shares_of
from lit_ft.comparison.verb import (
    alone_in,
    errors_end_the_verb,
    parser_of_runs,
    settings_and_folder,
)
from lit_ft.run.console import outlive_terminal, quieten_libraries
from lit_ft.run.loading import loading_libraries
from lit_ft.run.verb_parser import whole_number
from lit_ft.terminal import stage, use_live_line

_FOLDER = Path("runs/search")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the trials that are left, print the best one, and write the report."""
    options = _parser().parse_intermixed_args(arguments)
    use_live_line()
    quieten_libraries()
    settings = [*(f"--config={file}" for file in options.config), *options.settings]
    with errors_end_the_verb():
        folder, best = _searched(settings, options)
        comparison = compare(*gather([folder]))
        show(comparison, write_report(comparison, folder))
    if best is None:
        sys.exit("No trial has a result.")
    say(best)


def _searched(arguments: Sequence[str], options: argparse.Namespace) -> tuple[Path, str | None]:
    """Train what is left; return the folder, and what to say of the best trial, if there is one."""
    typed, folder = settings_and_folder(arguments, _FOLDER)
    if find_spec("optuna") is None:
        raise ValueError("Optuna, which searches, is not installed: `pip install optuna`")
    with loading_libraries():
        import torch

        from lit_ft.comparison.search import Search
        from lit_ft.comparison.space import settings_of, space_of
        from lit_ft.comparison.workers import Workers
        from lit_ft.run.settings import admit

        space = space_of(typed)
        for method in space.methods:
            admit(method.config, method.config, method.arguments)
    shown = ShownRuns(about=options.trials)
    with alone_in(folder):
        search = Search(space, folder, seed=options.sampler_seed)
        workers = Workers(shown.train, shares_of(options.jobs, gpus=torch.cuda.device_count()))
        with stage("searching"):
            search.run(options.trials, workers)
        best = search.best()
    if best is None:
        return folder, None
    command = shlex.join(["python", "train.py", *space.fixed, *settings_of(best.params)])
    return folder, f"Best: trial {best.number}, held-out loss {best.value:.4f}\n  {command}"


def _parser() -> argparse.ArgumentParser:
    parser = parser_of_runs(
        "python -m lit_ft.search", __doc__, example="optim.lr=1e-4,3e-4 or hparams_search=galore"
    )
    parser.add_argument(
        "--trials",
        type=whole_number(1),
        default=20,
        metavar="N",
        help="trials in all, counting those in the folder (20)",
    )
    parser.add_argument(
        "--sampler-seed",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="seed of what Optuna draws; the runs have that of `seed=` (0)",
    )
    return parser


if __name__ == "__main__":
    outlive_terminal()
    main()
