"""Who waits for whom: the picture of a `RankError`."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from minillm.ranks.errors import Fault, RankError
from minillm.viz.circle import clear_axis, draw_arrow, draw_rank, spot_of
from minillm.viz.style import CULPRIT, FAINT, INK, frame, new_figure

_FINDINGS = {
    Fault.RAISED: "{who} failed; the others wait for it in vain",
    Fault.DIED: "{who} died; the others wait for it in vain",
    Fault.DISAGREED: "{who} called something else than the others",
    Fault.ABSENT: "{who} never came; the others wait for it",
    Fault.LATE: "{who} kept the others waiting",
    Fault.DEADLOCK: "{who} wait for one another in a circle: nobody can go first",
    Fault.LOST: "{who} lost the connection",
}


def draw_waiting(error: RankError) -> Figure:
    """Ranks on a circle, an arrow from each one that waits to each it waits for, the culprit in vermilion.

    Beside it what every rank was doing, as the error's text has it.
    """
    figure, (graph, words) = new_figure(3.5, [1.0, 1.8])
    ranks = sorted(error.verdict.places)
    spots = {rank: spot_of(place, len(ranks)) for place, rank in enumerate(ranks)}
    circle = error.fault is Fault.DEADLOCK
    for rank, awaited in error.waits_for.items():
        for other in awaited:
            draw_arrow(graph, spots[rank], spots[other])
    for rank, spot in spots.items():
        culprit = rank in error.ranks and not circle
        draw_rank(graph, spot, str(rank), culprit=culprit, waiting=not culprit)
    clear_axis(graph)
    _tell(words, error, circle)
    words.axis("off")
    who = _who(error.ranks)
    return frame(
        figure, _FINDINGS[error.fault].format(who=who), "an arrow means: waits for · read from the ranks' own boards"
    )


def _tell(axis: Any, error: RankError, circle: bool) -> None:
    """One paragraph per rank: what it did, and the line of code under it."""
    places = sorted(error.verdict.places.items())
    step = 1.0 / max(len(places), 3)
    for row, (rank, text) in enumerate(places):
        what, _, line = text.partition(", line ")
        top = 0.97 - row * step
        color = CULPRIT if rank in error.ranks and not circle else INK
        axis.text(0.0, top, f"rank {rank}", weight="bold", color=color, va="top", transform=axis.transAxes)
        axis.text(0.13, top, _shorten(what, 62), color=color, va="top", transform=axis.transAxes)
        if line:
            code = _shorten(f"line {line}", 56)
            axis.text(
                0.13, top - 0.085, code, color=FAINT, va="top", fontsize=9, family="monospace", transform=axis.transAxes
            )  # fmt: skip


def _shorten(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _who(ranks: list[int]) -> str:
    names = [str(rank) for rank in ranks]
    if len(names) < 2:
        return f"Rank {names[0]}" if names else "No rank"
    return f"Ranks {', '.join(names[:-1])} and {names[-1]}"
