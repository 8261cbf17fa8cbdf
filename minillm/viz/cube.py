"""A layout as a cube: slices to the right, stages down, replicas into the depth; which lines lie within a host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from minillm.parallel.layout import Layout
from minillm.parallel.numbering import ORDER, apart, neighbours, number_of, places_of
from minillm.viz.style import COMMUNICATION, FAINT, INK, STYLE, WIDTH, frame, legend, new_figure

HOSTS = ["#DCEBF7", "#FBE3C6", "#D6EFE4", "#F4DCEA", "#F8F3C4", "#E6E6E6", "#CFE8EC", "#EBD9C8"]  # pale, one a host
LINES = {"pp": 1.6, "tp": 5.0}  # thickness
MOST_POINTS, MOST_STEP = 25.0, 85.0  # across a rank, and from rank to rank
RIGHT, DOWN, DEPTH = (1.0, 0.0), (0.0, -1.0), (0.42, 0.36)


@dataclass(frozen=True)
class Arrangement:
    """A layout, the order in which its axes count, and what is said of it below its name."""

    layout: Layout
    order: Sequence[str] = ORDER
    note: str = ""


def draw_cube(
    layout: Layout,
    per_host: int,
    finding: str,
    caption: str,
    order: Sequence[str] = ORDER,
) -> Figure:
    """The ranks of a layout, numbered, on the colour of their host. Thick lines: sums, many a token; thin ones: one hidden
    state a token. Dotted where they leave a host.
    """
    figure, (axis,) = new_figure(3.4)
    _draw(axis, layout, per_host, order, WIDTH, 2.5)
    handles, names = _legend([layout], per_host)
    legend(axis, handles, names)
    return frame(figure, finding, caption)


def draw_arrangements(each: Sequence[Arrangement], per_host: int, finding: str, caption: str) -> Figure:
    """Small cubes beside each other, in two rows when they are more than four."""
    rows = 2 if len(each) > 4 else 1
    figure, axes = _grid(rows, -(-len(each) // rows))
    for place, axis in enumerate(axes):
        if place >= len(each):
            axis.axis("off")
            continue
        here = each[place]
        _draw(axis, here.layout, per_host, here.order, WIDTH * rows / (len(each) + rows - 1), 1.6)
        axis.set_title(str(here.layout).replace(",", ", "), fontsize=9.5)
        axis.text(0.5, -0.02, here.note, transform=axis.transAxes, ha="center", va="top", fontsize=9.5, color=INK)
    layouts = [here.layout for here in each]
    handles, names = _legend(layouts, per_host)
    below = 1 - 0.25 / figure.get_figheight()
    figure.legend(
        handles, names, ncols=len(names), loc="upper right", bbox_to_anchor=(1.0, below), borderaxespad=0.0, frameon=False, fontsize=9.5,
    )  # fmt: skip
    return frame(figure, f"{finding}\n", caption)  # the legend's line


def _grid(rows: int, columns: int) -> tuple[Figure, list[Any]]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.4 * rows + 0.6), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, [each for row in axes for each in row]


def _legend(layouts: Sequence[Layout], per_host: int) -> tuple[list[Any], list[str]]:
    """Hosts, where there are several, and what lines carry."""
    count = -(-max(layout.world_size for layout in layouts) // per_host)
    hosts = range(count) if count > 1 else range(0)
    handles: list[Any] = [Patch(facecolor=HOSTS[host % len(HOSTS)], edgecolor=FAINT) for host in hosts]
    names = [f"host {host}" for host in hosts]
    for axis, what in (("tp", "sums (tp)"), ("pp", "hidden states (pp)")):
        if any(getattr(layout, axis) > 1 for layout in layouts):
            handles.append(Line2D([], [], color=COMMUNICATION, linewidth=LINES[axis]))
            names.append(what)
    if count > 1:
        handles.append(Line2D([], [], color=COMMUNICATION, linewidth=3, linestyle=(0, (1.0, 1.0))))
        names.append("leaves a host")
    return handles, names


def _draw(axis: Any, layout: Layout, per_host: int, order: Sequence[str], width: float, height: float) -> None:
    """On axes of so many inches. How large a rank is, and how thick a line, follows from the room between ranks."""
    points = {tuple(place.values()): _point(place) for place in places_of(layout)}
    xs, ys = zip(*points.values())
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    spread = max(xs) - min(xs), max(ys) - min(ys)
    room = 72 * width - 1.3 * MOST_POINTS, 72 * height - 1.3 * MOST_POINTS
    unit = min(MOST_STEP, *(each / max(wanted, 0.01) for each, wanted in zip(room, spread)))
    size = min(MOST_POINTS, 0.64 * unit * (hypot(*DEPTH) if layout.dp > 1 else 1.0))
    for name, thick in LINES.items():
        for a, b in neighbours(layout, name):
            near, far = points[tuple(a.values())], points[tuple(b.values())]
            leaves = apart(layout, a, b, per_host, order)
            axis.plot(
                [near[0], far[0]], [near[1], far[1]], color=COMMUNICATION, linewidth=max(1.0, thick * size / MOST_POINTS),
                linestyle=(0, (1.0, 1.0)) if leaves else "-", zorder=1, solid_capstyle="butt",
            )  # fmt: skip
    for place in places_of(layout):
        x, y = points[tuple(place.values())]
        rank = number_of(layout, place, order)
        colour, front = HOSTS[rank // per_host % len(HOSTS)], 2 + 1 / (1 + place["dp"])
        axis.scatter([x], [y], s=size**2, color=colour, edgecolor=FAINT, linewidth=1.0, zorder=front)
        axis.text(x, y, str(rank), ha="center", va="center_baseline", fontsize=3.5 + 0.34 * size, color=INK, zorder=4)
    half = 36 * width / unit, 36 * height / unit
    axis.set(xlim=(middle[0] - half[0], middle[0] + half[0]), ylim=(middle[1] - half[1], middle[1] + half[1]))
    axis.set_aspect("equal")
    axis.axis("off")


def _point(place: dict[str, int]) -> tuple[float, float]:
    steps = list(zip((RIGHT, DOWN, DEPTH), (place["tp"], place["pp"], place["dp"])))
    return sum(dx * count for (dx, _), count in steps), sum(dy * count for (_, dy), count in steps)
