"""Which device holds how many examples of which class."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmaestro.report.figure import new_figure, plot_style, save_figure, short_name, tier_colors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Counts = npt.NDArray[np.integer[Any]]

_MAX_CHANGES = 40  # a strip whose tier changes more often is noise


def plot_partition(
    counts: "Counts",
    path_without_suffix: Path | str,
    tiers: Sequence[str] | None = None,
    title: str = "",
    tier_order: Sequence[str] | None = None,
    devices: int | None = None,
) -> tuple[Path, Path]:
    """Draw the partition as a heat map, with examples per device above and a strip of tiers below.

    Devices stand in the order of their ids, unless tiers alternate so often that the strip would be noise:
    then they are grouped by tier, and the label of the axis says so.

    Args:
        counts: Examples, devices × classes.
        path_without_suffix: ``.png`` (150 dpi) and ``.svg`` are appended.
        tiers: The tier of each device.
        title: Shown above.
        tier_order: Tiers largest first, for the colours of the accuracy plot; default: by first appearance.
        devices: How many there are, where these are some of them, spread evenly.

    Returns:
        The paths of the PNG and of the SVG.

    """
    assert counts.ndim == 2, counts.shape
    assert tiers is None or len(tiers) == len(counts), (len(tiers), len(counts))
    order, x_label = list(dict.fromkeys([*(tier_order or ()), *(tiers or ())])), "Device id"
    if tiers is not None and sum(left != right for left, right in pairwise(tiers)) > _MAX_CHANGES:
        ranks = [order.index(tier) for tier in tiers]
        ids = sorted(range(len(ranks)), key=ranks.__getitem__)  # stable: by id within a tier
        counts, tiers = counts[ids], [tiers[device] for device in ids]
        x_label = "Devices, grouped by tier (in the order of their ids within a tier)"
    if devices is not None and devices > len(counts):
        grouped = ", grouped by tier" if "grouped" in x_label else ""
        x_label = f"{len(counts):,} of {devices:,} devices, spread evenly{grouped}"
    with plot_style():
        figure = _figure(counts, tiers, order, x_label)
        figure.suptitle(title, fontsize=11.5, fontweight="bold")
        return save_figure(figure, path_without_suffix)


def _figure(counts: "Counts", tiers: Sequence[str] | None, order: list[str], x_label: str) -> "Figure":
    heat_height = min(max(0.27 * counts.shape[1], 1.6), 5.5)
    heights = [1.0, heat_height] + ([0.2] if tiers is not None else [])
    figure = new_figure(10.5, sum(heights) + 1.3)
    grid = {"height_ratios": heights}
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw=grid)[:, 0]
    _draw_bars(axes[0], counts)
    _draw_heat(figure, axes[1], counts)
    if tiers is not None:
        _draw_tiers(figure, axes[2], tiers, order)
    axes[-1].set_xlabel(x_label)
    axes[-1].set_xlim(-0.5, len(counts) - 0.5)
    axes[-1].xaxis.set_major_locator(_integer_ticks(11))
    figure.align_ylabels(axes[:2])
    return figure


def _draw_bars(axes: "Axes", counts: "Counts") -> None:
    """Draw one filled outline, which stays sharp for ten devices and for a thousand."""
    import numpy as np

    examples = counts.sum(axis=1)
    axes.stairs(examples, np.arange(len(examples) + 1) - 0.5, fill=True, color="#7d8794")
    axes.set_ylim(0, max(1.05 * float(examples.max(initial=0)), 1.0))
    axes.set_ylabel("Examples\nper device")
    axes.yaxis.set_major_locator(_integer_ticks(3))
    axes.grid(visible=True, axis="y")
    axes.tick_params(labelbottom=False, bottom=False)


def _draw_heat(figure: "Figure", axes: "Axes", counts: "Counts") -> None:
    """Draw examples per class and device; none is white, so a missing class differs from a rare one."""
    import numpy as np
    from matplotlib.colors import PowerNorm

    top = max(int(counts.max(initial=0)), 2)
    image = axes.imshow(
        np.ma.masked_equal(counts.T, 0),
        aspect="auto",
        origin="lower",
        interpolation="none",
        cmap="viridis_r",
        norm=PowerNorm(0.5, vmin=1, vmax=top),  # a square root: small shares stay visible beside large ones
    )
    axes.set_ylabel("Class")
    axes.yaxis.set_major_locator(_integer_ticks(10))
    bar = figure.colorbar(image, ax=axes, pad=0.012, aspect=14, label="examples (white: none)")
    ticks = [int(tick) for tick in _integer_ticks(5).tick_values(0, top)]
    bar.set_ticks([1] + [tick for tick in ticks if 1 < tick <= top])
    bar.minorticks_off()


def _draw_tiers(figure: "Figure", axes: "Axes", tiers: Sequence[str], order: list[str]) -> None:
    import numpy as np
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    colors = tier_colors(len(order))
    row = np.array([[order.index(tier) for tier in tiers]])
    top = len(order) - 0.5
    axes.imshow(row, aspect="auto", interpolation="none", cmap=ListedColormap(colors), vmin=-0.5, vmax=top)
    axes.set_yticks([0], ["Tier"])
    axes.tick_params(left=False)
    handles = [Patch(facecolor=color) for color in colors]
    labels = [f"{list(tiers).count(tier)} × {short_name(tier)}" for tier in order]
    # The number comes first also because matplotlib drops labels that start with an underscore.
    columns = min(len(order), 6)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _integer_ticks(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=count)
