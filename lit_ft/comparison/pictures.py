"""The pictures of the report, each an SVG that needs no script and no network.

Colours are placeholders of the page, which has others for a dark screen.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lit_ft.comparison.columns import size
from lit_ft.comparison.comparison import Comparison, Row
from lit_ft.comparison.curves import mean_curve
from lit_ft.comparison.label_places import Box, Place, label_places
from lit_ft.comparison.runs import as_number

if TYPE_CHECKING:
    import altair as alt

# The colours of Paul Tol's "bright" scheme, which the colour-blind can tell apart. The first is of
# the best row or the lowest part of a bar, and so on.
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#777777")
DASHES = ((), (7, 3), (2, 2), (9, 3, 2, 3), (5, 2), (12, 3), (2, 4))
MOST_CURVES = len(COLOURS)
"""The largest number of rows whose curves are drawn: more could not be told apart."""

MISSING = (
    "The report has no pictures, because altair or vl-convert-python is not installed: "
    "pip install altair vl-convert-python"
)

_WIDTH, _HEIGHT = 370, 240  # of what the axes enclose, in pixels: a phone shows nearly all of it
_FONT, _LETTER = 13, 7.5  # the size of a text, and the width of a character, in pixels
_RADIUS = 5.0
_CATEGORIES = ("weights", "optimizer", "subspace", "gradients", "activations", "temporaries")
_WORDS = {"optimizer": "optimizer state", "subspace": "subspaces"}


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Attributes:
        title: The title.
        caption: What it shows, in one or two sentences.
        svg: The drawing; None if no run has what it would show.
        legend: The colour, the dashes and the meaning of each kind of mark.
        has_areas: Whether the marks are areas; lines and points need a higher contrast.
    """

    title: str
    caption: str
    svg: str | None
    legend: Sequence[tuple[str, Sequence[int], str]] = ()
    has_areas: bool = False


def can_draw() -> bool:
    """Whether the libraries are there that draw the pictures."""
    return all(find_spec(name) is not None for name in ("altair", "vl_convert"))


def pictures(comparison: Comparison) -> list[Picture]:
    """Return the pictures of a comparison. The libraries that draw them are imported here."""
    return [
        _curves(comparison, "tokens", "Loss by tokens", "tokens"),
        _curves(comparison, "seconds", "Loss by time", "seconds of training"),
        _front(comparison),
        _memory(comparison),
    ]


def _curves(comparison: Comparison, x: str, title: str, axis: str) -> Picture:
    import altair as alt

    rows = comparison.rows[:MOST_CURVES]
    values: dict[str, list[dict[str, Any]]] = {"val": [], "train": []}
    for row in rows:
        for name, points in values.items():
            curves = [run.curve(name) for run in row.trial.runs]
            for at, loss in mean_curve(curves, f"{name}_loss", x):
                points.append({"x": at, "loss": loss, "row": row.number})
    if not any(values.values()):
        return Picture(title, "The runs have no history of their losses.", None)
    of_row = {
        "color": alt.Color("row:O", scale=_scale(rows, COLOURS), legend=None),
        "strokeDash": alt.StrokeDash("row:O", scale=_scale(rows, DASHES), legend=None),
    }
    place = {
        "x": alt.X("x:Q", title=axis, axis=alt.Axis(tickCount=5, format="~s", labelFlush=False)),
        "y": alt.Y("loss:Q", title="loss", scale=alt.Scale(zero=False)),
        "detail": "row:O",
    }
    val, train = (_chart(points) for points in values.values())
    chart = alt.layer(
        train.mark_line(opacity=0.35, strokeWidth=1).encode(**place, **of_row),
        val.mark_line(strokeWidth=2).encode(**place, **of_row),
        val.mark_point(size=25, filled=True, opacity=1).encode(**place, color=of_row["color"]),
    )
    caption = "Bold with points: held-out loss. Thin: loss of the training steps. Means over seeds."
    if len(comparison.rows) > len(rows):
        caption += f" The {len(rows)} rows with the lowest loss are drawn."
    if x != "tokens":
        return Picture(title, f"{caption} The lines are those by tokens.", _svg(chart, title))
    legend = [
        (colour, dashes, f"{row.number}: {row.name}")
        for row, colour, dashes in zip(rows, COLOURS, DASHES, strict=False)
    ]
    return Picture(title, caption, _svg(chart, title), legend)


def _scale(rows: Sequence[Row], values: Sequence[Any]) -> alt.Scale:
    import altair as alt

    own = [list(one) if isinstance(one, tuple) else one for one in values[: len(rows)]]
    return alt.Scale(domain=[row.number for row in rows], range=own)


