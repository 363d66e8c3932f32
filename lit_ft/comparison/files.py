"""Write the report: a page, Markdown, a table for spreadsheets and plain values for programs."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lit_ft.comparison.comparison import Comparison
from lit_ft.comparison.figures import lines, plain
from lit_ft.comparison.page import page
from lit_ft.comparison.pictures import MISSING, can_draw, pictures
from lit_ft.comparison.text import markdown
from lit_ft.storage.atomic import write_text
from lit_ft.storage.json_file import write_json

NAME = "report"


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write the files of a report to a folder, and return them.

    Without the libraries that draw, the page has no pictures, and says so.

    Args:
        comparison: What the report says.
        folder: The folder, created if it is missing.

    Raises:
        OSError: If a file cannot be written.
    """
    files = [folder / f"{NAME}.{ending}" for ending in ("html", "md", "csv", "json")]
    html, md, table, values = files
    draws = can_draw()
    drawn = pictures(comparison) if draws and comparison.rows else []
    write_text(html, page(comparison, drawn, [] if draws else [MISSING]))
    write_text(md, markdown(comparison))
    write_text(table, _csv(lines(comparison)))
    write_json(values, plain(comparison), indent=2)
    return files


def _csv(found: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for line in found for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()
