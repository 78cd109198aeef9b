"""Which device holds how many examples of which class."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from fedmaestro.report.figure import new_figure, plot_style, short_name, tier_colors

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    Counts = npt.NDArray[np.integer[Any]]

_MAX_CHANGES = 40  # a strip whose tier changes more often is noise


@plot_style()
def partition_figure(
    counts: "Counts",
    tiers: Sequence[str] | None = None,
    title: str = "",
    tier_order: Sequence[str] | None = None,
    devices: int | None = None,
) -> "Figure":
    """Draw the partition as a heat map, with examples per device above and a strip of tiers below.

    Devices stand in the order of their ids, unless tiers alternate so often that the strip would be noise:
    then they are grouped by tier, and the label of the axis says so.

    Args:
        counts: Examples, devices × classes.
        tiers: The tier of each device.
        title: Shown above.
        tier_order: Tiers largest first, for the colours of the accuracy plot; default: by first appearance.
        devices: How many there are, where these are some of them, spread evenly.

    """
    assert counts.ndim == 2, counts.shape
    assert tiers is None or len(tiers) == len(counts), (len(tiers), len(counts))
    order, x_label = list(dict.fromkeys([*(tier_order or ()), *(tiers or ())])), "Device id"
    grouped = tiers is not None and sum(left != right for left, right in pairwise(tiers)) > _MAX_CHANGES
    if tiers is not None and grouped:
        ids = sorted(
            range(len(tiers)), key=[order.index(tier) for tier in tiers].__getitem__
        )  # stable: by id in a tier
        counts, tiers = counts[ids], [tiers[device] for device in ids]
        x_label = "Devices, grouped by tier (in the order of their ids within a tier)"
    if devices is not None and devices > len(counts):
        x_label = f"{len(counts):,} of {devices:,} devices, spread evenly{', grouped by tier' * grouped}"
    heights = [1.0, min(max(0.27 * counts.shape[1], 1.6), 5.5)] + [0.2] * (tiers is not None)
    figure = new_figure(10.5, sum(heights) + 1.3, title)
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    _draw_bars(axes[0], counts)
    _draw_heat(figure, axes[1], counts)
    if tiers is not None:
        _draw_tiers(figure, axes[2], tiers, order)
    axes[-1].set(xlabel=x_label, xlim=(-0.5, len(counts) - 0.5))
    axes[-1].xaxis.set_major_locator(_integer_ticks(11))
    figure.align_ylabels(axes[:2])
    return figure


def _draw_bars(axes: "Axes", counts: "Counts") -> None:
    """Draw one filled outline, which stays sharp for ten devices and for a thousand."""
    import numpy as np

    examples = counts.sum(axis=1)
    axes.stairs(examples, np.arange(len(examples) + 1) - 0.5, fill=True, color="#7d8794")
    axes.set(ylim=(0, max(1.05 * float(examples.max(initial=0)), 1.0)), ylabel="Examples\nper device")
    axes.yaxis.set_major_locator(_integer_ticks(3))
    axes.grid(visible=True, axis="y")
    axes.tick_params(labelbottom=False, bottom=False)


def _draw_heat(figure: "Figure", axes: "Axes", counts: "Counts") -> None:
    """Draw examples per class and device; none is white, so a missing class differs from a rare one."""
    import numpy as np
    from matplotlib.colors import PowerNorm

    top = max(int(counts.max(initial=0)), 2)
    norm = PowerNorm(0.5, vmin=1, vmax=top)  # a square root: small shares stay visible beside large ones
    kind: dict[str, Any] = {"aspect": "auto", "origin": "lower", "interpolation": "none", "cmap": "viridis_r"}
    image = axes.imshow(np.ma.masked_equal(counts.T, 0), norm=norm, **kind)
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

    colors, row = tier_colors(len(order)), np.array([[order.index(tier) for tier in tiers]])
    limits: dict[str, Any] = {"vmin": -0.5, "vmax": len(order) - 0.5}
    axes.imshow(row, aspect="auto", interpolation="none", cmap=ListedColormap(colors), **limits)
    axes.set_yticks([0], ["Tier"])
    axes.tick_params(left=False)
    labels = [f"{list(tiers).count(tier)} × {short_name(tier)}" for tier in order]
    handles, columns = [Patch(facecolor=color) for color in colors], min(len(order), 6)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def _integer_ticks(count: int) -> "MaxNLocator":
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=count)
