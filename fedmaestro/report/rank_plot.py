"""Ranks of the layers over epochs or rounds: a panel each for a few layers, heat maps for many.

Legend: T recorded moments, L layers in network order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedmaestro.report.axis import Scale
from fedmaestro.report.figure import NOTE, key, new_figure, plot_style, short_name, side_legend, tier_colors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Floats = npt.NDArray[np.float64]

Ranks = Mapping[str, int]
History = Sequence[tuple[float, Mapping[str, Ranks]]]
"""Moments (epochs or rounds) and the ranks by tier and layer at each: tiers largest first, layers in network order."""

_FEW = 8  # more layers than this are a heat map
_MAX_ROWS = 130  # with a label
_MAX_NAME = 34
_ROW_HEIGHT = 0.148  # inches: room for text of 7 points


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Ranks ``(T, L)`` by tier, nan where none is known; ``moments (T + 1,)`` with the end of the last one."""

    moments: "Floats"
    tiers: Mapping[str, "Floats"]
    full: Mapping[str, float]
    x_label: str

    def x(self, bins: int, *, label: bool = True) -> Scale:
        whole = all(moment == int(moment) for moment in self.moments)
        low, high = float(self.moments[0]), float(self.moments[-1])
        return Scale(label=self.x_label if label else "", low=low, high=high, integer=whole, bins=bins)


@plot_style()
def rank_figure(
    history: History, *, full: Ranks | None = None, x_label: str = "Communication round", title: str = ""
) -> "Figure":
    """Draw the rank of each layer: a panel per layer or, above eight layers, a heat map per tier.

    Args:
        history: A rank holds until the next moment; a layer that is missing at one leaves a gap there.
        full: Full rank by layer; for a layer that is not in it, the largest rank seen.
        x_label: What the moments are, for example "Epoch".
        title: Shown above.

    """
    table, full = _table(history, full or {}, x_label), full or {}
    if not table.full:
        figure = new_figure(8.6, 4.2, title)
        figure.subplots().set(xticks=[], yticks=[], xlabel=x_label, ylabel="Rank")
        figure.supxlabel("no ranks have been recorded yet", **NOTE)
        return figure
    return _panel_figure(table, full, title) if len(table.full) <= _FEW else _heat_figure(table, full, title)


def _table(history: History, full: Ranks, x_label: str) -> _Table:
    import numpy as np

    rows = dict(sorted(history, key=lambda entry: entry[0]))  # of two entries for a moment, the later one
    seen: dict[str, float] = {}  # at least 1, so that rank 0 is 0 %
    for layer, rank in (pair for row in rows.values() for ranks in row.values() for pair in ranks.items()):
        seen[layer] = max(seen.get(layer, 1.0), rank, full.get(layer, 1.0))
    tiers = {
        tier: np.array([[row.get(tier, {}).get(layer, np.nan) for layer in seen] for row in rows.values()], np.float64)
        for tier in dict.fromkeys(tier for row in rows.values() for tier in row)
    }
    moments = list(rows) or [0.0]
    return _Table(moments=np.array([*moments, moments[-1] + 1], np.float64), tiers=tiers, full=seen, x_label=x_label)


def _last(ranks: "Floats") -> str:
    """Return the last known rank."""
    known = [rank for rank in ranks.tolist() if rank == rank]
    return f"{known[-1]:.0f}" if known else "–"


