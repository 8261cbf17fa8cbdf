"""Short answers that stream while a long prompt is read: when each token came, one way of serving under the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.trace.life import Event, RequestLife
from minillm.viz.style import DECODE, GUESS, INK, PREFILL, frame, legend, new_figure
from minillm.viz.words import plain


def longest_gap(lives: Sequence[RequestLife]) -> tuple[float, float]:
    """The longest wait between two tokens of a request while the longest prompt is read, or if nothing streams then, of all: when it began,
    and when it ended.
    """
    long = max(lives, key=lambda life: life.prompt_tokens)
    began, ended = long.first(Event.STARTED), long.first(Event.TOKEN)
    gaps = [pair for life in lives if life is not long for pair in zip(life.token_s, life.token_s[1:])]
    meanwhile = [(left, right) for left, right in gaps if right > began and left < ended]
    return max(meanwhile or gaps, key=lambda pair: pair[1] - pair[0])


def draw_stutter(
    ways: Mapping[str, Sequence[RequestLife]], finding: str, caption: str, guess_s: float | None = None
) -> Figure:
    """For each way a line of ticks for each request but the one with the longest prompt, and a bar while that one was read.

    All begin where the long prompt arrives. `guess_s` is the learner's guess of the longest gap, drawn where the first way's begins.
    Raises `ValueError` for a way without a request that streams.
    """
    figure, (axis,) = new_figure(0.9 + 0.92 * len(ways))
    for row, (name, lives) in enumerate(ways.items()):
        long = max(lives, key=lambda life: life.prompt_tokens)
        short = [life for life in lives if life is not long and len(life.token_s) > 1]
        if not short:
            raise ValueError(f"{name}: nothing streams beside the long prompt")
        zero = long.first(Event.ARRIVED)
        depth = 0.36 / len(short)
        for place, life in enumerate(short):
            top = row - 0.36 + place * depth
            axis.vlines([token - zero for token in life.token_s], top, top + 0.8 * depth, color=DECODE, linewidth=1.6)
        began, ended = long.first(Event.STARTED) - zero, long.token_s[0] - zero
        axis.barh(row + 0.18, ended - began, left=began, height=0.24, color=PREFILL)
        left, right = (when - zero for when in longest_gap(lives))
        axis.annotate(
            "", (left, row - 0.48), xytext=(right, row - 0.48), arrowprops={"arrowstyle": "<->", "color": INK}
        )
        said = f"{plain(1e3 * (right - left))} ms"
        axis.text(right, row - 0.48, f" {said}", ha="left", va="center", fontsize=10, color=INK, weight="bold")
        if guess_s is not None and row == 0:
            axis.hlines(row - 0.7, left, left + guess_s, color=GUESS, linestyle="--", linewidth=2)
            axis.text(left + guess_s, row - 0.7, " your guess", color=GUESS, va="center", fontsize=9.5)
    axis.set_yticks(range(len(ways)), list(ways))
    axis.set(ylim=(len(ways) - 0.5, -0.95), xlabel="seconds since the long prompt arrived")
    axis.tick_params(axis="y", length=0)
    legend(axis, [Patch(color=DECODE), Patch(color=PREFILL)], ["a token of a short answer", "the long prompt is read"])
    return frame(figure, finding, caption)
