"""What all figures share: style, colours, and files that come out byte-identical every time."""

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmaestro.runs.folder import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 150
MUTED = "#555555"  # secondary text, 7.5:1 on white
# Marker and size in points: sizes that look equal.
MARKERS = {"o": 5.5, "s": 5.2, "^": 6.2, "D": 5.0, "v": 6.2, "P": 6.8, "X": 6.8, "p": 6.5}

# Navy, purple, crimson, amber: lightness rises steadily (L* 13 to 61), the lightest has 3.05:1 against white.
# Of five tiers, neighbours stay 15 apart (CIELAB) under simulated deutan, protan and tritan vision.
_PALETTE = ("#111a55", "#6d2aa8", "#cc3d6a", "#de7a00")
# Blue, vermilion, pink, violet: any two stay 30 apart (CIELAB) for colour-blind readers, at least 3.4:1 on white.
SERIES_COLORS = ("#0b5fa5", "#d9480f", "#c2708a", "#8800ee")
_MAX_NAME = 28
# Where a label goes, in order: pixels from its point, and directions in degrees.
_DISTANCES = (6.0, 10.0, 16.0, 24.0, 34.0, 46.0, 60.0, 80.0, 105.0, 135.0)
_DIRECTIONS = (0, 180, *(sign * way for way in (30, 150, 60, 120, 15, 165, 45, 135, 90) for sign in (1, -1)))
_POINT_SIZE = 9.0
_HALO_SIZE = 18.0
_LEADER_SIZE = 4.0

Rectangle = tuple[float, float, float, float]
"""Left, bottom, right, top."""

_STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.labelsize": 10.5,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "xtick.color": "#888888",
    "ytick.color": "#888888",
    "xtick.labelcolor": "#222222",
    "ytick.labelcolor": "#222222",
    "svg.hashsalt": "fedmaestro",  # the default draws ids at random
    "svg.fonttype": "none",  # text stays text: small files, searchable, read aloud
    "text.parse_math": False,  # a tier may be called a$b$
}


@contextmanager
def plot_style() -> Iterator[None]:
    """Apply the style of the reports, not the user's matplotlibrc, and restore the user's settings after."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # leaves the backend alone
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty white figure of ``width`` × ``height`` inches, outside of pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def tier_colors(count: int) -> list[str]:
    """Return ``count`` hex colours, dark to light, ordered also in greyscale and for colour-blind readers."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    palette = LinearSegmentedColormap.from_list("tiers", _PALETTE)
    return [to_hex(palette(index / max(count - 1, 1))) for index in range(count)]


def place_labels(
    points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], box: Rectangle
) -> list[tuple[float, float]]:
    """Return the lower left corner of a label for each point, as near to it as there is room.

    A label stays inside ``box``, covers no other label and no point, and the line to it crosses none; where nothing is
    free, it covers the least.

    Args:
        points: Positions in pixels, y upwards.
        sizes: Width and height of each label in pixels.
        box: What holds the points.

    """
    taken = [_square(x, y, _POINT_SIZE) for x, y in points]
    corners: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(points)), key=lambda index: -_crowd(points, index)):
        (x, y), (width, height) = points[index], sizes[index]
        spots = [_beside(x, y, width, height, far, math.radians(way)) for far in _DISTANCES for way in _DIRECTIONS]
        others = [other for other in taken if not _overlap(other, _square(x, y, 1.0))]
        # Away from its neighbours, so that nobody takes it for theirs; those on top of the point cannot be helped.
        halos = [_square(*point, _HALO_SIZE) for point in points if math.dist(point, (x, y)) > _HALO_SIZE / 2]
        free = (
            spot
            for spot in spots
            if not _lost(spot, [*taken, *halos], box) and not _covered(_leader(x, y, spot), others)
        )
        best = next(free, None) or min(spots, key=lambda spot: _lost(spot, taken, box))
        taken += [best, *_leader(x, y, best)]
        corners[index] = best[:2]
    return [corners[index] for index in range(len(points))]