def _panel_figure(table: _Table, full: Ranks, title: str) -> "Figure":
    """Draw one panel per layer, at most four in a row, with ranks as they are from zero to the full rank."""
    count, tiers = len(table.full), table.tiers
    columns = count if count <= 3 else -(-count // 2)
    rows = -(-count // columns)
    figure = new_figure(2.6 * columns + 2.2, max(2.4 * rows + 0.9, 0.25 * len(tiers) + 0.9), title)
    grid = figure.subplots(rows, columns, squeeze=False)
    # Drawn on top of each other: where lines coincide, each shows as a rim.
    widths = [3.6 - 2.3 * index / max(len(tiers) - 1, 1) for index in range(len(tiers))]
    styles = list(zip(tier_colors(len(tiers)), widths, strict=True))
    for index, ((layer, size), axes) in enumerate(zip(table.full.items(), grid.flat, strict=False)):
        table.x(4, label=index + columns >= count).apply(axes, "x")
        label = "Rank" if index % columns == 0 else ""
        Scale(label=label, low=0, high=1.06 * size, integer=True, bins=4).apply(axes, "y")
        for ranks, (color, width) in zip(tiers.values(), styles, strict=True):
            axes.stairs(ranks[:, index], table.moments, baseline=None, color=color, linewidth=width)
        last = f"{_last(ranks[:, index])} of " if len(tiers) == 1 else ""
        axes.set_title(f"{_layer_name(layer)} ({last}{_kind([layer], full)} {size:.0f})", fontsize=9.5)
        axes.grid(visible=True)
    for axes in grid.flat[count:]:
        axes.remove()
    figure.align_ylabels()
    if len(tiers) > 1:
        side_legend(
            figure, [key(color, linewidth=width) for color, width in styles], list(map(short_name, tiers)), "Tier"
        )
    return figure


def _kind(layers: Sequence[str], full: Ranks) -> str:
    """Return what ranks are compared with."""
    known = [layer in full for layer in layers]
    return "full rank" if all(known) else "full or largest rank seen" if any(known) else "largest rank seen"


def _heat_figure(table: _Table, full: Ranks, title: str) -> "Figure":
    """Draw layers as rows and moments as columns, a block per tier; the last rank stands beside each row."""
    layers, tiers, kind = list(table.full), table.tiers, _kind(list(table.full), full)
    height = _ROW_HEIGHT * min(len(layers), _MAX_ROWS)
    figure = new_figure(1.6 + max(8.4, 1.9 * len(tiers)), height + 1.9, title)
    blocks = figure.subplots(1, len(tiers), sharey=True, squeeze=False)[0]
    labelled = range(0, len(layers), -(-len(layers) // _MAX_ROWS))
    digits = max(len(f"{size:.0f}") for size in table.full.values())
    for axes, (name, ranks) in zip(blocks, tiers.items(), strict=True):
        image = _draw_heat(axes, table, ranks)
        axes.set_title(short_name(name), fontsize=10)
        for row in labelled:
            # Padded with figure spaces, so that digits line up.
            last = _last(ranks[:, row]).rjust(digits, "\N{FIGURE SPACE}")
            axes.text(1.01, row, last, transform=axes.get_yaxis_transform(), fontsize=7, va="center")
    labels = [f"{_layer_name(layers[row])} ({table.full[layers[row]]:.0f})" for row in labelled]
    blocks[0].set_yticks(labelled, labels, fontsize=7)
    bar: dict[str, Any] = {"location": "top", "aspect": 45, "shrink": 0.6, "pad": 0.1 / height}
    figure.colorbar(image, ax=blocks, label=f"Rank (% of the {kind})", **bar)
    note = f"layers from input to output, {kind} in brackets; after each row its last rank; white: none"
    figure.supxlabel(note, **NOTE)
    return figure


def _draw_heat(axes: "Axes", table: _Table, ranks: "Floats") -> Any:
    """Draw one block, with a white line between parts of the network, and return its image."""
    import numpy as np

    layers, percent = list(table.full), 100 * ranks / list(table.full.values())
    edges = np.arange(len(layers) + 1) - 0.5
    masked = np.ma.masked_invalid(percent.T)
    image = axes.pcolorfast(table.moments, edges, masked, cmap="viridis_r", vmin=0, vmax=100)
    table.x(max(8 // len(table.tiers), 3)).apply(axes, "x")
    axes.set_ylim(edges[-1], edges[0])
    for row in range(1, len(layers)):
        if _block(layers[row]) != _block(layers[row - 1]):
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
