"""Ranks of the layers over epochs or rounds: lines for a few layers, a heat map for many.

Legend: T recorded moments, L layers in network order, C columns of a heat map.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmaestro.report.curves import as_number
from fedmaestro.report.figure import MUTED, new_figure, plot_style, save_figure, short_name, svg_text, tier_colors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Floats = npt.NDArray[np.float64]

Ranks = Mapping[str, int]

_FEW = 8  # more layers than this are a heat map
_MAX_COLUMNS = 1000
_MAX_ROWS = 130  # with a label
_MAX_NAME = 34
_ROW_HEIGHT = 0.148  # inches: room for text of 7 points


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Ranks ``(T, L)`` at increasing ``moments (T,)``, nan where none is known, and each layer's full rank ``(L,)``."""

    moments: "Floats"
    layers: Sequence[str]
    ranks: "Floats"
    full: "Floats"

    @property
    def percent(self) -> "Floats":
        return 100 * self.ranks / self.full

    def last_rank(self, layer: int) -> float:
        """Return the last known rank; nan if there is none."""
        known = [rank for rank in self.ranks[:, layer].tolist() if not math.isnan(rank)]
        return known[-1] if known else math.nan


def plot_ranks(
    history: Sequence[tuple[float, Ranks]],
    path_without_suffix: Path | str,
    *,
    full: Ranks | None = None,
    x_label: str,
    title: str = "",
) -> tuple[Path, Path]:
    """Draw the rank of each layer as a percentage of its full rank.

    Up to eight layers are lines with their names and last ranks beside them, more are the rows of a heat map.

    Args:
        history: Moments (epochs or rounds) and the ranks by layer at each, layers in network order. A rank holds until
            the next moment; a layer that is missing, or null, at a moment leaves a gap there.
        path_without_suffix: ``.png`` (150 dpi) and ``.svg`` are appended.
        full: Full rank by layer; for a layer that is not in it, the largest rank seen.
        x_label: What the moments are, for example "Epoch".
        title: Shown above.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        ValueError: If a rank is above the layer's full rank.

    """
    with plot_style():
        return save_figure(_rank_figure(history, full, x_label, title), path_without_suffix)


def rank_svg(
    history: Sequence[tuple[float, Ranks]], *, full: Ranks | None = None, x_label: str, title: str = ""
) -> str:
    """Return the picture of `plot_ranks` as an SVG document."""
    with plot_style():
        return svg_text(_rank_figure(history, full, x_label, title))


def plot_tier_ranks(
    history: Sequence[tuple[float, Mapping[str, Ranks]]],
    path_without_suffix: Path | str,
    *,
    full: Ranks | None = None,
    x_label: str = "Communication round",
    title: str = "",
) -> tuple[Path, Path]:
    """Draw the rank of each layer per tier: one panel per layer or, above eight layers, one heat map per tier.

    Args:
        history: Rounds and the ranks by tier and layer at each, tiers largest first, layers in network order. Gaps as
            in `plot_ranks`.
        path_without_suffix: ``.png`` (150 dpi) and ``.svg`` are appended.
        full: Full rank by layer; for a layer that is not in it, the largest rank seen in any tier.
        x_label: What the moments are.
        title: Shown above.

    Returns:
        The paths of the PNG and of the SVG.

    Raises:
        ValueError: If a rank is above the layer's full rank.

    """
    with plot_style():
        return save_figure(_tier_figure(history, full, x_label, title), path_without_suffix)


def tier_rank_svg(
    history: Sequence[tuple[float, Mapping[str, Ranks]]],
    *,
    full: Ranks | None = None,
    x_label: str = "Communication round",
    title: str = "",
) -> str:
    """Return the picture of `plot_tier_ranks` as an SVG document."""
    with plot_style():
        return svg_text(_tier_figure(history, full, x_label, title))


