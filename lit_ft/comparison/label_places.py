"""Places for the labels of points, where none covers another one or a point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Place = tuple[float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom


def label_places(
    points: Sequence[Place],
    widths: Sequence[float],
    *,
    size: Place,
    height: float,
    radius: float,
    taken: Sequence[Box] = (),
) -> list[Place | None]:
    """Return the middle of each label; None where there is no room for it.

    Labels of earlier points find their place first.

    Args:
        points: The points, in pixels from the top left.
        widths: The width of each label in pixels.
        size: The width and the height of the picture in pixels.
        height: The height of a label in pixels.
        radius: The radius of a point in pixels.
        taken: What labels shall not cover either, such as lines.
    """
    boxes = [*taken, *((x - radius, y - radius, x + radius, y + radius) for x, y in points)]
    places: list[Place | None] = []
    for point, width in zip(points, widths, strict=True):
        place, box = next(
            (
                (middle, box)
                for middle, box in _around(point, width, height, radius)
                if _is_inside(box, size) and not any(_overlap(box, other) for other in boxes)
            ),
            (None, None),
        )
        places.append(place)
        if box is not None:
            boxes.append(box)
    return places


def _around(
    point: Place, width: float, height: float, radius: float
) -> Iterator[tuple[Place, Box]]:
    """Yield the middle and the box of a label in each place around a point, the best first."""
    for far in (1.0, 2.5):
        aside, above = far * radius + width / 2 + 2, far * radius + height / 2 + 2
        for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
            x, y = point[0] + dx * aside, point[1] + dy * above
            yield (x, y), (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _is_inside(box: Box, size: Place) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= size[0] and box[3] <= size[1]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
