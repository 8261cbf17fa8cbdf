"""A layout as a cube: slices to the right, stages down, replicas into the depth; which lines lie within a host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from minillm.parallel.layout import Layout
from minillm.viz.style import COMMUNICATION, FAINT, INK, frame, legend, new_figure

HOSTS = ["#DCEBF7", "#FBE3C6", "#D6EFE4", "#F4DCEA", "#F8F3C4", "#E6E6E6", "#CFE8EC", "#EBD9C8"]  # pale, one a host
AXES = ("dp", "pp", "tp")
RIGHT, DOWN, DEPTH = (1.0, 0.0), (0.0, -1.0), (0.42, 0.36)


def number_of(layout: Layout, place: dict[str, int], order: Sequence[str] = AXES) -> int:
    """The rank at a place on the mesh, when axes count in this order, the last one fastest. Ours is dp, pp, tp."""
    rank = 0
    for axis in order:
        rank = rank * getattr(layout, axis) + place[axis]
    return rank


def places_of(layout: Layout) -> list[dict[str, int]]:
    """All places on the mesh."""
    return [
        {"dp": dp, "pp": pp, "tp": tp} for dp in range(layout.dp) for pp in range(layout.pp) for tp in range(layout.tp)
    ]


def neighbours(layout: Layout, axis: str) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Pairs of places that are next to each other along an axis."""
    return [
        (place, place | {axis: place[axis] + 1})
        for place in places_of(layout)
        if place[axis] + 1 < getattr(layout, axis)
    ]


def crossing(layout: Layout, axis: str, per_host: int, order: Sequence[str] = AXES) -> bool:
    """Whether some line along an axis leaves its host, with `per_host` ranks on each."""
    return any(
        number_of(layout, a, order) // per_host != number_of(layout, b, order) // per_host
        for a, b in neighbours(layout, axis)
    )


def draw_cube(
    layout: Layout, per_host: int, finding: str, caption: str, order: Sequence[str] = AXES
) -> Figure:  # fmt: skip
    """The ranks of a layout, numbered, on the colour of their host. Thick lines: sums, many a token; thin ones: one hidden
    state a token. Dotted where they leave a host.
    """
    figure, (axis,) = new_figure(3.4)
    _draw(axis, layout, per_host, order, 1.0)
    hosts = -(-layout.world_size // per_host)
    handles: list[Any] = [Patch(facecolor=HOSTS[host % len(HOSTS)], edgecolor=FAINT) for host in range(hosts)]
    names = [f"host {host}" for host in range(hosts)]
    for on, width, name in ((layout.tp > 1, 5, "sums (tp)"), (layout.pp > 1, 1.6, "hidden states (pp)")):
        if on:
            handles.append(Line2D([], [], color=COMMUNICATION, linewidth=width))
            names.append(name)
    legend(axis, handles, names)
    return frame(figure, finding, caption)


def draw_arrangements(layouts: Sequence[Layout], per_host: int, finding: str, caption: str) -> Figure:
    """Small cubes beside each other, two rows of them."""
    import matplotlib as mpl

    from minillm.viz.style import STYLE, WIDTH

    columns = -(-len(layouts) // 2)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        axes = figure.subplots(2, columns, squeeze=False)
    for place, axis in enumerate(each for row in axes for each in row):
        if place < len(layouts):
            _draw(axis, layouts[place], per_host, AXES, 0.5)
            axis.set_title(str(layouts[place]).replace(",", ", "), fontsize=9.5)
        else:
            axis.axis("off")
    return frame(figure, finding, caption)


def _draw(axis: Any, layout: Layout, per_host: int, order: Sequence[str], scale: float) -> None:
    points = {}
    for place in places_of(layout):
        steps = zip((RIGHT, DOWN, DEPTH), (place["tp"], place["pp"], place["dp"]))
        moved = [(dx * count, dy * count) for (dx, dy), count in steps]
        points[tuple(place.values())] = sum(dx for dx, _ in moved), sum(dy for _, dy in moved)
    for name, width in (("pp", 1.6), ("tp", 5.0)):
        for a, b in neighbours(layout, name):
            near, far = points[tuple(a.values())], points[tuple(b.values())]
            leaves = number_of(layout, a, order) // per_host != number_of(layout, b, order) // per_host
            axis.plot(
                [near[0], far[0]], [near[1], far[1]], color=COMMUNICATION, linewidth=width * scale,
                linestyle=(0, (1.0, 1.2)) if leaves else "-", zorder=1, solid_capstyle="butt",
            )  # fmt: skip
    for place in reversed(places_of(layout)):  # the front last
        x, y = points[tuple(place.values())]
        rank = number_of(layout, place, order)
        axis.scatter(
            [x], [y], s=620 * scale**2, color=HOSTS[rank // per_host % len(HOSTS)], edgecolor=FAINT, linewidth=1.0, zorder=2 + 1 / (1 + place["dp"])
        )  # fmt: skip
        axis.text(x, y, str(rank), ha="center", va="center", fontsize=11 * scale + 1, color=INK, zorder=4)
    xs, ys = zip(*points.values())
    half = max(max(xs) - min(xs), max(ys) - min(ys)) / 2 + 0.55
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    axis.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half))
    axis.set_aspect("equal")
    axis.axis("off")
