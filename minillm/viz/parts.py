"""What users wait for under several ways to serve: time to the first token, then to the last, a bar for each way."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.viz.style import DECODE, PREFILL, frame, legend, new_figure
from minillm.viz.words import plain


def draw_parts(ways: Mapping[str, tuple[float, float, int]], finding: str, caption: str) -> Figure:
    """A bar for each way: (mean seconds to the first token, to the last, how often a request was put back)."""
    figure, (axis,) = new_figure(1.3 + 0.5 * len(ways))
    most = max(last for _, last, _ in ways.values())
    for place, (first, last, preemptions) in enumerate(ways.values()):
        axis.barh(place, first, height=0.62, color=PREFILL)
        axis.barh(place, last - first, left=first, height=0.62, color=DECODE)
        said = f"{plain(last)} s, first token after {plain(first)} s"
        said += f", {preemptions} put back" if preemptions else ""
        axis.text(last + 0.01 * most, place, said, va="center", fontsize=10)
    axis.set_yticks(range(len(ways)), list(ways))
    axis.set(xlim=(0, 1.75 * most), ylim=(len(ways) - 0.4, -0.6), xlabel="seconds, mean over requests")
    axis.tick_params(axis="y", length=0)
    legend(axis, [Patch(color=PREFILL), Patch(color=DECODE)], ["until the first token", "until the last"])
    return frame(figure, finding, caption)
