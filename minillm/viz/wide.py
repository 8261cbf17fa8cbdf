"""One layer's experts over few and over very many devices: dispatch, the experts, combine, end to end."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.parallel.wide import ExpertsTime
from minillm.viz.style import COMMUNICATION, DECODE, FAINT, PREFILL, frame, legend, new_figure
from minillm.viz.words import plain, time_unit


def draw_wide(times: Sequence[ExpertsTime], caption: str) -> Figure:
    """A bar for each number of devices, hatched where the weights do not fit. The finding names the fastest that fits."""
    scale, unit = time_unit(max(time.total_s for time in times))
    most = max(time.total_s for time in times) * scale
    figure, (axis,) = new_figure(1.3 + 0.42 * len(times))
    for row, time in enumerate(times):
        reads = time.reads_s > time.computes_s
        parts = [
            (time.dispatch_s, COMMUNICATION), (time.experts_s, DECODE if reads else PREFILL), (time.combine_s, COMMUNICATION)
        ]  # fmt: skip
        begin = 0.0
        for seconds, colour in parts:
            looks = {"color": colour} if time.fits else {"facecolor": "white", "edgecolor": FAINT, "hatch": "////"}
            axis.barh(row, seconds * scale, left=begin, height=0.64, linewidth=0.6 if not time.fits else 0, **looks)
            begin += seconds * scale
        said = f"{plain(begin)} {unit}" if time.fits else "does not fit"
        axis.annotate(said, (begin, row), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9.5)
    axis.set(xlabel=f"{unit} for the experts of one layer", ylim=(len(times) - 0.4, -0.6), xlim=(0, most * 1.14))
    names = [f"{time.ranks} devices, {time.held} expert{'s' if time.held > 1 else ''} each" for time in times]
    axis.set_yticks(range(len(times)), names)
    axis.tick_params(axis="y", length=0)
    handles = [Patch(color=colour) for colour in (COMMUNICATION, DECODE, PREFILL)]
    legend(axis, handles, ["dispatch, combine", "experts, bound by reading weights", "bound by computing"])
    return frame(figure, _finding(times), caption)


def _finding(times: Sequence[ExpertsTime]) -> str:
    fitting = [time for time in times if time.fits]
    if not fitting:
        return "The experts fit on none of these"
    least, best = fitting[0], min(fitting, key=lambda time: time.total_s)
    messages = (best.dispatch_s + best.combine_s) / best.total_s
    gain = least.total_s / best.total_s
    if best is least:
        return f"{best.ranks} devices, the fewest that hold it, are fastest; messages take {messages:.0%}"
    if gain < 1.05:
        return f"Wider gains little: messages take {messages:.0%} of {best.ranks} devices' time"
    return f"{best.ranks} devices: {plain(gain)} times as fast as {least.ranks}, the fewest that hold it; messages take {messages:.0%}"
