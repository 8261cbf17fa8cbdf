"""How much each rank held at most, and what for: one bar a rank, runs side by side."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.trace.trace import Category, Trace
from minillm.viz.style import GUESS, INK, frame, legend, new_figure
from minillm.viz.words import CATEGORY_COLOURS, byte_unit, caption_of, plain


def draw_memory(
    runs: Mapping[str, Trace], finding: str, caption: str | None = None, guess_bytes: float | None = None
) -> Figure:
    """Peak bytes by category for every rank of every run; `guess_bytes` is drawn as the learner's dashed line.

    Raises `ValueError` when no run has memory samples.
    """
    runs = {name: trace for name, trace in runs.items() if trace.ranks}
    bars = [(name, rank, trace.peak_bytes(rank)) for name, trace in runs.items() for rank in trace.ranks]
    tallest = max((sum(peaks.values()) for _, _, peaks in bars), default=0)
    if not tallest:
        raise ValueError("these traces hold no memory samples: generate something first")
    size, unit = byte_unit(tallest)
    figure, (axis,) = new_figure(3.6)
    places, centres = _places(runs)
    for (name, rank, peaks), place in zip(bars, places):
        base = 0.0
        for category in Category:
            height = peaks.get(category, 0) / size
            axis.bar(place, height, bottom=base, width=0.8, color=CATEGORY_COLOURS[category])
            base += height
        axis.text(place, base, plain(base), ha="center", va="bottom", color=INK)
        if len(runs[name].ranks) > 1:
            axis.text(place, 0, f"rank {rank}", ha="center", va="bottom", color=INK, fontsize=9)
    if guess_bytes is not None:
        axis.axhline(guess_bytes / size, color=GUESS, linestyle="--", linewidth=1.6)
        axis.annotate(
            "your guess", (1.0, guess_bytes / size), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", color=GUESS, va="center",
        )  # fmt: skip
    axis.set(ylabel=f"peak {unit} per rank", ylim=(0, 1.15 * max(tallest, guess_bytes or 0) / size))
    axis.set_xticks(centres, list(runs))
    axis.set_xlim(-0.9, places[-1] + 0.9)
    axis.tick_params(axis="x", length=0)
    used = [category for category in Category if any(category in peaks for _, _, peaks in bars)]
    legend(axis, [Patch(color=CATEGORY_COLOURS[category]) for category in used], [category.value for category in used])
    return frame(figure, finding, caption_of(next(iter(runs.values()))) if caption is None else caption)


def _places(runs: Mapping[str, Trace]) -> tuple[list[float], list[float]]:
    """Where the bars stand, ranks of one run together; and the middle of each run."""
    places: list[float] = []
    centres: list[float] = []
    left = 0.0
    for trace in runs.values():
        mine = [left + 0.9 * number for number in range(len(trace.ranks))]
        places += mine
        centres.append((mine[0] + mine[-1]) / 2)
        left = mine[-1] + 1.6
    return places, centres
