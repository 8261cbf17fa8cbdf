"""A prompt is read, its KV cache moves, and another instance goes on: three lanes, one way of moving under the other."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.trace.life import Event
from minillm.trace.trace import Kind, Trace
from minillm.viz.style import COMMUNICATION, DECODE, INK, PREFILL, frame, new_figure

LANES = ("prefill", "wire", "decode")


def waits_of(trace: Trace) -> tuple[float, float]:
    """(when its first token came, when decode began) of the trace's first request: what lies between is seen by its user."""
    life = trace.lives[0]
    began = min(
        span.start_s for span in trace.spans if span.kind is Kind.DECODE and life.request_id in span.request_ids
    )
    return life.first(Event.TOKEN), began


def draw_moves(ways: Mapping[str, Trace], finding: str, caption: str) -> Figure:
    """A panel for each way, with the lanes of one request; what is seen between the first token and decode is marked.

    Raises `ValueError` for a trace in which nothing moved.
    """
    figure, axes = new_figure(2.6, [1.0] * len(ways))
    for axis, (name, trace) in zip(axes, ways.items()):
        moved = [span for span in trace.spans if span.name == "KV cache"]
        if not moved:
            raise ValueError(f"{name}: no cache was moved")
        zero = trace.lives[0].first(Event.ARRIVED)
        lanes = {
            "prefill": [span for span in trace.spans if span.kind is Kind.PREFILL],
            "wire": moved,
            "decode": [span for span in trace.spans if span.kind is Kind.DECODE],
        }
        for row, (lane, colour) in enumerate(zip(LANES, (PREFILL, COMMUNICATION, DECODE))):
            for span in lanes[lane]:
                axis.barh(row, span.end_s - span.start_s, left=span.start_s - zero, height=0.6, color=colour, edgecolor="white", linewidth=0.4)  # fmt: skip
        first, began = (when - zero for when in waits_of(trace))
        axis.axvspan(first, max(began, first + 1e-4), color="#eeeeee", zorder=0)
        axis.text(began, 2.62, f"{1e3 * max(0.0, began - first):.0f} ms until decode begins ", ha="right", va="center", fontsize=9.5, color=INK)  # fmt: skip
        axis.set_yticks(range(3), LANES if axis is axes[0] else [""] * 3)
        axis.set(ylim=(2.9, -0.6), xlabel="time (s)", xlim=(0, None))
        axis.set_title(name, fontsize=10.5, color=INK, loc="left")
        axis.tick_params(axis="y", length=0)
    last_s = max(axis.get_xlim()[1] for axis in axes)
    for axis in axes:
        axis.set_xlim(0, last_s)
    names = ["the prompt is read", "K and V move", "decode steps"]
    figure.legend(
        [Patch(color=each) for each in (PREFILL, COMMUNICATION, DECODE)], names, ncols=3, loc="upper right",
        bbox_to_anchor=(1.0, 0.99), borderaxespad=0.0, frameon=False, fontsize=9.5,
    )  # fmt: skip
    return frame(figure, f"{finding}\n", caption)