def spread(positions: Sequence[float], gap: float, highest: float) -> list[float]:
    """Move labels apart until neighbours are ``gap`` apart, none above ``highest``; the order stays."""
    order = sorted(range(len(positions)), key=lambda index: (positions[index], -index))
    placed = [positions[index] for index in order]
    for index in range(1, len(placed)):
        placed[index] = max(placed[index], placed[index - 1] + gap)
    ceiling = highest
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return [place for _, place in sorted(zip(order, placed, strict=True))]


def hold(moments: "Floats", values: "Floats") -> tuple["Floats", "Floats"]:
    """Return evenly spaced moments ``(C,)`` as fine as the finest step, and the values ``(C, L)`` that hold there."""
    import numpy as np

    steps = np.diff(moments)
    if not steps.size:
        return moments, values
    span = float(moments[-1] - moments[0])
    columns = min(round(span / float(steps.min())) + 1, _MAX_COLUMNS)
    even = np.linspace(moments[0], moments[-1], columns)
    # Rounding must not put a column before the moment that it stands for.
    held = np.searchsorted(moments, even + 1e-9 * span, side="right") - 1
    return even, values[held]


def _table(history: Sequence[tuple[float, Ranks]], sizes: Mapping[str, float]) -> _Table:
    import numpy as np

    rows = dict(sorted(history, key=lambda entry: entry[0]))  # of two entries for a moment, the later one
    ranks = [[_known(row.get(layer)) for layer in sizes] for row in rows.values()]
    return _Table(
        moments=np.array(list(rows), dtype=np.float64),
        layers=list(sizes),
        ranks=np.array(ranks, dtype=np.float64).reshape(len(rows), len(sizes)),
        full=np.array(list(sizes.values()), dtype=np.float64),
    )


def _known(rank: object) -> float:
    number = as_number(rank)
    return number if math.isfinite(number) else math.nan


def _full_ranks(rows: Sequence[Ranks], full: Ranks | None) -> dict[str, float]:
    """Return the full rank of every layer, in the order of appearance; at least 1, so that rank 0 is 0 %."""
    seen: dict[str, float] = {}
    for row in rows:
        for layer, rank in row.items():
            seen[layer] = max(seen.get(layer, 1.0), 1.0 if math.isnan(_known(rank)) else _known(rank))
    sizes = seen | {layer: max(float(rank), 1.0) for layer, rank in (full or {}).items() if layer in seen}
    for layer, size in sizes.items():
        if seen[layer] > size:
            raise ValueError(f"layer {layer} has rank {seen[layer]:.0f}, but its full rank is {size:.0f}")
    return sizes


def _rank_figure(history: Sequence[tuple[float, Ranks]], full: Ranks | None, x_label: str, title: str) -> "Figure":
    sizes = _full_ranks([row for _, row in history], full)
    if not sizes:
        return _empty_figure(x_label, title)
    table = _table(history, sizes)
    if len(sizes) > _FEW:
        return _heat_figure({"": table}, _unit(sizes, full), x_label, title)
    figure = _titled_figure(8.6, 4.2, title)
    axes = figure.subplots()
    _set_x(axes, table.moments, x_label)
    axes.set_ylabel(f"Rank ({_unit(sizes, full)})")
    axes.set_ylim(0, 103)
    axes.grid(visible=True)
    _draw_lines(axes, table)
    return figure


def _titled_figure(width: float, height: float, title: str) -> "Figure":
    figure = new_figure(width, height)
    figure.suptitle(title, fontsize=11.5, fontweight="bold")
    return figure


def _empty_figure(x_label: str, title: str) -> "Figure":
    figure = _titled_figure(8.6, 4.2, title)
    figure.subplots().set(xticks=[], yticks=[], xlabel=x_label, ylabel="Rank")
    figure.supxlabel("no ranks have been recorded yet", fontsize=8.5, color=MUTED)
    return figure


def _unit(sizes: Mapping[str, float], full: Ranks | None) -> str:
    """Return what 100 % stands for."""
    known = [layer in (full or {}) for layer in sizes]
    if all(known):
        return "% of the full rank"
    return "% of the full or largest rank seen" if any(known) else "% of the largest rank seen"


