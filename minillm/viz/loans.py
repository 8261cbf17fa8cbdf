"""Instances that lend each other blocks of their KV caches: who holds what, now and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minillm.viz.style import FAINT, INK, frame, legend, new_figure

SHADES = ["#00583f", "#7fcfb9", "#009E73"]  # of the KV cache's green: whose requests a block is of
FREE = "#f4f4f4"

Held = Sequence[Mapping[int, int]]  # of each instance's blocks those in use, by the instance whose requests they are of


def draw_held(held: Held, blocks: int, notes: Sequence[str], finding: str, caption: str) -> Figure:
    """A row of cells for each instance's `blocks`; colours say whose requests they are of, `notes` stand at the right."""
    figure, (axis,) = new_figure(1.25 + 0.42 * len(held))
    for row, there in enumerate(held):
        owners = [who for who in sorted(there, key=lambda who: (who != row, who)) for _ in range(there[who])]
        for block in range(blocks):
            colour = SHADES[owners[block] % len(SHADES)] if block < len(owners) else FREE
            axis.add_patch(Rectangle((block, row + 0.12), 0.9, 0.76, facecolor=colour, edgecolor=FAINT, linewidth=0.5))
        axis.text(blocks + 0.15, row + 0.5, notes[row], va="center", fontsize=10, color=INK)
    axis.set(xlim=(0, blocks * 1.45), ylim=(len(held), 0), xticks=[])
    axis.set_yticks([row + 0.5 for row in range(len(held))], [f"instance {row}" for row in range(len(held))])
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    legend(axis, *_key(len(held)))
    return frame(figure, finding, caption)


def draw_lending(
    history: Sequence[tuple[float, Held]], blocks: int, marks: Mapping[str, float], finding: str, caption: str
) -> Figure:
    """Over time, in seconds: the blocks of each instance in use, in the colours of `draw_held`; `marks` are moments with names.

    Raises `ValueError` for an empty history.
    """
    if not history:
        raise ValueError("nothing has been heard yet")
    instances = len(history[0][1])
    figure, axes = new_figure(3.3, [1.0] * instances)
    times = [when for when, _ in history]
    for row, axis in enumerate(axes):
        owners = sorted(range(instances), key=lambda who: (who != row, who))
        series = [[held[row].get(who, 0) for _, held in history] for who in owners]
        axis.stackplot(times, series, colors=[SHADES[who % len(SHADES)] for who in owners], step="post")
        axis.axhline(blocks, color=INK, linewidth=1.1, linestyle=":")
        for name, when in marks.items():
            axis.axvline(when, color=FAINT, linewidth=1.1, linestyle=":")
            axis.text(when, 1.02 * blocks, f" {name}", va="bottom", ha="left", fontsize=9, color=FAINT)
        axis.set(xlim=(times[0], times[-1]), ylim=(0, 1.18 * blocks), xlabel="time (s)")
        axis.set_title(f"instance {row}: {blocks} blocks", fontsize=10.5, color=INK, loc="left")
        axis.set_ylabel("blocks in use" if row == 0 else "")
    handles, names = _key(instances)
    figure.legend(
        handles, names, ncols=instances, loc="upper right", bbox_to_anchor=(1.0, 0.93), borderaxespad=0.0, frameon=False,
        fontsize=9.5,
    )  # fmt: skip
    return frame(figure, f"{finding}\n", caption)


def _key(instances: int) -> tuple[list[Patch], list[str]]:
    patches = [Patch(facecolor=SHADES[who % len(SHADES)], edgecolor=FAINT) for who in range(instances)]
    return patches, [f"of instance {who}'s requests" for who in range(instances)]
