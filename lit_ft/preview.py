"""Look at data as a model will see it: `python -m lit_ft.preview data.path=my.jsonl`.

The arguments are those of train.py. Each row is shown with the chat template applied and with what
is learnt marked, then the rows are counted: what is cut or left out and why, how long they are, how
full the batches would be, and how long an epoch would take.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import track

from lit_ft.compat.refusal import message_on_command_line
from lit_ft.data.encoded import EncodedRow
from lit_ft.run.arguments import composed
from lit_ft.run.console import quieten_libraries
from lit_ft.run.preview import Preview
from lit_ft.run.preview_page import Section, write_page
from lit_ft.run.preview_text import legend, shown_row, shown_survey
from lit_ft.run.settings import admit


def main(arguments: Sequence[str] | None = None) -> None:
    """Show the rows, then their counts; with `--html`, as a page too."""
    options = _parser().parse_intermixed_args(arguments)
    quieten_libraries()
    try:
        config = composed(options.settings)
        admit(config, config, parts=("data", "model"))
        _show(Preview(config), options, Path(config["run_dir"]).parent)
    except ValueError as error:
        sys.exit(message_on_command_line(error))


def _show(preview: Preview, options: argparse.Namespace, runs: Path) -> None:
    console = Console()
    console.print(legend(console))
    speed = preview.last_speed(runs)
    sections = []
    for source in preview.sources:
        name = source.source.name
        console.rule(name)
        encoded = preview.rows(source)
        skipped = list(islice(encoded, options.skip))
        shown = list(islice(encoded, options.rows))
        for row in shown:
            console.print(shown_row(console, preview, row, with_ids=options.ids))
        read, is_whole = _counted(encoded, options.sample, [*skipped, *shown])
        survey = preview.survey(source, read, is_whole=is_whole)
        for part in shown_survey(preview, survey, speed):
            console.print(part)
        sections.append(Section(name, shown, survey))
    if options.html is not None:
        write_page(options.html, preview, sections, speed)
        console.print(f"\n{options.html}", soft_wrap=True)


def _counted(
    encoded: Iterator[EncodedRow], sample: int | None, before: list[EncodedRow]
) -> tuple[list[EncodedRow], bool]:
    """Read more rows, up to `sample` of them with those before, and say whether these are all."""
    missing = None if sample is None else max(0, sample - len(before))
    more = track(
        islice(encoded, missing),
        "Encoding rows",
        total=missing,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    # Counts need no tokens, and those of all rows might not fit into memory.
    rows = [row._replace(input_ids=[], labels=[], prompt="") for row in [*before, *more]]
    return rows, next(encoded, None) is None


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lit_ft.preview",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "settings", nargs="*", help="choices and settings of train.py, such as data.path=my.jsonl"
    )
    parser.add_argument("--rows", type=int, default=5, help="rows to show of each source (5)")
    parser.add_argument("--skip", type=int, default=0, help="rows to skip before those shown (0)")
    parser.add_argument(
        "--sample",
        type=_number_or_all,
        default=1000,
        metavar="N",
        help="rows to count, or `all` (1000)",
    )
    parser.add_argument("--ids", action="store_true", help="show the ids of the tokens")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page too")
    return parser


if __name__ == "__main__":
    main()
