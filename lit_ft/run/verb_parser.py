"""The parts of the command line that the verbs share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def parser_of_settings(
    prog: str, description: str | None, *, example: str
) -> argparse.ArgumentParser:
    """Return a parser that reads `settings`, and files of settings as `config`.

    Args:
        prog: The command, such as "python -m lit_ft.plan".
        description: The text at the top of its help.
        example: The setting that its help shows as an example.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "settings", nargs="*", help=f"choices and settings of train.py, such as {example}"
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="take settings from a YAML file, as train.py does",
    )
    return parser


def whole_number(minimum: int) -> Callable[[str], int]:
    """Return a type of arguments, for argparse: whole numbers of at least `minimum`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if number < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}")
        return number

    return read
