"""Who sent what to whom, and who waited in vain: a run on the toy communicator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from minillm.ranks.toy_world import ToyRun
from minillm.viz.style import COMMUNICATION, CULPRIT, FAINT, INK, WAITING, frame, new_figure
from minillm.viz.words import bytes_text, plain


def draw_messages(
    run: ToyRun, finding: str, results: Sequence[str] | None = None, wrong: Mapping[int, str] | None = None
) -> Figure:
    """A lane per rank, an arrow per message; at the right what each rank returned, or what it waits for.

    `results` are the ranks' results in words; `wrong` maps ranks whose result is wrong to the expected one.
    """
    size = len(run.results)
    figure, (axis,) = new_figure(1.1 + 0.52 * size)
    end = max([message.received_at for message in run.messages], default=0) + 1.5
    for rank in range(size):
        axis.plot([0, end], [rank, rank], color=FAINT, linewidth=1.2, zorder=1)
        if rank in run.waits:
            mine = [message.received_at for message in run.messages if rank in (message.source, message.target)]
            since = max(mine, default=0) + 0.5
            axis.barh(rank, end - since, left=since, height=0.42, color=WAITING, hatch="////", edgecolor="white", linewidth=0, zorder=2)  # fmt: skip
        text, colour = _ending(run, rank, results or [_said(each) for each in run.results], wrong or {})
        axis.text(end * 1.015, rank, text, va="center", color=colour, fontsize=10, parse_math=False)
    for message in run.messages:
        axis.add_patch(
            FancyArrowPatch(
                (message.sent_at, message.source), (message.received_at, message.target), arrowstyle="-|>",
                mutation_scale=15, linewidth=1.8, color=COMMUNICATION, shrinkA=0, shrinkB=0, zorder=3,
            )
        )  # fmt: skip
    axis.set(xlim=(0, end * 1.55), ylim=(size - 0.5, -0.6), xticks=[])
    axis.set_yticks(range(size), [f"rank {rank}" for rank in range(size)])
    axis.tick_params(axis="y", length=0)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    count = len(run.messages)
    said = (
        f"your run on toy ranks · time goes to the right · {count} message{'s' * (count != 1)}, {bytes_text(run.bytes)}"
    )
    if any(message.operation != "send" for message in run.messages):
        said += " · the toy carries collectives through rank 0"
    return frame(figure, finding, said)


def _said(result: Any) -> str:
    return plain(result) if isinstance(result, (int, float)) else str(result)[:40]


def _ending(run: ToyRun, rank: int, results: Sequence[str], wrong: Mapping[int, str]) -> tuple[str, str]:
    """What stands at the end of a lane."""
    if rank in run.waits:
        return run.waits[rank].split(" (line")[0], INK
    if rank in run.errors:
        return run.errors[rank].split(":")[0], CULPRIT
    if rank in run.endless:
        return "does not come to an end", CULPRIT
    if rank not in wrong or not run.ended:
        return f"returns {results[rank]}", INK
    return f"returns {results[rank]}, expected {wrong[rank]}", CULPRIT
