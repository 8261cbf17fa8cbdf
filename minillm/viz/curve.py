"""Throughput against latency: what each larger batch gains, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from minillm.viz.style import DECODE, FAINT, GUESS, INK, frame, new_figure
from minillm.viz.words import plain, plain_log, round_ticks


@dataclass(frozen=True)
class Point:
    """One setting: `batch` requests at a time give `tokens_per_s` in all, at `tpot_s` for each."""

    batch: int
    tokens_per_s: float
    tpot_s: float


def draw_curve(
    curves: Mapping[str, Sequence[Point]], finding: str, caption: str, guess: tuple[float, str] | None = None
) -> Figure:
    """One line per name, a dot per batch size, throughput (logarithmic) over time per token.

    `guess` (tokens per second, its label) is drawn as a dashed mark.
    """
    figure, (axis,) = new_figure(3.9)
    first = next(iter(curves.values()))
    for (name, points), colour in zip(curves.items(), (DECODE, FAINT, INK)):
        x, y = [point.tpot_s * 1e3 for point in points], [point.tokens_per_s for point in points]
        axis.plot(x, y, color=colour, marker="o", markersize=6, linewidth=1.8, label=name)
        for point, left, height in zip(points, x, y):
            place = (7, -11) if points is first else (-7, 7)
            axis.annotate(
                f"{'batch ' if point is points[0] and points is first else ''}{point.batch}", (left, height),
                xytext=place, ha="left" if points is first else "right", textcoords="offset points", color=colour, fontsize=9.5,
            )  # fmt: skip
    axis.set(yscale="log", xlabel="ms per token of one request (TPOT)", ylabel="tokens/s of all requests")
    axis.set_xlim(0, axis.get_xlim()[1] * 1.06)
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom * 0.8, top * 1.2)
    axis.set_yticks(round_ticks(*axis.get_ylim()))
    plain_log(axis, "y")
    if guess is not None:
        axis.axhline(guess[0], color=GUESS, linestyle="--", linewidth=1.8)
        axis.text(
            axis.get_xlim()[1] * 0.01, guess[0], f"{guess[1]} {plain(guess[0])}", color=GUESS, va="bottom", fontsize=9.5
        )
    if len(curves) > 1:
        axis.legend(loc="best", frameon=False)
    axis.grid(which="major", color="#ececec", linewidth=0.8)
    return frame(figure, finding, caption)