def _draw_lines(axes: "Axes", table: _Table) -> None:
    """Draw a step line per layer, dark to light from input to output, and its name and last rank at its end."""
    count = len(table.layers)
    colors, widths = tier_colors(count), _widths(count)
    ends = [_draw_steps(axes, table.moments, table.percent[:, i], colors[i], widths[i]) for i in range(count)]
    places = spread([percent / axes.get_ylim()[1] for _, percent in ends], 0.066, 1.0)
    for index, (layer, end, place) in enumerate(zip(table.layers, ends, places, strict=True)):
        line = {"arrowstyle": "-", "color": colors[index], "linewidth": 0.9}
        axes.annotate(
            f"{_layer_name(layer)}  {_number(table.last_rank(index))} of {table.full[index]:.0f}",
            end,
            (1.05, place),
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            arrowprops={**line, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3},
        )


def _widths(count: int) -> list[float]:
    """Return the widths of lines that are drawn on top of each other: where they coincide, each shows as a rim."""
    return [3.6 - 2.3 * index / max(count - 1, 1) for index in range(count)]


def _draw_steps(axes: "Axes", moments: "Floats", values: "Floats", color: str, width: float) -> tuple[float, float]:
    """Draw values that hold until the next moment, with a dot at the last known one; return its place."""
    axes.plot(moments, values, drawstyle="steps-post", color=color, linewidth=width)
    known = [at for at, value in enumerate(values.tolist()) if not math.isnan(value)]
    if not known:
        return float(moments[-1]), 0.0
    end = float(moments[known[-1]]), float(values[known[-1]])
    axes.plot(*end, "o", color=color, markersize=width + 2.2, clip_on=False, zorder=2.5)
    return end


def _tier_figure(
    history: Sequence[tuple[float, Mapping[str, Ranks]]], full: Ranks | None, x_label: str, title: str
) -> "Figure":
    sizes = _full_ranks([row for _, tiers in history for row in tiers.values()], full)
    if not sizes:
        return _empty_figure(x_label, title)
    tiers = dict.fromkeys(tier for _, row in history for tier in row)
    tables = {tier: _table([(moment, row.get(tier) or {}) for moment, row in history], sizes) for tier in tiers}
    if len(sizes) > _FEW:
        return _heat_figure(tables, _unit(sizes, full), x_label, title)
    return _panel_figure(tables, sizes, full or {}, x_label, title)


def _panel_figure(
    tables: Mapping[str, _Table], sizes: Mapping[str, float], full: Ranks, x_label: str, title: str
) -> "Figure":
    """Draw one panel per layer, at most four in a row, with ranks as they are from zero to the full rank."""
    from matplotlib.ticker import MaxNLocator

    columns = len(sizes) if len(sizes) <= 3 else -(-len(sizes) // 2)
    rows = -(-len(sizes) // columns)
    figure = _titled_figure(2.6 * columns + 2.2, 2.4 * rows + 0.9, title)
    grid = figure.subplots(rows, columns, squeeze=False)
    colors, widths = tier_colors(len(tables)), _widths(len(tables))
    for index, (layer, axes) in enumerate(zip(sizes, grid.flat, strict=False)):
        for table, color, width in zip(tables.values(), colors, widths, strict=True):
            _draw_steps(axes, table.moments, table.ranks[:, index], color, width)
            _set_x(axes, table.moments, x_label if index + columns >= len(sizes) else "", ticks=4)
        kind = "full rank" if layer in full else "largest rank"
        axes.set_title(f"{_layer_name(layer)} ({kind} {sizes[layer]:.0f})", fontsize=9.5)
        axes.set_ylim(0, 1.06 * sizes[layer])
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        axes.set_ylabel("Rank" if index % columns == 0 else "")
        axes.grid(visible=True)
    for axes in grid.flat[len(sizes) :]:
        axes.remove()
    figure.align_ylabels()
    _tier_legend(figure, list(tables), colors, widths)
    return figure


def _tier_legend(figure: "Figure", tiers: Sequence[str], colors: Sequence[str], widths: Sequence[float]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, linewidth=width) for color, width in zip(colors, widths, strict=True)]
    # A space before each name: matplotlib drops labels that start with an underscore.
    names = [f" {short_name(tier)}" for tier in tiers]
    figure.legend(handles, names, loc="outside right upper", title="Tier", frameon=False, alignment="left")


def _set_x(axes: "Axes", moments: "Floats", x_label: str, ticks: int = 8, room: float = 0.0) -> None:
    """Label the axis and end it at the first and the last moment, or ``room`` beyond both."""
    from matplotlib.ticker import MaxNLocator

    integer = all(x == int(x) for x in moments)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=integer, min_n_ticks=1))
    low, high = float(moments[0]) - room, float(moments[-1]) + room
    axes.set_xlim(low if low < high else low - 0.9, high)  # one moment: no tick before it


