"""The command line that every script has: its docstring as help, and where the results go."""

from __future__ import annotations

import argparse
from pathlib import Path

from support.results import RESULTS


def script_parser(docstring: str | None) -> argparse.ArgumentParser:
    """Return a parser that prints the script's docstring as it is and knows `--output`."""
    parser = argparse.ArgumentParser(
        description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="folder that the results are written to (default: benchmarks/results)",
    )
    return parser
