"""The SLO plane: a dot for each request, by its time to first token and its longest gaps between tokens; a rectangle to drag."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import traitlets
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from minillm.trace.life import Event, RequestLife
from minillm.trace.metrics import percentile
from minillm.viz.style import DECODE, FAINT, INK, PREFILL, frame, new_figure, png
from minillm.viz.widget import InteractivePicture, script
from minillm.viz.words import plain, plain_log, round_ticks


class SLOPlane(InteractivePicture):
    """The same requests served in several ways: `ways` maps a name to their lives, in the order in which they came. Prompts of at least
    `long` tokens are orange. The rectangle begins at (`ttft_s`, `gap_s`), or where six in ten of all keep to either: those inside
    meet both goals.

    Raises `ValueError` for ways that did not serve as many requests, or some with a single token.
    """

    _esm = script("sloplane")
    question = traitlets.Unicode().tag(sync=True)
    caption = traitlets.Unicode().tag(sync=True)
    names: Any = traitlets.List().tag(sync=True)
    dots: Any = traitlets.List().tag(sync=True)  # for each way, for each request: [TTFT s, P99 gap s]
    long: Any = traitlets.List().tag(sync=True)  # whether each request's prompt is
    seconds: Any = traitlets.List().tag(sync=True)  # of each way, from the first arrival to the last token
    slo: Any = traitlets.List().tag(sync=True)

    def __init__(
        self, ways: Mapping[str, Sequence[RequestLife]], question: str, caption: str, long: int, ttft_s: float | None = None, gap_s: float | None = None
    ) -> None:  # fmt: skip
        if len({len(lives) for lives in ways.values()}) != 1 or not next(iter(ways.values())):
            raise ValueError("give the lives of the same requests for each way")
        if any(len(life.token_s) < 2 for lives in ways.values() for life in lives):
            raise ValueError("a request with a single token has no gap: let each give two or more")
        super().__init__()
        ordered = {
            name: sorted(lives, key=lambda life: life.first(Event.ARRIVED) - lives[0].first(Event.ARRIVED))
            for name, lives in ways.items()
        }
        self.question, self.caption, self.names = question, caption, list(ways)
        self.dots = [[place_of(life) for life in lives] for lives in ordered.values()]
        firsts, gaps = ([dot[side] for dots in self.dots for dot in dots] for side in (0, 1))
        self.slo = [ttft_s or 1.02 * percentile(firsts, 60).value, gap_s or 1.02 * percentile(gaps, 60).value]
        self.long = [life.prompt_tokens >= long for life in next(iter(ordered.values()))]
        self.seconds = [
            max(life.token_s[-1] for life in lives) - lives[0].first(Event.ARRIVED) for lives in ordered.values()
        ]

    def inside(self, ttft_s: float, gap_s: float) -> dict[str, int]:
        """Of each way how many requests meet both goals."""
        return {
            name: sum(first <= ttft_s and gap <= gap_s for first, gap in dots)
            for name, dots in zip(self.names, self.dots)
        }

    def png(self) -> bytes:
        """A panel for each way, with the rectangle where it stands at first."""
        return png(self.figure())

    def figure(self) -> Figure:
        """The same as a figure."""
        figure, axes = new_figure(3.3, [1.0] * len(self.names))
        every = [each for dots in self.dots for each in dots]
        (low_x, high_x), (low_y, high_y) = (_span([each[side] for each in every]) for side in (0, 1))
        ttft_s, gap_s = self.slo
        for axis, (name, count), dots, seconds in zip(axes, self.inside(*self.slo).items(), self.dots, self.seconds):
            axis.add_patch(
                Rectangle((low_x, low_y), ttft_s - low_x, gap_s - low_y, facecolor="#eeeeee", edgecolor=INK, zorder=0)
            )
            for (first, gap), is_long in zip(dots, self.long):
                colour = PREFILL if is_long else DECODE
                met = first <= ttft_s and gap <= gap_s
                axis.plot([first], [gap], "o", markersize=6, color=colour, markerfacecolor=colour if met else "white")
            axis.set(
                xscale="log", yscale="log", xlim=(low_x, high_x), ylim=(low_y, high_y), xlabel="time to first token (s)"
            )
            for side, ends in ((axis.xaxis, (low_x, high_x)), (axis.yaxis, (low_y, high_y))):
                side.set_ticks(round_ticks(*ends))
            plain_log(axis)
            axis.set_title(f"{name}\n{count} of {len(dots)} inside: {plain(count / seconds)} requests/s", fontsize=10.5, color=INK, loc="left")  # fmt: skip
        axes[0].set_ylabel("P99 gap between tokens (s)")
        figure.legend(
            [Line2D([], [], marker="o", linestyle="none", color=each) for each in (DECODE, PREFILL)] + [Rectangle((0, 0), 1, 1, facecolor="#eeeeee", edgecolor=FAINT)],
            ["short prompt", "long prompt", "both goals met"], ncols=3, loc="upper right", bbox_to_anchor=(1.0, 0.99),
            borderaxespad=0.0, frameon=False, fontsize=9.5,
        )  # fmt: skip
        return frame(figure, f"{self.question}\n", self.caption)


def place_of(life: RequestLife) -> list[float]:
    """[TTFT, P99 of the gaps between its tokens] of a request, in seconds."""
    return [life.ttft_s, percentile(life.itl_s, 99).value]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """A little more than all values, on a logarithmic axis."""
    return min(values) / 1.5, max(values) * 1.5
