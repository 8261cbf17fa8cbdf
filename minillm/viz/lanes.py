"""What each rank did, over time: one lane a rank, a bar a step."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.trace.trace import Kind, Trace
from minillm.viz.style import COMMUNICATION, DECODE, INK, PREFILL, WAITING, frame, new_figure

COLOURS = {
    Kind.PREFILL: PREFILL,
    Kind.DECODE: DECODE,
    Kind.COMMUNICATION: COMMUNICATION,
    Kind.WAITING: WAITING,
}


def draw_lanes(trace: Trace, finding: str, caption: str, notes: Sequence[str] = ()) -> Figure:
    """The spans of a trace, rank under rank, from the first start on; `notes[rank]` stands above its lane."""
    ranks = sorted({span.rank for span in trace.spans})
    start = min(span.start_s for span in trace.spans)
    figure, (axis,) = new_figure(1.3 + 0.62 * len(ranks))
    for span in trace.spans:
        left, width = span.start_s - start, span.duration_s
        axis.barh(span.rank, width, left=left, height=0.4, color=COLOURS[span.kind], edgecolor="white", linewidth=0.6)
    for rank, note in zip(ranks, notes):
        axis.text(0, rank - 0.27, note, va="bottom", ha="left", fontsize=9.5, color=INK)
    end = max(span.end_s for span in trace.spans) - start
    axis.set(yticks=ranks, yticklabels=[f"rank {rank}" for rank in ranks], xlabel="time (s)", xlim=(0, end * 1.01))
    axis.set_ylim(max(ranks) + 0.45, min(ranks) - (0.75 if notes else 0.5))
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    kinds = [kind for kind in COLOURS if any(span.kind is kind for span in trace.spans)]
    handles = [Patch(color=COLOURS[kind]) for kind in kinds]
    labels = [_LEGEND[kind] for kind in kinds]
    axis.legend(handles, labels, ncols=len(kinds), loc="lower right", bbox_to_anchor=(1.0, 0.98), frameon=False)
    return frame(figure, finding, caption)


_LEGEND = {
    Kind.PREFILL: "prefill: read the question",
    Kind.DECODE: "decode: one token a bar",
    Kind.COMMUNICATION: "communication",
    Kind.WAITING: "waiting",
}
