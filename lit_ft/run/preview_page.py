"""Write a preview as a page: one file that opens without a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment

from lit_ft.data.encoded import EncodedRow
from lit_ft.data.survey import Survey
from lit_ft.data.token_text import pieces
from lit_ft.run.preview import Preview, Speed
from lit_ft.run.preview_facts import facts, fate, remarks


@dataclass(frozen=True)
class Section:
    """The part of a page that shows one source.

    Args:
        name: The name that the user gave the source.
        rows: The encoded rows to show.
        survey: The counts of the source's rows.
    """

    name: str
    rows: Sequence[EncodedRow]
    survey: Survey


def write_page(
    file: Path, preview: Preview, sections: Sequence[Section], speed: Speed | None
) -> None:
    """Write a page with rows, counts and histograms.

    Args:
        file: The HTML file to write, whose folder is created if it is missing.
        preview: The data that is shown, with its tokenizer.
        sections: The sections of the page, one for each source.
        speed: The measured speed of an earlier run; None if no run has measured one.
    """
    max_length = preview.encoder.max_length
    template = (files("lit_ft.run") / "preview.html.jinja").read_text(encoding="utf-8")
    shown = [
        {
            "name": section.name,
            "facts": list(facts(preview, section.survey, speed)),
            "bars": section.survey.histogram(max_length),
            "remarks": remarks(section.survey),
            "errors": section.survey.report.errors[:100],
            "rows": [
                {
                    "origin": row.origin,
                    "fate": fate(row, max_length),
                    "pieces": list(pieces(preview.tokenizer, row.input_ids, row.labels)),
                    "notes": row.notes,
                    "error": row.error,
                }
                for row in section.rows
            ],
        }
        for section in sections
    ]
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = page.from_string(template).render(sections=shown, max_length=max_length)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
