"""What all figures share: style, colours, and files that come out byte-identical every time."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PNG_DPI = 150
MUTED = "#555555"  # secondary text, 7.5:1 on white
# Marker and size in points: sizes that look equal.
MARKERS = {"o": 5.5, "s": 5.2, "^": 6.2, "D": 5.0, "v": 6.2, "P": 6.8, "X": 6.8, "p": 6.5}

# Navy, purple, crimson, amber: lightness rises steadily (L* 13 to 61), the lightest has 3.05:1 against white.
# Of five tiers, neighbours stay 15 apart (CIELAB) under simulated deutan, protan and tritan vision.
_PALETTE = ("#111a55", "#6d2aa8", "#cc3d6a", "#de7a00")
_MAX_NAME = 28

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


def short_name(name: str) -> str:
    """Return ``name`` short enough for a legend."""
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"


def save_figure(figure: "Figure", path_without_suffix: Path | str) -> tuple[Path, Path]:
    """Write the figure as PNG (150 dpi) and SVG, making the folder; return both paths."""
    png, svg = Path(f"{path_without_suffix}.png"), Path(f"{path_without_suffix}.svg")
    png.parent.mkdir(parents=True, exist_ok=True)
    with _quiet_glyphs():
        figure.savefig(png, format="png", dpi=PNG_DPI)
    svg.write_text(svg_text(figure), encoding="utf-8", newline="\n")
    return png, svg


def svg_text(figure: "Figure") -> str:
    """Return the figure as an SVG document without metadata (a date would differ from run to run)."""
    buffer = io.BytesIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _quiet_glyphs():
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
def _quiet_glyphs() -> Iterator[None]:
    """A tier name in a script that the PNG font lacks is not worth a warning: the SVG shows it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        yield
