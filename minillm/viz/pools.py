"""The blocks of several ranks' KV caches: a row of cells each, those in use full."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from minillm.viz.style import FAINT, INK, KV_CACHE, frame, new_figure

FREE = "#f4f4f4"


def draw_pools(used: Sequence[int], blocks: int, finding: str, caption: str) -> Figure:
    """`used` blocks of each rank's `blocks`."""
    figure, (axis,) = new_figure(0.9 + 0.42 * len(used))
    for rank, count in enumerate(used):
        for block in range(blocks):
            colour = KV_CACHE if block < count else FREE
            axis.add_patch(Rectangle((block, rank + 0.12), 0.9, 0.76, facecolor=colour, edgecolor=FAINT, linewidth=0.5))
        axis.text(blocks + 0.15, rank + 0.5, f"{count} of {blocks} blocks", va="center", fontsize=10, color=INK)
    axis.set(xlim=(0, blocks * 1.25), ylim=(len(used), 0), xticks=[])
    axis.set_yticks([rank + 0.5 for rank in range(len(used))], [f"rank {rank}" for rank in range(len(used))])
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    return frame(figure, finding, caption)