def _heat_figure(tables: Mapping[str, _Table], unit: str, x_label: str, title: str) -> "Figure":
    """Draw layers as rows, moments as columns, and a block per table; the last rank stands beside each row."""
    layers, full = next((table.layers, table.full) for table in tables.values())
    height = _ROW_HEIGHT * min(len(layers), _MAX_ROWS)
    figure = _titled_figure(1.6 + max(8.4, 1.9 * len(tables)), height + 1.9, title)
    blocks = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    labelled = range(0, len(layers), -(-len(layers) // _MAX_ROWS))
    for axes, (name, table) in zip(blocks, tables.items(), strict=True):
        image = _draw_heat(axes, table, x_label, ticks=max(8 // len(tables), 3))
        axes.set_title(short_name(name), fontsize=10)
        for row in labelled:
            # Padded with figure spaces, so that digits line up.
            last = _number(table.last_rank(row)).rjust(len(_number(max(full))), "\N{FIGURE SPACE}")
            axes.text(1.01, row, last, transform=axes.get_yaxis_transform(), fontsize=7, va="center")
    labels = [f"{_layer_name(layers[row])} ({full[row]:.0f})" for row in labelled]
    blocks[0].set_yticks(labelled, labels, fontsize=7)
    pad = 0.1 / height  # inches
    figure.colorbar(image, ax=blocks, location="top", aspect=45, shrink=0.6, pad=pad, label=f"Rank ({unit})")
    note = f"layers from input to output, {unit.removeprefix('% of the ')} in brackets; after each row its last rank"
    figure.supxlabel(f"{note}; white: none", fontsize=8.5, color=MUTED)
    return figure


def _draw_heat(axes: "Axes", table: _Table, x_label: str, ticks: int) -> Any:
    """Draw one block, with a white line between parts of the network, and return its image."""
    import numpy as np

    moments, percent = hold(table.moments, table.percent)
    half = float(moments[-1] - moments[0]) / max(len(moments) - 1, 1) / 2 or 0.5
    _set_x(axes, table.moments, x_label, ticks, room=half)
    image = axes.imshow(
        np.ma.masked_invalid(percent.T),
        aspect="auto",
        interpolation="none",
        cmap="viridis_r",
        vmin=0,
        vmax=100,
        extent=(*axes.get_xlim(), len(table.layers) - 0.5, -0.5),
    )
    for row in range(1, len(table.layers)):
        if _block(table.layers[row]) != _block(table.layers[row - 1]):
            axes.axhline(row - 0.5, color="white", linewidth=1.6)
    axes.tick_params(left=False)
    axes.spines[:].set_visible(False)
    return image


def _block(layer: str) -> str:
    """Return the part of the network that a layer belongs to: ``encoder.0`` of ``encoder.0.attention.q``."""
    return ".".join(layer.split(".")[:-1][:2])


def _layer_name(layer: str) -> str:
    """Return a layer's name, short enough for a label: its end tells it from its neighbours."""
    return layer if len(layer) <= _MAX_NAME else "…" + layer[1 - _MAX_NAME :]


def _number(rank: float) -> str:
    return "–" if math.isnan(rank) else f"{rank:.0f}"