def _front(comparison: Comparison) -> Picture:
    import altair as alt

    title = "Peak memory against loss"
    found: list[dict[str, Any]] = [
        {
            "peak": peak / 2**30,
            "loss": row.trial.loss.mean,
            "row": str(row.number),
            "front": row.is_on_front,
        }
        for row in comparison.rows
        if (peak := row.trial.highest("peak_bytes", "value")) is not None
    ]
    if not found:
        return Picture(title, "The runs have no measured peak of memory.", None)
    domains = {name: _domain([one[name] for one in found]) for name in ("peak", "loss")}
    for one, place in zip(found, _places(found, domains), strict=True):
        one |= {"label_x": None, "label_y": None} if place is None else place
    scales = {
        name: alt.Scale(domain=list(domain), nice=False, zero=False)
        for name, domain in domains.items()
    }
    x = alt.X("peak:Q", title="peak memory, GiB", scale=scales["peak"], axis=alt.Axis(tickCount=5))
    y = alt.Y("loss:Q", title="held-out loss", scale=scales["loss"])
    base = _chart(found)
    front = base.transform_filter("datum.front")
    chart = alt.layer(
        front.mark_line(interpolate="step-after", color=COLOURS[0], strokeDash=[4, 3]).encode(x, y),
        base.transform_filter("!datum.front")
        .mark_point(size=60, filled=True, opacity=1, color=COLOURS[-1])
        .encode(x, y),
        front.mark_point(
            size=120, filled=True, opacity=1, color=COLOURS[0], shape="diamond"
        ).encode(x, y),
        base.transform_filter("isValid(datum.label_x)")
        .mark_text(fontSize=_FONT)
        .encode(
            alt.X("label_x:Q", scale=scales["peak"]),
            alt.Y("label_y:Q", scale=scales["loss"]),
            text="row:N",
        ),
    )
    caption = (
        "Lower and further left is better. The numbers are those of the rows. Diamonds are on the "
        "front: no row has less loss without more memory."
    )
    return Picture(title, caption, _svg(chart, title))


def _domain(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis, with room around the values."""
    low, high = min(values), max(values)
    room = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def _places(
    found: Sequence[dict[str, Any]], domains: dict[str, tuple[float, float]]
) -> list[dict[str, float] | None]:
    """Return for each point the place of its label, in the units of the axes."""
    (left, right), (bottom, top) = domains["peak"], domains["loss"]
    across, down = (right - left) / _WIDTH, (top - bottom) / _HEIGHT
    points = [((one["peak"] - left) / across, (top - one["loss"]) / down) for one in found]
    widths = [_LETTER * len(one["row"]) for one in found]
    front = sorted(at for at, one in zip(points, found, strict=True) if one["front"])
    placed = label_places(
        points,
        widths,
        size=(_WIDTH, _HEIGHT),
        height=_FONT + 2,
        radius=_RADIUS,
        taken=list(_steps_between(front)),
    )
    return [
        None if one is None else {"label_x": left + one[0] * across, "label_y": top - one[1] * down}
        for one in placed
    ]


def _steps_between(points: Sequence[Place]) -> Iterator[Box]:
    """Yield the lines of the front: from each point to the right, then down to the next one."""
    for (left, top), (right, bottom) in pairwise(points):
        yield left, top - 1, right, top + 1
        yield right - 1, top, right + 1, bottom


def _memory(comparison: Comparison) -> Picture:
    import altair as alt

    title = "Planned memory by use"
    found = []
    for row in comparison.rows:
        planned = row.trial.runs[0].get("planned_peak_bytes", "by_category")
        for use, nbytes in planned.items() if isinstance(planned, dict) else ():
            if (value := as_number(nbytes)) is not None and use in _CATEGORIES:
                order = _CATEGORIES.index(use)
                found.append({"row": row.number, "use": use, "order": order, "x": value / 2**30})
    if not found:
        return Picture(title, "The memory of the runs was not planned; a sweep plans none.", None)
    colours = alt.Scale(domain=list(_CATEGORIES), range=list(COLOURS[: len(_CATEGORIES)]))
    chart = (
        _chart(found)
        .mark_bar()
        .encode(
            alt.X("x:Q", title="planned peak, GiB", axis=alt.Axis(tickCount=5)),
            alt.Y("row:O", title="row"),
            alt.Color("use:N", scale=colours, legend=None),
            alt.Order("order:Q"),
        )
    )
    used = {one["use"] for one in found}
    legend = [
        (colour, (), _WORDS.get(use, use))
        for use, colour in zip(_CATEGORIES, COLOURS, strict=False)
        if use in used
    ]
    highest = size(
        max(row.trial.highest("planned_peak_bytes", "value") or 0 for row in comparison.rows)
    )
    caption = f"What the memory is used for at the planned peak, at most {highest}."
    return Picture(title, caption, _svg(chart, title), legend, has_areas=True)


def _chart(values: Sequence[Mapping[str, Any]]) -> alt.Chart:
    import altair as alt

    return alt.Chart(alt.InlineData(values=list(values)))


def _svg(chart: alt.TopLevelMixin, title: str) -> str:
    """Return a drawing of fixed width, whose texts have the colour and the font of the page."""
    done = (
        chart.properties(width=_WIDTH, height=_HEIGHT)
        .configure(background="transparent", font="system-ui, sans-serif")
        .configure_view(stroke=None)
        .configure_axis(
            labelFontSize=_FONT, titleFontSize=_FONT, titleFontWeight="normal", offset=6
        )
    )
    text = io.StringIO()
    done.save(text, format="svg")
    # It is one picture to a screen reader: the table has the figures.
    drawing = re.sub(r' (aria-[\w-]+|role)="[^"]*"', "", text.getvalue())
    return drawing.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
