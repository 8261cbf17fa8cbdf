"""What waiting costs: waits against load, by formula and as measured; routers beside each other; one replica beside two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from matplotlib.figure import Figure

from minillm.sim.queue import mean_wait, wait_percentile
from minillm.trace.metrics import Estimate
from minillm.viz.style import DECODE, FAINT, GUESS, INK, PREFILL, WAITING, frame, new_figure
from minillm.viz.words import plain

LOADS = [percent / 1000 for percent in range(25, 951, 25)]
COLOURS = {"round-robin": PREFILL, "least-tokens": DECODE}


@dataclass(frozen=True)
class Measured:
    """Waits of some requests in service times, and the share of time in which their server was busy."""

    load: float
    waits: Sequence[float]

    @property
    def error(self) -> float:
        """Two standard errors of their mean, if requests were independent; they are not quite."""
        return 2 * stdev(self.waits) / math.sqrt(len(self.waits))


def draw_waits(runs: Sequence[Measured], finding: str, caption: str, guess: float | None = None) -> Figure:
    """Mean and P99 of the wait against load, M/D/1, and on them the mean of each run. `guess`: how many times longer the learner
    expected the mean wait to be at 90 % than at 50 %.
    """
    figure, (axis,) = new_figure(4.0)
    middle, worst = [mean_wait(load) for load in LOADS], [wait_percentile(load, 99) for load in LOADS]
    places = [100 * load for load in LOADS]
    axis.fill_between(places, middle, worst, color=WAITING, alpha=0.5, linewidth=0)
    for values, name, colour, at, place, side in (
        (worst, "99 of 100 wait less", FAINT, LOADS.index(0.75), (-8, 6), "right"),
        (middle, "mean, ρ / 2 (1 − ρ)", INK, -1, (8, 0), "left"),
    ):
        axis.plot(places, values, color=colour, linewidth=2)
        axis.annotate(
            name,
            (places[at], values[at]),
            xytext=place,
            textcoords="offset points",
            ha=side,
            color=colour,
            fontsize=9.5,
        )
    for run in runs:
        axis.errorbar(
            100 * run.load, mean(run.waits), yerr=run.error, fmt="o", color=DECODE, markersize=7, capsize=3, zorder=3
        )
    if runs:
        first = min(runs, key=lambda run: run.load)
        axis.annotate(
            "measured mean", (100 * first.load, mean(first.waits)), xytext=(0, 9), textcoords="offset points", color=DECODE,
            fontsize=9.5, ha="center",
        )  # fmt: skip
    if guess is not None:
        level = min(guess * mean_wait(0.5), 27.0)
        axis.hlines(level, 86, 94, color=GUESS, linewidth=2, linestyle="--", zorder=4)
        aside = level - 1.6 if abs(level - middle[-1]) < 1.6 else level  # of the curve's own name
        axis.text(96, aside, f"your guess, {plain(guess)} ×", ha="left", va="center", color=GUESS, fontsize=9.5)
    axis.set(xlabel="how busy the server is (%)", ylabel="wait, in service times", xlim=(0, 112), ylim=(-0.6, 28))
    axis.set_xticks(range(0, 101, 20))
    return frame(figure, finding, caption)


def draw_routers(curves: Mapping[str, Sequence[tuple[float, Estimate]]], finding: str, caption: str) -> Figure:
    """A curve for each router: load -> P99 in mean service times with the interval that its sampling error leaves, where that is known."""
    figure, (axis,) = new_figure(3.8)
    for name, points in curves.items():
        places = [100 * load for load, _ in points]
        values = [estimate.value for _, estimate in points]
        low = [estimate.low if estimate.low is not None else estimate.value for _, estimate in points]
        high = [estimate.high if estimate.high is not None else estimate.value for _, estimate in points]
        colour = COLOURS.get(name, INK)
        axis.fill_between(places, low, high, color=colour, alpha=0.2, linewidth=0)
        axis.plot(places, values, "o-", color=colour, linewidth=2, markersize=5)
    ends = sorted((points[-1][1].value, name) for name, points in curves.items())
    most = max((points[-1][1].high or points[-1][1].value) for points in curves.values()) or 1.0
    level = -math.inf
    for value, name in ends:  # labels that do not touch
        level = max(value, level + 0.075 * most)
        axis.text(100 * curves[name][-1][0] + 1.2, level, name, color=COLOURS.get(name, INK), va="center", fontsize=9.5)
    axis.set(
        xlabel="how busy the replicas are (%)",
        ylabel="P99 of the wait, in mean service times",
        ylim=(0, 1.08 * most),
        xlim=(None, 100 * points[-1][0] + 14),
    )
    return frame(figure, finding, caption)


def draw_bought(answer_s: Mapping[str, float], tokens_per_s: Mapping[str, float], finding: str, caption: str) -> Figure:
    """Beside each other: how long one answer takes, and how many tokens a second all get, for each number of replicas."""
    figure, axes = new_figure(2.5, [1, 1])
    for axis, values, title, unit, colour in (
        (axes[0], answer_s, "one answer, nobody else", "s", PREFILL),
        (axes[1], tokens_per_s, "sixteen at once", "tokens/s", DECODE),
    ):
        names, most = list(values), max(values.values())
        axis.barh(range(len(names)), list(values.values()), height=0.6, color=colour)
        for row, name in enumerate(names):
            axis.text(values[name] + most * 0.02, row, f"{plain(values[name])} {unit}", va="center", fontsize=9.5)
        axis.set_yticks(range(len(names)), names)
        axis.tick_params(axis="y", length=0)
        axis.set(xlabel=unit, xlim=(0, most * 1.38), ylim=(len(names) - 0.4, -0.6))
        axis.set_title(title, loc="left", fontsize=10.5)
    return frame(figure, finding, caption)
