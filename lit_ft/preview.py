"""Show data as a model sees it: `python -m lit_ft.preview data.path=my.jsonl`.

The preview takes the arguments of train.py. It shows rows with the chat template applied, and marks
the text that is learnt. Then it counts the rows, including those that are cut or left out, and
their tokens. It also shows the lengths of rows, the padding in a batch and the time of an epoch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.progress import track

from lit_ft.compat.refusal import message_on_command_line
from lit_ft.data.encoded import EncodedRow
from lit_ft.run.arguments import composed
from lit_ft.run.console import outlive_terminal, quieten_libraries
from lit_ft.run.preview import Preview, settings_of_data
from lit_ft.run.preview_page import Section, write_page
from lit_ft.run.preview_text import legend, row_and_reason, shown_row, shown_survey
from lit_ft.run.redaction import redacted_text
from lit_ft.run.settings import admit
from lit_ft.run.trust import refuse_untrusted, trusted_packages
from lit_ft.run.verb_parser import parser_of_settings, whole_number


def main(arguments: Sequence[str] | None = None) -> None:
    """Show rows and their counts in the terminal, and with `--html` on a page too."""
    options = _parser().parse_intermixed_args(arguments)
    quieten_libraries()
    try:
        files = [f"--config={file}" for file in options.config]
        config = composed([*files, *options.settings])
        # The class of the data is known, and the rest of what is built here imports little.
        parts = {"data": settings_of_data(config), "model": config["model"]}
        refuse_untrusted(parts, also=trusted_packages(config, options.settings))
        check = partial(admit, config, config, options.settings, parts=("data", "model"))
        try:
            _show(Preview(config), options, Path(config["run_dir"]).parent, check)
        except (TypeError, AttributeError, ArithmeticError):
            check()  # names the setting at fault, if it is one
            raise
    except (ValueError, OSError) as error:
        sys.exit(redacted_text(message_on_command_line(error)))


def _show(
    preview: Preview, options: argparse.Namespace, runs: Path, check: Callable[[], None]
) -> None:
    """Show each source; `check` looks at all settings once the first rows are there."""
    console = Console()
    console.print(legend(console))
    sections: list[Section] = []
    speed = None
    for source in preview.sources:
        name = source.source.name
        console.rule(name)
        if others := getattr(source.source, "others", ()):
            console.print(f"no files, and not read: {', '.join(others)}", markup=False)
        encoded = preview.rows(source)
        skipped = list(islice(encoded, options.skip))
        shown = list(islice(encoded, options.rows))
        if options.skip and not shown and options.rows:
            console.print(f"No rows to show: there are {len(skipped):,}, and all are skipped.")
        reasons: set[str] = set()
        for row in shown:
            if row.error:
                _, reason = row_and_reason(row.error)
                if reason in reasons:
                    continue  # the errors at the end count it
                reasons.add(reason)
            console.print(shown_row(console, preview, row, with_ids=options.ids))
        if not sections:
            # It imports what trains models, which the first rows should not wait for.
            check()
            speed = preview.last_speed(runs)
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
    """Read on up to `sample` rows. Return them, with those before, and whether they are all."""
    missing = None if sample is None else max(0, sample - len(before))
    more = track(
        islice(encoded, missing),
        "Encoding rows",
        total=missing,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    # Counts need no tokens, and the tokens of all rows might not fit into memory.
    rows = [row._replace(input_ids=[], labels=[], prompt="") for row in [*before, *more]]
    return rows, next(encoded, None) is None


def _number_or_all(text: str) -> int | None:
    return None if text == "all" else whole_number(0)(text)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of_settings("python -m lit_ft.preview", __doc__, example="data.path=my.jsonl")
    parser.add_argument(
        "--rows", type=whole_number(0), metavar="N", default=5, help="number of rows to show (5)"
    )
    parser.add_argument(
        "--skip",
        type=whole_number(0),
        metavar="N",
        default=0,
        help="number of rows to skip first (0)",
    )
    parser.add_argument(
        "--sample",
        type=_number_or_all,
        default=1000,
        metavar="N",
        help="number of rows to count, or `all` (1000)",
    )
    parser.add_argument("--ids", action="store_true", help="show token ids")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write an HTML page too")
    return parser


if __name__ == "__main__":
    outlive_terminal()
    main()
