"""DistServe's question in pictures: which layout for prefill and which for decode, what that gains, and how queues choose between a pipeline
and tensor parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from minillm.sim.surveys import RATES, Point, Queues, mean_ttft
from minillm.viz.style import DECODE, FAINT, GUESS, INK, PREFILL, WAITING, frame, legend, new_figure
from minillm.viz.words import plain

SHADES = LinearSegmentedColormap.from_list("goodput", ["#f7fbf9", "#7cc7ae", "#00674b"])


def _rate_text(value: float) -> str:
    """A rate in two digits; "none" for none, and "≥" for what was looked for no further."""
    return "none" if not value else f"≥ {value:.1f}" if value >= RATES[-1] else f"{value:.1f}"


def draw_goodput_map(
    pairs: Mapping[tuple[int, int], float], together: Mapping[str, float], finding: str, caption: str
) -> Figure:
    """Goodput for each GPU: a cell for each pair of tensor parallel ranks, of a prefill and of a decode instance, the best one framed; beside
    them the best pair and ways in which all instances do both.
    """
    figure, (grid, bars) = new_figure(3.6, [1.15, 1])
    rows, columns = (sorted({pair[side] for pair in pairs}) for side in (0, 1))
    most = max([*pairs.values(), *together.values(), 1e-9])
    best = max(pairs, key=lambda pair: pairs[pair])
    for (prefill, decode), value in pairs.items():
        x, y = columns.index(decode), rows.index(prefill)
        grid.add_patch(Rectangle((x, y), 0.96, 0.92, facecolor=SHADES(value / most), edgecolor="none"))
        colour = "white" if value > 0.55 * most else INK
        grid.text(
            x + 0.48,
            y + 0.4,
            _rate_text(value),
            ha="center",
            va="center",
            fontsize=14,
            color=colour,
            weight="bold",
        )
        grid.text(x + 0.48, y + 0.75, f"{prefill + decode} GPUs", ha="center", va="center", fontsize=9, color=colour)
        if (prefill, decode) == best and value:
            grid.add_patch(Rectangle((x, y), 0.96, 0.92, facecolor="none", edgecolor=GUESS, linewidth=2.6))
    grid.set(
        xlim=(0, len(columns)),
        ylim=(len(rows), 0),
        xlabel="decode instance: tensor parallel ranks",
        ylabel="prefill instance: ranks",
    )
    grid.set_xticks([each + 0.48 for each in range(len(columns))], [str(each) for each in columns])
    grid.set_yticks([each + 0.46 for each in range(len(rows))], [str(each) for each in rows])
    grid.tick_params(length=0)
    for side in grid.spines.values():
        side.set_visible(False)
    named = {f"apart, {best[0]} and {best[1]}": pairs[best], **together}
    for place, value in enumerate(named.values()):
        bars.barh(place, value, height=0.6, color=SHADES(pairs[best] / most) if place == 0 else WAITING)
        bars.text(value + 0.02 * most, place, _rate_text(value), va="center", fontsize=10.5)
    bars.set_yticks(range(len(named)), list(named))
    bars.set(xlim=(0, 1.18 * most), ylim=(len(named) - 0.4, -0.6), xlabel="goodput: requests/s for each GPU")
    bars.tick_params(axis="y", length=0)
    return frame(figure, finding, caption)


def draw_attainment(
    ways: Mapping[str, Sequence[Point]], printed: Mapping[str, float], finding: str, caption: str
) -> Figure:
    """The share of requests within the goals over the rate for each GPU, with the deviation from seed to seed; dashed, the rate at which 90 %
    are within them as a paper prints it.
    """
    figure, (axis,) = new_figure(3.7)
    for share in (80, 90):
        axis.axhline(share, color=FAINT, linewidth=1.0, linestyle=":")
    handles: list[Any] = []
    for (name, points), colour in zip(ways.items(), (DECODE, PREFILL, FAINT)):
        rates, shares, deviations = zip(*points)
        percent, up = [100 * each for each in shares], [100 * each for each in deviations]
        bars = [list(map(min, up, percent)), [min(each, 100 - share) for each, share in zip(up, percent)]]
        axis.errorbar(rates, percent, yerr=bars, color=colour, marker="o", markersize=4.5, linewidth=2.0, capsize=2.5)
        handles.append(Line2D([], [], color=colour, linewidth=2.4))
        if name in printed:
            axis.axvline(printed[name], color=colour, linestyle=(0, (2, 2)), linewidth=1.8)
            axis.annotate(
                f"printed: {plain(printed[name])}", (printed[name], 4), xytext=(4, 0), textcoords="offset points", fontsize=9.5,
                color=colour,
            )  # fmt: skip
    axis.set(ylim=(0, 104), xlabel="requests/s for each GPU", ylabel="requests within both goals (%)")
    axis.set_yticks([0, 20, 40, 60, 80, 90])
    axis.set_xlim(left=0)
    legend(axis, handles, list(ways))
    return frame(figure, finding, caption)


def draw_phases(
    times_ms: Mapping[str, tuple[float, float]], finding: str, caption: str, guess: float | None = None
) -> Figure:
    """Prefill and decode on one rank and on several: how many times faster, and how much of that a rank gives. `times_ms` maps a number of
    ranks, as text, to (prefill, decode), one rank first; `guess` is drawn over decode.
    """
    figure, axes = new_figure(2.9, [1, 1])
    first = next(iter(times_ms.values()))
    for number, (axis, name, colour) in enumerate(zip(axes, ("prefill", "decode step"), (PREFILL, DECODE))):
        for place, times in enumerate(times_ms.values()):
            gain = first[number] / times[number]
            axis.barh(place, gain, height=0.58, color=colour, alpha=1.0 if place else 0.5)
            axis.text(
                gain + 0.03,
                place,
                f"{plain(times[number])} ms: {plain(gain)} ×" if place else f"{plain(times[number])} ms",
                va="center",
                fontsize=10,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
            )
        axis.set_yticks(
            range(len(times_ms)), [f"{each} rank{'s' * (each != '1')}" for each in times_ms] if number == 0 else []
        )
        axis.set(xlim=(0, 2.6), ylim=(len(times_ms) - 0.4, -0.6), xlabel=f"{name}: times as fast as one rank")
        axis.axvline(2.0, color=FAINT, linestyle=":", linewidth=1.1)
        axis.text(2.03, len(times_ms) - 0.55, "twice", color=FAINT, fontsize=9.5, va="bottom")
        axis.tick_params(axis="y", length=0)
    if guess is not None:
        axes[1].axvline(guess, color=GUESS, linestyle="--", linewidth=1.8)
        axes[1].text(guess, -0.52, " you", color=GUESS, fontsize=9.5, va="top")
    return frame(figure, finding, caption)


def draw_queues(curves: Mapping[str, Queues], now: float, caption: str) -> Figure:
    """Mean time to the first token over the load: a line by formula and dots by simulation for each way; at the load `now` the best is named."""
    figure, (axis,) = new_figure(3.5)
    handles = []
    at = {name: mean_ttft(now, *each.form) for name, each in curves.items()}
    most = max(time for time in at.values() if time < float("inf"))
    for each, colour in zip(curves.values(), (DECODE, PREFILL)):
        handles += axis.plot(each.loads, each.times, color=colour, linewidth=2.2)
        axis.plot(*zip(*each.dots), "o", color=colour, markersize=6, markerfacecolor="white", markeredgewidth=1.8)
        most = max(most, *(time for _, time in each.dots))
    axis.axvline(now, color=INK, linestyle=":", linewidth=1.2)
    axis.set(
        ylim=(0, 1.15 * most),
        xlabel="load: requests/s × seconds of one prompt on one device",
        ylabel="mean TTFT (prompt times)",
    )
    axis.set_xlim(left=0)
    handles.append(
        Line2D([], [], marker="o", color="none", markeredgecolor=INK, markerfacecolor="white", markeredgewidth=1.8)
    )
    legend(axis, handles, [*curves, "simulated"])
    first, second = sorted(at, key=lambda name: at[name])
    takes = "takes" if second == "a pipeline" else "take"
    finding = f"Load {now}: {second} {takes} {at[second] / at[first]:.2f} times as long as {first}"
    if at[second] == float("inf"):
        finding = f"Load {now}: {second} cannot keep up"
    return frame(figure, finding, caption)
