"""Pieces of text that no template renders, each learnt or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lit_ft.data.conversation import Segment
from lit_ft.data.formats import Row, unread_inside, unread_keys


@dataclass(frozen=True)
class Segments:
    """Rows `{segments: [{text, label}]}`; the argument names the column.

    Each text is tokenised by itself. Control tokens in it become tokens, and none are added. A text
    is learnt if its label is true. Source: axolotl's `input_output` format,
    https://docs.axolotl.ai/docs/dataset-formats/template_free.html.
    """

    segments: str = "segments"

    @property
    def wants(self) -> str:
        """The keys that this format reads, for error messages."""
        return f"{{{self.segments}: [{{text, label}}]}}"

    def matches(self, row: Row) -> bool:
        """Whether the row has segments."""
        return self.segments in row

    def parse(self, row: Row) -> list[Segment]:
        """Return the segments."""
        if self.segments not in row:
            raise ValueError(
                f"the field {self.segments!r} is missing; the row has {sorted(map(str, row))}"
            )
        pieces = row[self.segments]
        if not isinstance(pieces, list) or not pieces:
            raise ValueError(f"{self.segments!r} must be a list of {{text, label}}")
        return [self._segment(piece, place) for place, piece in enumerate(pieces)]

    def unread(self, row: Row) -> list[str]:
        """Return the keys of the row and its segments that have a value but are not read."""
        inside = unread_inside(row, self.segments, ("text", "label"))
        return [*unread_keys(row, (self.segments,)), *inside]

    def _segment(self, piece: object, place: int) -> Segment:
        if not (
            isinstance(piece, Mapping)
            and isinstance(piece.get("text"), str)
            and isinstance(piece.get("label"), bool)
        ):
            raise ValueError(
                f"{self.segments}[{place}] needs a string 'text' and a 'label' that is true or "
                f"false, found {piece!r:.60}"
            )
        return Segment(piece["text"], piece["label"])
