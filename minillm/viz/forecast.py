"""TetriInfer in pictures: what will be free when a candidate would start, as each of the three gates sees it; and rows of figures beside a
baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from minillm.policy.admission import GATES, Running
from minillm.viz.style import COMMUNICATION, DECODE, FAINT, GUESS, INK, KV_CACHE, PREFILL, frame, legend, new_figure
from minillm.viz.words import plain

BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}
COLOURS = {"greedy": PREFILL, "reserve-static": COMMUNICATION, "reserve-dynamic": DECODE}


def free_then(free: int, running: Sequence[Running], steps: int) -> int:
    """Tokens that are free after so many steps, if everybody gives what is thought: each takes one a step, and whoever ends gives all back."""
    total = free
    for each in running:
        total += each.tokens if each.to_come <= steps else -steps
    return total


def draw_forecast(tokens: int, to_come: int, free: int, running: Sequence[Running], caption: str) -> Figure:
    """Free memory over the steps to come without the candidate, and at what height each gate asks for room, and when."""
    figure, (axis, aside) = new_figure(3.6, [1, 0.42])
    aside.set(xlim=(0, 1), ylim=(0, 1))
    aside.axis("off")
    first = min((each.to_come for each in running), default=0)
    ends = max([each.to_come for each in running] + [to_come, 10])
    steps = list(range(min(ends, 3 * max(first, 20)) + 1))
    line = [free_then(free, running, step) for step in steps]
    axis.fill_between(steps, line, step="post", color=KV_CACHE, alpha=0.25, linewidth=0)
    axis.step(steps, line, where="post", color=KV_CACHE, linewidth=2.2)
    asks = {
        "greedy": (0, tokens + 1, "what it has, and a token"),
        "reserve-static": (0, tokens + to_come, "all of it, now"),
        "reserve-dynamic": (first, tokens + to_come, "all of it, when the first ends"),
    }
    says = {name: gate(tokens, to_come, free, running) for name, gate in GATES.items()}
    wide = steps[-1] or 1
    for place, (name, (when, need, words)) in enumerate(asks.items()):
        x = when + wide * 0.012 * (place if when == 0 else 0)
        axis.plot([x, x], [0, need], color=COLOURS[name], linewidth=4.5, solid_capstyle="butt", alpha=0.9)
        axis.plot(
            x, need, marker="o" if says[name] else "X", color=COLOURS[name], markersize=10, markeredgecolor="white"
        )
        aside.text(0, 0.9 - 0.32 * place, name, fontsize=11, weight="bold", color=COLOURS[name])
        verdict = "lets it in" if says[name] else "does not let it in"
        aside.text(0, 0.81 - 0.32 * place, f"{words}: {plain(need)}", fontsize=9.5, color=INK)
        aside.text(0, 0.72 - 0.32 * place, verdict, fontsize=9.5, color=INK if says[name] else GUESS)
    top = max([*line, tokens + to_come]) * 1.25
    axis.set(
        xlim=(-0.02 * wide, wide * 1.02),
        ylim=(min(0, *line), top),
        xlabel="decode steps from now",
        ylabel="tokens of cache free",
    )
    if min(line) < 0:
        axis.axhline(0, color=INK, linewidth=1.1)
        axis.text(
            wide,
            min(line) * 0.5,
            "nothing is free: somebody is put back",
            ha="right",
            va="center",
            fontsize=9.5,
            color=GUESS,
            bbox=BEHIND,
        )
    handles = [
        Line2D([], [], marker=each, color="none", markerfacecolor=INK, markeredgecolor="white", markersize=10)
        for each in "oX"
    ]
    legend(axis, [Line2D([], [], color=KV_CACHE, linewidth=3), *handles], ["free, as predicted", "enough", "too much"])
    let = [name for name, yes in says.items() if yes]
    finding = (
        "All three let it in"
        if len(let) == 3
        else "None lets it in"
        if not let
        else f"{' and '.join(let)} let{'s' * (len(let) == 1)} it in"
    )
    return frame(figure, finding[0].upper() + finding[1:], caption)


def draw_gates(
    rows: Mapping[str, Sequence[tuple[float, float, float]]],
    printed: Sequence[tuple[float, float, str]],
    finding: str,
    caption: str,
) -> Figure:
    """Completion time over greedy's, in percent, over the predictor's accuracy, (accuracy, mean, deviation); marks are what a paper prints."""
    figure, (axis,) = new_figure(3.5)
    for name, points in rows.items():
        right, values, deviations = zip(*points)
        axis.errorbar(
            [100 * each for each in right],
            [100 * each for each in values],
            yerr=[100 * each for each in deviations],
            color=COLOURS[name],
            marker="o",
            markersize=5,
            linewidth=2.0,
            capsize=2.5,
        )
    axis.axhline(100, color=COLOURS["greedy"], linewidth=2.0)
    for number, (x, y, name) in enumerate(printed):
        axis.plot(
            100 * x + (-1.2, 1.2)[number % 2],
            100 * y,
            marker="_",
            color=COLOURS[name],
            markersize=22,
            markeredgewidth=3.5,
        )
    handles = [Line2D([], [], color=COLOURS[name], linewidth=2.4) for name in ("greedy", *rows)]
    handles.append(Line2D([], [], color=INK, marker="_", markersize=14, markeredgewidth=3.5, linewidth=0))
    legend(axis, handles, ["greedy", *rows, "the paper"])
    axis.set(xlabel="how often the predictor names the right bucket (%)", ylabel="completion time (greedy = 100)")
    return frame(figure, finding, caption)


def draw_loads(
    rows: Mapping[str, tuple[Sequence[float], float | None]], name: str, finding: str, caption: str
) -> Figure:
    """A figure over a baseline's for each kind of load, seed by seed with mean and deviation, beside what a paper prints."""
    figure, (axis,) = new_figure(1.2 + 0.42 * len(rows))
    for place, (values, printed) in enumerate(rows.values()):
        axis.plot(values, [place] * len(values), "o", color=DECODE, alpha=0.2, markersize=6)
        axis.errorbar(
            mean(values), place, xerr=stdev(values), color=DECODE, marker="o", markersize=8, capsize=4, linewidth=2
        )
        if printed is not None:
            axis.plot([printed] * 2, [place - 0.34, place + 0.34], color=INK, linewidth=2.4)
        axis.text(
            1.0,
            place - 0.22,
            f"{plain(mean(values))}",
            transform=axis.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=9.5,
            color=DECODE,
        )
    axis.axvline(1.0, color=FAINT, linestyle=":", linewidth=1.3)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(0, 1.35), ylim=(len(rows) - 0.5, -0.6), xlabel=f"{name} over vLLM's, one instance with 16 places")
    handles = [Line2D([], [], color=DECODE, marker="o", linewidth=2), Line2D([], [], color=INK, linewidth=2.4)]
    legend(axis, handles, ["simulated, mean ± deviation", "the paper"])
    return frame(figure, finding, caption)
