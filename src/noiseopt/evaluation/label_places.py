"""Places for the labels of points, so that they cover no point and no other label."""

import itertools
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # left, bottom, right, top
SIDES = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
REACH = (1.0, 2.0, 3.5)  # in gaps


def label_places(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], inside: Box, gap: float
) -> list[tuple[float, float]]:
    """Choose the center of each label beside its point, where it covers the least, one label after the other.

    Args:
        points: The points, `(x, y)`.
        sizes: Width and height of each label, in the same units.
        inside: The area that labels should not leave.
        gap: The least distance of a label from its point, and half the side of what it should not cover there.
    """
    taken = [box((x, y), (2 * gap, 2 * gap)) for x, y in points]
    found = []
    for (x, y), (width, height) in zip(points, sizes, strict=True):
        places = [
            (x + right * (reach * gap + width / 2), y + up * (reach * gap + height / 2))
            for reach, (right, up) in itertools.product(REACH, SIDES)
        ]
        best = min(places, key=lambda place: covered(box(place, (width, height)), taken, inside))
        found.append(best)
        taken.append(box(best, (width, height)))
    return found


def box(center: tuple[float, float], size: tuple[float, float]) -> Box:
    (x, y), (width, height) = center, size
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def covered(label: Box, taken: Sequence[Box], inside: Box) -> float:
    """Return the area of a label that covers what is taken, or is outside."""
    area = (label[2] - label[0]) * (label[3] - label[1])
    return area - overlap(label, inside) + sum(overlap(label, other) for other in taken)


def overlap(a: Box, b: Box) -> float:
    """Return the common area of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
