"""What was sent: bytes per collective, rank by rank."""

from __future__ import annotations

from matplotlib.figure import Figure

from minillm.trace.trace import Trace
from minillm.viz.style import COMMUNICATION, INK, frame, new_figure
from minillm.viz.words import byte_unit, bytes_text, caption_of


def traffic_of(trace: Trace) -> dict[str, dict[int, tuple[int, int]]]:
    """For each operation that carried bytes: rank -> (calls, bytes that the rank put on links)."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for span in trace.spans:
        if span.message_bytes:
            calls, count = found.setdefault(span.name, {}).get(span.rank, (0, 0))
            found[span.name][span.rank] = (calls + 1, count + span.message_bytes)
    return found


def draw_traffic(trace: Trace, finding: str, caption: str | None = None) -> Figure:
    """A bar per operation and rank: the bytes it sent, with the number of calls. A trace without messages says so."""
    rows = [(name, rank, *each) for name, ranks in traffic_of(trace).items() for rank, each in sorted(ranks.items())]
    figure, (axis,) = new_figure(1.2 + 0.34 * max(len(rows), 2))
    size, unit = byte_unit(max((count for *_, count in rows), default=0))
    axis.barh(range(len(rows)), [count / size for *_, count in rows], height=0.66, color=COMMUNICATION)
    for place, (_, _, calls, count) in enumerate(rows):
        axis.text(
            count / size,
            place,
            f"  {bytes_text(count)} in {calls:,} call{'s' * (calls != 1)}",
            va="center",
            color=INK,
            fontsize=9.5,
        )
    axis.set_yticks(range(len(rows)), [f"{name}, rank {rank}" for name, rank, *_ in rows])
    axis.set(xlabel=f"message bytes put in ({unit})", ylim=(max(len(rows), 1) - 0.4, -0.6))
    axis.set_xlim(0, 1.4 * max((count / size for *_, count in rows), default=1.0))
    axis.tick_params(axis="y", length=0)
    if not rows:
        axis.text(0.5, 0.5, "no messages: the ranks sent each other nothing", ha="center", transform=axis.transAxes)
    return frame(figure, finding, caption_of(trace) if caption is None else caption)
