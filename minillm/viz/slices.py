"""One step on one, two, four … devices that share every layer: what computing and reading take, and what the sums take."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.hardware.devices import Device, Link
from minillm.model.config import ModelConfig
from minillm.parallel.layout import Layout
from minillm.parallel.plan import Load, StepTime, step_time
from minillm.viz.style import COMMUNICATION, DECODE, FAINT, PREFILL, frame, legend, new_figure
from minillm.viz.words import plain, time_unit

COUNTS = (1, 2, 4, 8, 16)


def draw_slices(device: Device, link: Link, config: ModelConfig, dtype: str, load: Load, caption: str) -> Figure:
    """A bar for each number of devices, computing and sums, hatched where weights and KV do not fit. The dotted line is the least
    number that holds them. For single tokens it is any pipeline too; a prompt may go through one in pieces.
    """
    counts = [count for count in COUNTS if count <= config.heads]
    times = [step_time(Layout(tp=count), device, link, config, dtype, load) for count in counts]
    least = next((row for row, time in enumerate(times) if time.fits), None)
    colour = DECODE if load.tokens == 1 else PREFILL
    scale, unit = time_unit(max(time.total_s for time in times))
    most = max(time.total_s for time in times) * scale
    figure, (axis,) = new_figure(3.3)
    for row, time in enumerate(times):
        looks = {} if time.fits else {"facecolor": "white", "edgecolor": FAINT, "hatch": "////"}
        axis.barh(row, time.computed_s * scale, height=0.62, **looks or {"color": colour})
        axis.barh(
            row, time.summed_s * scale, left=time.computed_s * scale, height=0.62, **looks or {"color": COMMUNICATION}
        )
        beside = _beside(times[least], time) if least is not None and time.fits and row != least else ""
        said = f"{plain(time.total_s * scale)} {unit}{beside}" if time.fits else "does not fit"
        place = axis.annotate(
            said, (time.total_s * scale, row), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9.5
        )
        place.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.0})
    if least is not None:
        at, who = times[least].total_s * scale, "one device" if least == 0 else f"{counts[least]} devices"
        axis.axvline(at, color=FAINT, linewidth=1.3, linestyle=":", zorder=0)
        also = ", or any pipeline" if load.tokens == 1 and least == 0 else ""
        axis.text(at, -0.5, f" {who}{also}", color=FAINT, fontsize=9, va="bottom")
    axis.set(xlabel=f"{unit} for a step", ylabel="devices", ylim=(len(counts) - 0.4, -0.9), xlim=(0, most * 1.2))
    axis.set_yticks(range(len(counts)), [str(count) for count in counts])
    axis.tick_params(axis="y", length=0)
    legend(
        axis,
        [Patch(color=colour), Patch(color=COMMUNICATION)],
        ["computes and reads, the fullest rank", "sums"],
    )
    heads = "" if counts == list(COUNTS) else f" · {config.heads} heads, so at most {config.heads} devices"
    return frame(figure, _finding(counts, times), caption + heads)


def _finding(counts: list[int], times: list[StepTime]) -> str:
    rows = [row for row, time in enumerate(times) if time.fits]
    if not rows:
        return f"Not even {counts[-1]} devices hold the weights"
    least, best = rows[0], min(rows, key=lambda row: times[row].total_s)
    few = "one" if least == 0 else f"{counts[least]}, the least that hold it"
    gain = times[least].total_s / times[best].total_s
    if best == least:
        who = "One device is" if least == 0 else f"{counts[least]} devices hold it, and are"
        if least == len(times) - 1:
            return f"{who} all there is"
        slower = times[least + 1].total_s / times[least].total_s
        return f"{who} fastest; {counts[least + 1]} take {plain(slower)} times as long"
    said = f"{counts[best]} devices are fastest, {plain(gain)} times as fast as {few}"
    if best == len(times) - 1:
        return f"{said}; sums are {times[best].summed_s / times[best].total_s:.0%} of their time"
    return f"{said}; with more, sums cost more than they save"


def _beside(one: StepTime, many: StepTime) -> str:
    gain = one.total_s / many.total_s
    return f", {plain(gain)} × as fast" if gain >= 1 else f", {plain(1 / gain)} × as long"
