"""What all figures share: draw one inside `plot_style`, then `save_figure` or `svg_text`, the same bytes every time."""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from fedmaestro.runs.folder import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MUTED = "#555555"  # secondary text, 7.5:1 on white
BLACK = "#222222"
GREY = "#c4c4c4"
NOTE: dict[str, Any] = {"fontsize": 8.5, "color": MUTED}
TITLE: dict[str, Any] = {"size": 11.5, "weight": "bold"}
# Marker and size in points: sizes that look equal.
MARKERS = {"o": 5.5, "s": 5.2, "^": 6.2, "D": 5.0, "v": 6.2, "P": 6.8, "X": 6.8, "p": 6.5}
# Navy, purple, crimson, amber: lightness rises steadily (L* 13 to 61), the lightest has 3.05:1 against white.
# Of five tiers, neighbours stay 15 apart (CIELAB) under simulated deutan, protan and tritan vision.
_PALETTE = ("#111a55", "#6d2aa8", "#cc3d6a", "#de7a00")
# Blue, vermilion, pink, violet: any two stay 30 apart (CIELAB) for colour-blind readers, at least 3.4:1 on white.
SERIES_COLORS = ("#0b5fa5", "#d9480f", "#c2708a", "#8800ee")
_PNG_DPI = 150
_MAX_NAME = 28
_MAX_MARKERS = 15  # per line

_STYLE: dict[Any, Any] = {
    "font.size": 10.0,
    "axes.labelsize": 10.5,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "axes.formatter.useoffset": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
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
    """Apply the style of the reports, not the user's matplotlibrc; as ``@plot_style()``, to a function that draws."""
    import matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        # A tier name in a script that the PNG font lacks is not worth a warning: the SVG shows it.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        matplotlib.rcdefaults()  # leaves the backend alone
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float, title: str = "") -> "Figure":
    """Return an empty white figure of ``width`` × ``height`` inches, outside of pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    if title:
        figure.suptitle(title, **TITLE)
    return figure


@plot_style()
def save_figure(figure: "Figure", path_without_suffix: Path | str) -> tuple[Path, Path]:
    """Write the figure as PNG (150 dpi) and SVG, making the folder; return both paths."""
    png, svg = Path(f"{path_without_suffix}.png"), Path(f"{path_without_suffix}.svg")
    pixels = io.BytesIO()
    figure.savefig(pixels, format="png", dpi=_PNG_DPI)
    write_atomically(png, pixels.getvalue())
    write_atomically(svg, svg_text(figure))
    return png, svg


@plot_style()
def svg_text(figure: "Figure") -> str:
    """Return the figure as an SVG document without metadata (a date would differ from run to run)."""
    buffer, no_metadata = io.BytesIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=no_metadata, dpi=_PNG_DPI)
    return _number_ids(buffer.getvalue().decode("utf-8"))


def _number_ids(svg: str) -> str:
    """Replace hashed ids by numbers: matplotlib hashes positions, whose last bits vary by layout."""
    names: dict[str, str] = {}

    def rename(match: re.Match[str]) -> str:
        return match[1] + names.setdefault(match[2], f"id{len(names) + 1}")

    return re.sub(r'(\sid="|href="#|url\(#)([a-z]+[0-9a-f]{10})(?=["\)])', rename, svg)


def inline_svg(svg: str, prefix: str, label: str) -> Markup:
    """Return an SVG document as an element to put into HTML.

    Args:
        svg: A document that matplotlib wrote (it escapes ``<`` and ``>`` inside attributes).
        prefix: Put before every id and every reference to one, so that plots in one page do not clash.
        label: What a screen reader says.

    """

    def prefixed(tag: re.Match[str]) -> str:
        return re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{prefix}-", tag.group())

    body = re.sub(r"<[^<>]+>", prefixed, svg[svg.index("<svg") :])
    return Markup('<svg role="img" aria-label="{}"').format(label) + Markup(body.removeprefix("<svg"))


def short_name(name: str) -> str:
    """Return ``name`` short enough for a legend."""
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def tier_colors(count: int) -> list[str]:
    """Return ``count`` hex colours, dark to light, ordered also in greyscale and for colour-blind readers."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    palette = LinearSegmentedColormap.from_list("tiers", _PALETTE)
    return [to_hex(palette(index / max(count - 1, 1))) for index in range(count)]


def marker(index: int) -> dict[str, Any]:
    """Return the marker of a tier or series: white around it where lines cross."""
    kind, size = list(MARKERS.items())[index % len(MARKERS)]
    return {"marker": kind, "markersize": size, "markeredgecolor": "white", "markeredgewidth": 0.6}


def key(color: str, **style: Any) -> "Line2D":
    """Return what stands for a line, or for points, in a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, **style)


def stagger(index: int, lines: int, points: int) -> tuple[int, int]:
    """Return which points of a line have a marker: all of a few, staggered by line where they are many."""
    every = max(1, -(-points // _MAX_MARKERS))
    return index * every // max(lines, 1), every


def side_legend(figure: "Figure", keys: Sequence[Any], names: Sequence[str], title: str = "", **options: Any) -> None:
    """List names at the right of the panels."""
    options = {"title": title or None, "title_fontsize": 9.5, "alignment": "left", **options}
    figure.legend(keys, _labels(names), loc="outside right upper", **options)


def top_legend(figure: "Figure", keys: Sequence[Any], names: Sequence[str], columns: int) -> None:
    """Put the legend below the title: as two things, the layout would draw them on top of each other."""
    options = {"title": figure.get_suptitle(), "title_fontproperties": TITLE, "ncols": columns, "fontsize": 9}
    figure.suptitle("")
    figure.legend(keys, _labels(names), loc="outside upper center", **options)


def _labels(names: Sequence[str]) -> list[str]:
    """A space before each name: matplotlib drops labels that start with an underscore."""
    return [f" {name}" for name in names]
