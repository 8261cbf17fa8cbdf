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

EXACT = 115  # where it is drawn that lengths are known
BEHIND = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.0}
COLOURS = {"greedy": PREFILL, "reserve-static": COMMUNICATION, "reserve-dynamic": DECODE}


def free_then(free: int, running: Sequence[Running], steps: int) -> int:
    """Tokens that are free after so many steps, if everybody gives what is thought: each takes one a step, and whoever ends gives all back."""
    total = free
    for each in running:
        total += each.tokens if each.to_come <= steps else -steps
    return total


def draw_forecast(tokens: int, to_come: int, free: int, running: Sequence[Running], caption: str) -> Figure:
    """Free memory over the steps to come without the candidate and, if it can start, with it; at what height each gate asks for room, and when."""
    figure, (axis, aside) = new_figure(3.6, [1, 0.42])
    aside.set(xlim=(0, 1), ylim=(0, 1))
    aside.axis("off")
    first = min((each.to_come for each in running), default=0)
    ends = max([each.to_come for each in running] + [to_come, 10])
    steps = list(range(min(ends, 3 * max(first, 20)) + 1))
    line = [free_then(free, running, step) for step in steps]
    axis.fill_between(steps, line, step="post", color=KV_CACHE, alpha=0.25, linewidth=0)
    axis.step(steps, line, where="post", color=KV_CACHE, linewidth=2.2)
    let_in = line
    if tokens + 1 <= free:
        let_in = [free_then(free - tokens, [*running, Running(tokens, to_come)], step) for step in steps]
        axis.step(steps, let_in, where="post", color=INK, linewidth=1.6, linestyle="--")
    says = {name: gate(tokens, to_come, free, running) for name, gate in GATES.items()}
    wide = steps[-1] or 1
    for place, (name, needs) in enumerate(_needs(tokens, to_come, first, running).items()):
        aside.text(0, 0.92 - 0.34 * place, name, fontsize=11, weight="bold", color=COLOURS[name])
        for number, (when, need, words) in enumerate(needs):
            there = free_then(free, running, when) if when else free
            x = when or wide * 0.014 * (place - 3)  # all three ask now, side by side before the first step
            marker = "o" if need <= there else "X"
            axis.plot([x, x], [0, need], color=COLOURS[name], linewidth=4.5, solid_capstyle="butt", alpha=0.9)
            axis.plot(x, need, marker=marker, color=COLOURS[name], markersize=10, markeredgecolor="white")
            said = f"{plain(need)} {words}, {plain(there)} free"
            aside.text(
                0, 0.84 - 0.34 * place - 0.08 * number, said, fontsize=9.5, color=INK if need <= there else GUESS
            )
        verdict, colour = ("lets it in", INK) if says[name] else ("does not let it in", GUESS)
        below = 0.84 - 0.34 * place - 0.08 * len(needs)
        aside.text(0, below, verdict, fontsize=9.5, weight="bold", color=colour)
    top = max([*line, tokens + to_come]) * 1.25
    axis.set(
        xlim=(-0.06 * wide, wide * 1.02),
        ylim=(1.1 * min(0, *line, *let_in), top),
        xlabel="decode steps from now",
        ylabel="tokens of cache free",
    )
    if min(let_in) < 0:
        axis.axhline(0, color=INK, linewidth=1.1)
        dip = next(step for step, left in zip(steps, let_in) if left < 0)
        said = f"too little{' with it' if min(line) >= 0 else ''}: somebody is put back"
        axis.annotate(
            said, (dip, 0), xytext=(0.5, 0.93), textcoords="axes fraction", arrowprops={"arrowstyle": "->", "color": INK},
            ha="center", va="top", fontsize=9.5, color=INK, bbox=BEHIND,
        )  # fmt: skip
    handles = [
        Line2D([], [], marker=each, color="none", markerfacecolor=INK, markeredgecolor="white", markersize=10)
        for each in "oX"
    ]
    legend(
        axis,
        [Line2D([], [], color=KV_CACHE, linewidth=3), Line2D([], [], color=INK, linestyle="--"), *handles],
        ["free without it", "free once it is in", "there is room for it", "there is not"],
    )
    return frame(figure, _who_lets_it_in([name for name, yes in says.items() if yes]), caption)


