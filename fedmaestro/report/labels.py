"""Where labels go beside points, so that none covers another.

Legend: S spots where a label may go, N rectangles (left, bottom, right, top), K places along a line.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

# In order of preference: pixels from the point, and directions in degrees.
_DISTANCES = (6.0, 10.0, 16.0, 24.0, 34.0, 46.0, 60.0, 80.0, 105.0, 135.0)
_DIRECTIONS = (0, 180, *(sign * way for way in (30, 150, 60, 120, 15, 165, 45, 135, 90) for sign in (1, -1)))
_POINT, _HALO, _LINE = 9.0, 18.0, 4.0  # pixels


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    box: tuple[float, float, float, float],
) -> list[tuple[float, float]]:
    """Return the lower left corner of a label for each point, as near to it as there is room.

    A label stays inside ``box``, covers no other label and no point, keeps away from its neighbours, and the line to it
    crosses none; where nothing is free, it covers the least.

    Args:
        points: Positions in pixels, y upwards.
        sizes: Width and height of each label in pixels.
        box: Left, bottom, right and top of what holds the points.

    """
    import numpy as np

    at = np.array(points, dtype=np.float64).reshape(-1, 2)
    far = np.hypot(*(at[:, None] - at).transpose(2, 0, 1))
    taken, corners = _squares(at, _POINT), np.zeros_like(at)
    for index in np.argsort(-(1 / (10 + far)).sum(1), kind="stable"):  # where points are many, labels are placed first
        spots = _spots(at[index], np.array(sizes[index]))
        lost = _overlaps(spots, taken) + np.prod(sizes[index]) - _overlaps(spots, np.array([box]))
        along = _lines(at[index], spots)
        halos = _squares(at[far[index] > _HALO / 2], _HALO)
        clear = _overlaps(spots, halos) + 1e2 * _crossings(along, at[index], taken)
        best = np.argmin(np.round(1e4 * lost + clear))
        taken = np.vstack([taken, spots[best], _squares(along[1:-1, best], _LINE)])
        corners[index] = spots[best, :2]
    return [(float(x), float(y)) for x, y in corners]


def _spots(point: "Floats", size: "Floats") -> "Floats":
    """Return the rectangles ``(S, 4)`` whose nearest edge is so far from the point, nearest first."""
    import numpy as np

    ways = np.radians(_DIRECTIONS)
    unit = np.stack([np.cos(ways), np.sin(ways)], axis=-1)
    low = point + np.array(_DISTANCES)[:, None, None] * unit + (unit - 1) / 2 * size
    return np.concatenate([low, low + size], axis=-1).reshape(-1, 4)


def _squares(centres: "Floats", size: float) -> "Floats":
    import numpy as np

    return np.concatenate([centres - size / 2, centres + size / 2], axis=-1)


def _overlaps(spots: "Floats", others: "Floats") -> "Floats":
    """Return how much of each spot ``(S,)`` the others ``(N, 4)`` cover, in square pixels."""
    import numpy as np

    low, high = np.maximum(spots[:, None, :2], others[:, :2]), np.minimum(spots[:, None, 2:], others[:, 2:])
    covered: Floats = np.prod((high - low).clip(0), axis=-1).sum(axis=-1)
    return covered


def _lines(point: "Floats", spots: "Floats") -> "Floats":
    """Return places ``(K, S, 2)`` along the line from a point to the nearest edge of each spot."""
    import numpy as np

    nearest = np.clip(point, spots[:, :2], spots[:, 2:])
    return point + np.linspace(0, 1, 25)[:, None, None] * (nearest - point)


def _crossings(along: "Floats", point: "Floats", taken: "Floats") -> "Floats":
    """Return how many of these places ``(K, S, 2)`` lie in what is taken, by spot ``(S,)``; not at the point itself."""
    others = taken[((point < taken[:, :2]) | (point > taken[:, 2:])).any(axis=1)]
    inside = (along[:, :, None] > others[:, :2]) & (along[:, :, None] < others[:, 2:])
    found: Floats = inside.all(axis=-1).sum(axis=(0, 2)).astype(float)
    return found
