"""Splitwise in pictures: which machine reads and which decodes for a watt, nine objectives at once, and claims beside what was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from minillm.sim.claims import Outcome
from minillm.sim.designs import BUDGET, COST, Trial
from minillm.viz.style import DECODE, FAINT, GUESS, INK, KV_CACHE, PREFILL, frame, legend, new_figure
from minillm.viz.words import plain

BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}


def draw_watts(
    machines: Mapping[str, tuple[float, float]], finding: str, caption: str, guess: float | None = None
) -> Figure:
    """Tokens for a watt of each machine, read and given, as multiples of the first one's; `guess` is drawn over those that are given."""
    figure, axes = new_figure(2.9, [1, 1])
    for side, (axis, name, colour) in enumerate(zip(axes, ("prompt tokens", "decoded tokens"), (PREFILL, DECODE))):
        best = max(machines, key=lambda each: machines[each][side])
        for place, (machine, gains) in enumerate(machines.items()):
            axis.barh(place, gains[side], height=0.6, color=colour, alpha=1.0 if machine == best else 0.45)
            axis.text(gains[side] + 0.02, place, plain(gains[side]), va="center", fontsize=10.5, bbox=BEHIND)
        axis.axvline(1.0, color=FAINT, linestyle=":", linewidth=1.1)
        axis.set_yticks(range(len(machines)), list(machines) if side == 0 else [])
        axis.set(xlim=(0, 1.7), ylim=(len(machines) - 0.4, -0.6), xlabel=f"{name} for a watt (A100 = 1)")
        axis.tick_params(axis="y", length=0)
    if guess is not None:
        axes[1].axvline(guess, color=GUESS, linestyle="--", linewidth=1.8)
        axes[1].text(guess, -0.55, " you", color=GUESS, fontsize=9.5, va="top")
    return frame(figure, finding, caption)


def draw_objectives(tried: Trial, caption: str) -> Figure:
    """Each of the nine objectives as a bar: its slow-down over what is allowed. Beyond the line it is missed."""
    figure, (axis,) = new_figure(3.4)
    most = 2.5
    for place, over in enumerate(tried.over.values()):
        missed = over > 1
        axis.barh(place, min(over, most), height=0.66, color=GUESS if missed else KV_CACHE)
        said = f"{over:.2f}" if over < 100 else f"{over:,.0f}"
        axis.text(
            min(over, most) + 0.03, place, said + (" →" if over > most else ""), va="center", fontsize=10, bbox=BEHIND
        )
    axis.axvline(1.0, color=INK, linewidth=1.3)
    axis.set_yticks(range(len(tried.over)), list(tried.over))
    axis.set(
        xlim=(0, most * 1.15),
        ylim=(len(tried.over) - 0.4, -0.6),
        xlabel="slow-down over what is allowed (1: just kept)",
    )
    axis.tick_params(axis="y", length=0)
    design = tried.design
    machines = f"{design.prompts} + {design.tokens} machines" if design.token else f"{design.prompts} machines"
    first = "All nine kept" if tried.kept == len(tried.over) else f"{len(tried.over) - tried.kept} of 9 missed"
    return frame(
        figure,
        f"{design.name[0].upper() + design.name[1:]}, {machines}: {first[0].lower() + first[1:]}",
        f"{caption} · of 8 H100 machines: power {design.power / BUDGET:.0%}, cost {design.cost / COST:.0%} · allowed at P50, P90, P99: "
        "TTFT 2, 3, 6, TBT and E2E 1.25, 1.5, 5 times an idle A100's",
    )


def draw_claims(
    outcomes: Sequence[tuple[str, Outcome]], finding: str, caption: str, mine: Mapping[str, float] | None = None
) -> Figure:
    """What was found, seed by seed with mean and deviation, beside what a paper prints; `mine` are runs of the learner."""
    figure, (axis,) = new_figure(1.2 + 0.48 * len(outcomes))
    for place, (name, outcome) in enumerate(outcomes):
        axis.plot(outcome.values, [place] * len(outcome.values), "o", color=DECODE, alpha=0.25, markersize=6)
        axis.errorbar(
            outcome.mean, place, xerr=outcome.deviation, color=DECODE, marker="o", markersize=8, capsize=4, linewidth=2
        )
        if outcome.claim.printed is not None:
            axis.plot([outcome.claim.printed] * 2, [place - 0.34, place + 0.34], color=INK, linewidth=2.2)
        if mine and name in mine:
            axis.plot(mine[name], place, "D", color=GUESS, markersize=8)
        axis.text(
            0.985,
            place - 0.2,
            f"{outcome.mean:.2f} ± {outcome.deviation:.2f}",
            transform=axis.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=9.5,
            color=DECODE,
        )
    axis.axvline(1.0, color=FAINT, linestyle=":", linewidth=1.1)
    axis.set_yticks(range(len(outcomes)), [name for name, _ in outcomes])
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(outcomes) - 0.5, -0.6)
    left, right = axis.get_xlim()
    axis.set(
        xlim=(min(left, 0.9), right + 0.22 * (right - left)),
        xlabel="times what machines serve that do both, at equal power",
    )
    handles = [Line2D([], [], color=DECODE, marker="o", linewidth=2), Line2D([], [], color=INK, linewidth=2.2)]
    names = ["simulated, mean ± deviation", "the paper"]
    if mine:
        handles.append(Line2D([], [], color=GUESS, marker="D", linewidth=0))
        names.append("your run")
    legend(axis, handles, names)
    return frame(figure, finding, caption)
