"""The winner map: which of several layouts is fastest, for every speed of device and link."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from minillm.parallel.layout import Layout
from minillm.viz.style import INK, frame, new_figure
from minillm.viz.words import plain_log

FAMILIES = {"tp": "#0072B2", "pp": "#E69F00", "dp": "#009E73"}  # pure ones; hybrids between them


def colour_of(layout: Layout) -> tuple[float, float, float]:
    """Blue for slices, orange for stages, green for replicas; a hybrid is a mixture by how much it has of each."""
    import math

    parts = {axis: math.log2(getattr(layout, axis)) for axis in FAMILIES}
    total = sum(parts.values()) or 1.0
    mixed = np.zeros(3)
    for axis, share in parts.items():
        mixed += share / total * np.array([int(FAMILIES[axis][at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return tuple(0.25 + 0.75 * mixed)  # type: ignore[return-value]


def draw_winners(
    layouts: Sequence[Layout],
    seconds: Callable[[Layout, Any, Any], Any],
    devices: tuple[float, float],
    links: tuple[float, float],
    marked: Mapping[str, tuple[float, float]],
    finding: Callable[[dict[str, Layout]], str],
    caption: str,
) -> Figure:
    """`seconds(layout, device bytes/s, link bytes/s)` for whole grids of both, each between two ends; `marked` are machines by
    name, at (device, link). `finding` gets the winner at each of them.
    """
    across, up = np.geomspace(*devices, 120), np.geomspace(*links, 90)
    grid = np.stack([seconds(layout, across[None, :], up[:, None]) for layout in layouts])
    best = grid.argmin(0)
    figure, (axis,) = new_figure(4.4)
    colours = ListedColormap([colour_of(layout) for layout in layouts])
    axis.pcolormesh(across / 1e9, up / 1e9, best, cmap=colours, vmin=-0.5, vmax=len(layouts) - 0.5, shading="nearest")
    axis.set(xscale="log", yscale="log", xlabel="device: memory bandwidth (GB/s)", ylabel="link: bandwidth (GB/s)")
    for number, layout in enumerate(layouts):
        rows, columns = np.nonzero(best == number)
        if len(rows) > 0.012 * best.size:
            middle = len(rows) // 2
            at = np.argsort(columns)[middle]
            axis.text(across[columns[at]] / 1e9, up[rows[at]] / 1e9, str(layout).replace(",", "\n"), ha="center", va="center", fontsize=9.5, color="white", weight="bold")  # fmt: skip
    winners = {}
    for name, (device, link) in marked.items():
        times = [float(seconds(layout, np.array(device), np.array(link))) for layout in layouts]
        winners[name] = layouts[int(np.argmin(times))]
        axis.plot(device / 1e9, link / 1e9, "o", color="white", markeredgecolor=INK, markersize=8)
        axis.annotate(
            name, (device / 1e9, link / 1e9), xytext=(8, 4), textcoords="offset points", fontsize=9.5, color=INK
        )
    plain_log(axis)
    return frame(figure, finding(winners), caption)
