"""The winner map: which of several layouts is fastest, for every speed of device and link."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from minillm.parallel.layout import Layout
from minillm.viz.style import INK, frame, new_figure
from minillm.viz.words import plain_log

ACROSS, UP = 200, 150  # points of the map
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
    across, up = np.geomspace(*devices, ACROSS), np.geomspace(*links, UP)
    best = np.stack([seconds(layout, across[None, :], up[:, None]) for layout in layouts]).argmin(0)
    figure, (axis,) = new_figure(4.6)
    axis.set(xscale="log", yscale="log", xlabel="device: memory bandwidth (GB/s)", ylabel="link: bandwidth (GB/s)")
    winners, free = {}, np.ones(best.shape, bool)  # where names of layouts may stand
    for name, (device, link) in marked.items():
        times = [float(seconds(layout, np.array(device), np.array(link))) for layout in layouts]
        winners[name] = layouts[int(np.argmin(times))]
        _mark(axis, name, device, link, free, (int(np.searchsorted(up, link)), int(np.searchsorted(across, device))))
    for number in np.unique(best):
        where = across / 1e9, up / 1e9, best == number
        axis.contourf(*where, [0.5, 1.5], colors=[colour_of(layouts[number])])
        axis.contour(*where, [0.5], colors="white", linewidths=1.2)
        middle = _innermost((best == number) & free)
        if middle is not None:
            x, y, said = across[middle[1]] / 1e9, up[middle[0]] / 1e9, str(layouts[number]).replace(",", "\n")
            axis.text(x, y, said, ha="center", va="center", fontsize=10, color="white", weight="bold")
    plain_log(axis)
    axis.minorticks_off()
    return frame(figure, finding(winners), caption)


def _mark(axis: Any, name: str, device: float, link: float, free: Any, cell: tuple[int, int]) -> None:
    """A machine by its name, beside which no other name may stand."""
    row, column = cell
    left = column > 0.8 * ACROSS
    axis.plot(device / 1e9, link / 1e9, "o", color="white", markeredgecolor=INK, markersize=8)
    axis.annotate(
        name, (device / 1e9, link / 1e9), xytext=(-11 if left else 11, 0), textcoords="offset points", fontsize=9.5,
        color=INK, va="center", ha="right" if left else "left",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2.0},
    )  # fmt: skip
    first, last = (column - ACROSS // 5, column) if left else (column, column + ACROSS // 5)
    free[max(0, row - UP // 12) : row + UP // 12, max(0, first) : last] = False


def _innermost(mask: Any) -> tuple[int, int] | None:
    """A point of a region far from its edges, row and column; None for a region too narrow for a name."""
    depth, last = 0, None
    while mask.any():
        rows, columns = np.nonzero(mask)
        middle = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
        last, depth = (int(rows[middle]), int(columns[middle])), depth + 1
        inner = np.zeros_like(mask)
        inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[2:, 1:-1] & mask[:-2, 1:-1] & mask[1:-1, 2:] & mask[1:-1, :-2]
        mask = inner
    return last if depth > UP // 30 else None