def _crowd(points: Sequence[tuple[float, float]], index: int) -> float:
    """Return how near the other points are: where they are many, labels are placed first."""
    return sum(1 / (10 + math.dist(points[index], other)) for other in points)


def _leader(x: float, y: float, label: Rectangle) -> list[Rectangle]:
    """Return small squares along the line from a point to the nearest edge of its label."""
    to_x, to_y = min(max(x, label[0]), label[2]), min(max(y, label[1]), label[3])
    steps = int(math.hypot(to_x - x, to_y - y) / _LEADER_SIZE)
    return [
        _square(x + (to_x - x) * step / steps, y + (to_y - y) * step / steps, _LEADER_SIZE) for step in range(1, steps)
    ]


def _square(x: float, y: float, size: float) -> Rectangle:
    return x - size / 2, y - size / 2, x + size / 2, y + size / 2


def _covered(these: Sequence[Rectangle], others: Sequence[Rectangle]) -> float:
    return sum(_overlap(this, other) for this in these for other in others)


def _beside(x: float, y: float, width: float, height: float, far: float, way: float) -> Rectangle:
    """Return the label whose nearest edge is ``far`` from the point in direction ``way`` (radians)."""
    left = x + far * math.cos(way) + (math.cos(way) - 1) / 2 * width
    bottom = y + far * math.sin(way) + (math.sin(way) - 1) / 2 * height
    return left, bottom, left + width, bottom + height


def _overlap(a: Rectangle, b: Rectangle) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _lost(a: Rectangle, others: Sequence[Rectangle], box: Rectangle) -> float:
    """Return how much of a label others cover or lies outside of the box."""
    return _covered([a], others) + (a[2] - a[0]) * (a[3] - a[1]) - _overlap(a, box)


def short_name(name: str) -> str:
    """Return ``name`` short enough for a legend."""
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def save_figure(figure: "Figure", path_without_suffix: Path | str) -> tuple[Path, Path]:
    """Write the figure as PNG (150 dpi) and SVG, making the folder; return both paths."""
    png, svg = Path(f"{path_without_suffix}.png"), Path(f"{path_without_suffix}.svg")
    pixels = io.BytesIO()
    with quiet_glyphs():
        figure.savefig(pixels, format="png", dpi=PNG_DPI)
    write_atomically(png, pixels.getvalue())
    write_atomically(svg, svg_text(figure))
    return png, svg


def svg_text(figure: "Figure") -> str:
    """Return the figure as an SVG document without metadata (a date would differ from run to run)."""
    buffer = io.BytesIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with quiet_glyphs():
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    return _number_ids(buffer.getvalue().decode("utf-8"))


def _number_ids(svg: str) -> str:
    """Replace hashed ids by numbers: matplotlib hashes positions, whose last bits vary by layout."""
    names: dict[str, str] = {}

    def rename(match: re.Match[str]) -> str:
        return match[1] + names.setdefault(match[2], f"id{len(names) + 1}")

    return re.sub(r'(\sid="|href="#|url\(#)([a-z]+[0-9a-f]{10})(?=["\)])', rename, svg)


def inline_svg(svg: str, prefix: str, label: str) -> str:
    """Return an SVG document as an element to put into HTML.

    Args:
        svg: A document that matplotlib wrote (it escapes ``<`` and ``>`` inside attributes).
        prefix: Put before every id and every reference to one, so that plots in one page do not clash.
        label: What a screen reader says; already escaped for an attribute.

    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<[^<>]+>", lambda tag: _prefix_ids(tag.group(), prefix), body)
    return body.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _prefix_ids(tag: str, prefix: str) -> str:
    tag = re.sub(r'(\sid=")', rf"\g<1>{prefix}-", tag)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", tag)


@contextmanager
def quiet_glyphs() -> Iterator[None]:
    """A tier name in a script that the PNG font lacks is not worth a warning: the SVG shows it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield
