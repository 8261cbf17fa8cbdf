"""Layouts beside two goals: the time to the first token, and the time for each one after it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from minillm.parallel.layout import Layout
from minillm.viz.style import DECODE, FAINT, GUESS, INK, PREFILL, WAITING, frame, legend, new_figure

Times = tuple[float, float]  # of the first token, and of the next ones


def draw_goals(
    planned: Mapping[Layout, Times], ran: Mapping[Layout, Times], goals: Times, finding: str, caption: str,
    too_large: Collection[Layout] = (),
) -> Figure:  # fmt: skip
    """A row for each layout, fewest devices above. Rings are planned, dots ran; all in times of what one device takes. Of
    layouts that are `too_large` for the devices only the names stand there.
    """
    figure, axes = new_figure(0.9 + 0.27 * len(planned), [1, 1])
    rows = sorted(planned, key=lambda layout: (layout.world_size, planned[layout]))
    fit = [each for each in rows if each not in too_large]
    names = (("first token, all prompts read", PREFILL), ("each next token", DECODE))
    for number, (axis, goal, (name, colour)) in enumerate(zip(axes, goals, names)):
        _draw_side(axis, {rows.index(each): planned[each][number] for each in fit}, goal, colour)
        for layout, times in ran.items():
            axis.plot(times[number], rows.index(layout), "o", color=colour, markersize=8, zorder=3)
        axis.set(xlabel=f"{name} (× one device)", ylim=(len(rows) - 0.5, -0.8))
        axis.tick_params(axis="y", length=0)
        axis.set_yticks(range(len(rows)), [_named(each, each in fit) for each in rows] if number == 0 else [])
    ring = Line2D([], [], marker="o", color="none", markeredgecolor=INK, markerfacecolor="white")
    dot = Line2D([], [], marker="o", color="none", markeredgecolor=INK, markerfacecolor=INK)
    legend(axes[1], [ring, dot, Line2D([], [], color=GUESS, linewidth=1.6)], ["planned", "ran here", "goal"])
    return frame(figure, finding, caption)


def _draw_side(axis: Any, planned: Mapping[int, float], goal: float, colour: str) -> None:
    most = 1.15 * max(*planned.values(), goal, 1.0)
    axis.axvspan(0, goal, color=WAITING, alpha=0.35, linewidth=0)
    axis.axvline(goal, color=GUESS, linewidth=1.6)
    axis.axvline(1.0, color=FAINT, linewidth=1.0, linestyle=":")
    axis.scatter(
        list(planned.values()), list(planned), s=55, facecolor="white", edgecolor=colour, linewidth=1.6, zorder=2
    )
    axis.set_xlim(0, most)


def _named(layout: Layout, fits: bool) -> str:
    count = layout.world_size
    name = f"{layout}: {count} devices" if count > 1 else "one device"
    return name if fits else f"{name}: too large"