def _needs(tokens: int, to_come: int, first: int, running: Sequence[Running]) -> dict[str, list[tuple[int, int, str]]]:
    """What each gate asks room for: (after so many steps, tokens, in words)."""
    now, whole = (0, tokens + 1, "now"), tokens + to_come
    if not running:
        return {name: [now] for name in GATES}
    return {
        "greedy": [now],
        "reserve-static": [(0, whole, "now")],
        "reserve-dynamic": [now, (first, whole, "when the first ends")],
    }


def _who_lets_it_in(gates: Sequence[str]) -> str:
    """The finding, a sentence."""
    if len(gates) == len(GATES):
        return "All three let it in"
    said = f"{' and '.join(gates)} let{'s' * (len(gates) == 1)} it in" if gates else "none lets it in"
    return said[0].upper() + said[1:]


def draw_gates(
    rows: Mapping[str, Sequence[tuple[float, float, float]]],
    exact: Mapping[str, float],
    printed: Sequence[tuple[float, str]],
    finding: str,
    caption: str,
) -> Figure:
    """Completion time over greedy's, in percent, over the predictor's accuracy, (accuracy, mean, deviation); at the right end, where lengths are
    known to the token, what was simulated and what a paper prints.
    """
    figure, (axis,) = new_figure(3.5)
    for name, points in rows.items():
        right, values, deviations = zip(*points)
        percent = [[100 * each for each in some] for some in (right, values, deviations)]
        axis.errorbar(
            percent[0],
            percent[1],
            yerr=percent[2],
            color=COLOURS[name],
            marker="o",
            markersize=5,
            linewidth=2.0,
            capsize=2.5,
        )
        axis.plot(EXACT, 100 * exact[name], "D", color=COLOURS[name], markersize=8)
    axis.axhline(100, color=COLOURS["greedy"], linewidth=2.0)
    for value, name in printed:
        axis.plot(EXACT, 100 * value, marker="_", color=COLOURS[name], markersize=26, markeredgewidth=3.0)
    handles = [Line2D([], [], color=COLOURS[name], linewidth=2.4) for name in ("greedy", *rows)]
    handles.append(Line2D([], [], color=INK, marker="D", markersize=7, linewidth=0))
    handles.append(Line2D([], [], color=INK, marker="_", markersize=14, markeredgewidth=3.0, linewidth=0))
    legend(axis, handles, ["greedy", *rows, "length known", "the paper"])
    axis.set_xticks([0, 25, 50, 75, 100, EXACT], ["0", "25", "50", "75", "100", "length\nknown"])
    axis.set_xlim(min(100 * right for right, _, _ in next(iter(rows.values()))) - 4, EXACT + 8)
    axis.set(xlabel="how often the predictor names the right bucket (%)", ylabel="completion time (greedy = 100)")
    return frame(figure, finding, caption)


def draw_loads(
    sides: Mapping[str, Mapping[str, tuple[Sequence[float], float | None]]], finding: str, caption: str
) -> Figure:
    """Figures over a baseline's for each kind of load, side by side: seed by seed, with the mean, beside what a paper prints (None: nothing)."""
    first = next(iter(sides.values()))
    figure, axes = new_figure(1.3 + 0.46 * len(first), [1] * len(sides))
    for number, (axis, (name, rows)) in enumerate(zip(axes, sides.items())):
        for place, (values, printed) in enumerate(rows.values()):
            axis.plot(values, [place] * len(values), "o", color=DECODE, alpha=0.2, markersize=6)
            axis.errorbar(
                mean(values), place, xerr=stdev(values), color=DECODE, marker="o", markersize=8, capsize=4, linewidth=2
            )
            axis.text(
                mean(values), place - 0.2, f"{mean(values):.2f}", ha="center", va="bottom", fontsize=9.5, color=DECODE
            )
            if printed is not None:
                axis.plot([printed] * 2, [place - 0.28, place + 0.28], color=INK, linewidth=2.6)
        axis.axvline(1.0, color=FAINT, linestyle=":", linewidth=1.3)
        axis.set_yticks(range(len(rows)), list(rows) if number == 0 else [])
        axis.tick_params(axis="y", length=0)
        axis.set(xlim=(0, 1.1), ylim=(len(rows) - 0.5, -0.7), xlabel=f"{name} (vLLM = 1)")
    handles = [Line2D([], [], color=DECODE, marker="o", linewidth=2), Line2D([], [], color=INK, linewidth=2.6)]
    legend(axes[-1], handles, ["simulated", "the paper"])
    return frame(figure, finding, caption)
