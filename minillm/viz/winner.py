"""The winner map: which of several layouts is fastest, for every speed of device and link."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from minillm.parallel.layout import Layout
from minillm.viz.style import INK, frame, new_figure
from minillm.viz.words import plain_log

ACROSS, UP = 200, 150  # points of the map
MIDDLE = 1e12  # bytes/s: faster devices have their names on the left
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


@dataclass(frozen=True)
class WinnerMap:
    """One map: `seconds(layout, device bytes/s, link bytes/s)` takes whole grids of both.

    `machines` are marked by name: their device's and link's bytes/s, and which layout is fastest there, None where none fits.
    """

    name: str
    layouts: Sequence[Layout]
    seconds: Callable[[Layout, Any, Any], Any]
    machines: Mapping[str, tuple[float, float, Layout | None]]


def draw_winners(
    maps: Sequence[WinnerMap], devices: tuple[float, float], links: tuple[float, float], finding: str, caption: str
) -> Figure:
    """Maps beside each other, from one device and link speed to another, in bytes/s. A machine's dot has the colour of its own
    winner: its operations per byte and its memory may be others than the map's.
    """
    figure, axes = new_figure(4.4, [1.0] * len(maps))
    for number, (axis, each) in enumerate(zip(axes, maps)):
        _draw_map(axis, each, np.geomspace(*devices, ACROSS), np.geomspace(*links, UP), ACROSS * len(maps) // 3)
        axis.set(xscale="log", yscale="log", xlabel="device: memory bandwidth (GB/s)")
        axis.set_ylabel("link: bandwidth (GB/s)" if number == 0 else "")
        axis.set_title(each.name if len(maps) > 1 else "", fontsize=10.5, loc="left")
        plain_log(axis)
        axis.minorticks_off()
    return frame(figure, finding, caption)


def _draw_map(axis: Any, drawn: WinnerMap, across: Any, up: Any, reach: int) -> None:
    """`reach`: points that the name of a machine covers."""
    best = np.stack([drawn.seconds(layout, across[None, :], up[:, None]) for layout in drawn.layouts]).argmin(0)
    free = np.ones(best.shape, bool)  # where names of layouts may stand
    for name, (device, link, winner) in drawn.machines.items():
        left = _mark(axis, f"{name}: {winner or 'does not fit'}", device, link, winner)
        row, column = int(np.searchsorted(up, link)), int(np.searchsorted(across, device))
        first, last = (column - reach, column) if left else (column, column + reach)
        free[max(0, row - UP // 10) : row + UP // 10, max(0, first) : last] = False
    for number in np.unique(best):
        layout, where = drawn.layouts[number], (across / 1e9, up / 1e9, best == number)
        axis.contourf(*where, [0.5, 1.5], colors=[colour_of(layout)])
        axis.contour(*where, [0.5], colors="white", linewidths=1.2)
        middle = _innermost((best == number) & free)
        if middle is not None:
            x, y, said = across[middle[1]] / 1e9, up[middle[0]] / 1e9, str(layout).replace(",", "\n")
            axis.text(x, y, said, ha="center", va="center", fontsize=10, color="white", weight="bold")


def _mark(axis: Any, text: str, device: float, link: float, winner: Layout | None) -> bool:
    """A machine, and beside it what wins there; whether that stands to the left of it."""
    left = device > MIDDLE
    colour = colour_of(winner) if winner else "white"
    axis.plot(device / 1e9, link / 1e9, "o", color=colour, markeredgecolor="white", markeredgewidth=1.8, markersize=10)
    axis.annotate(
        text, (device / 1e9, link / 1e9), xytext=(-11 if left else 11, 0), textcoords="offset points", fontsize=9.0,
        color=INK, va="center", ha="right" if left else "left",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 2.0},
    )  # fmt: skip
    return left


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
