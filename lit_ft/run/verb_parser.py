"""The part of the command line that the verbs share which take the arguments of train.py."""

from __future__ import annotations

import argparse
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
