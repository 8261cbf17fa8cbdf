"""Ranks on a circle, and arrows between them: what several pictures share."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.patches import Circle, FancyArrowPatch

from minillm.viz.style import CULPRIT, FAINT, INK, WAITING

RADIUS = 0.27
Spot = tuple[float, float]


def spot_of(place: int, count: int) -> Spot:
    """The first at the top, the others clockwise, on the unit circle."""
    angle = math.pi / 2 - 2 * math.pi * place / count
    return math.cos(angle), math.sin(angle)


def between(start: Spot, end: Spot, gap: float = RADIUS + 0.06) -> tuple[Spot, Spot]:
    """The stretch from one circle's edge to another's."""
    trim = gap / math.dist(start, end)
    dx, dy = (end[0] - start[0]) * trim, (end[1] - start[1]) * trim
    return (start[0] + dx, start[1] + dy), (end[0] - dx, end[1] - dy)


def draw_arrow(axis: Any, start: Spot, end: Spot, color: str = INK) -> None:
    """An arrow from one rank's circle to another's."""
    axis.add_patch(
        FancyArrowPatch(*between(start, end), arrowstyle="-|>", mutation_scale=18, color=color, linewidth=1.6)
    )


def draw_rank(axis: Any, spot: Spot, label: str, culprit: bool = False, waiting: bool = False) -> None:
    """A rank: hatched grey while it waits, vermilion when it is to blame, white otherwise."""
    face = CULPRIT if culprit else "white"
    hatch = "////" if waiting else None
    axis.add_patch(Circle(spot, RADIUS, facecolor=face, edgecolor=WAITING, hatch=hatch, linewidth=0, zorder=3))
    axis.add_patch(Circle(spot, RADIUS, fill=False, edgecolor=CULPRIT if culprit else FAINT, linewidth=1.8, zorder=4))
    pad = {"boxstyle": "circle,pad=0.15", "facecolor": face, "edgecolor": "none"}
    color = "white" if culprit else INK
    axis.text(*spot, label, ha="center", va="center", fontsize=13, weight="bold", color=color, zorder=5, bbox=pad)


def clear_axis(axis: Any) -> None:
    """Room for the circle, and no frame."""
    axis.set(xlim=(-1.45, 1.45), ylim=(-1.4, 1.4), aspect="equal")
    axis.axis("off")
