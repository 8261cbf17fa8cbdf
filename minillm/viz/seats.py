"""Who sits in a batch when: one row per seat, and what stays empty (after Orca, Yu et al. 2022, figures 3 and 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.trace.life import Event, RequestLife
from minillm.trace.trace import Trace
from minillm.viz.style import DECODE, PREFILL, STYLE, WAITING, WIDTH, frame, legend
from minillm.viz.words import caption_of, time_unit


def take_seats(lives: list[RequestLife]) -> list[list[RequestLife]]:
    """The requests of each seat: whoever starts takes the first seat that is free."""
    seats: list[list[RequestLife]] = []
    for life in sorted(lives, key=lambda life: life.first(Event.STARTED)):
        began = life.first(Event.STARTED)
        free = next((seat for seat in seats if seat[-1].token_s[-1] <= began), None)
        if free is None:
            seats.append([life])
        else:
            free.append(life)
    return seats


def busy_share(lives: list[RequestLife]) -> float:
    """The share of all seats' time in which somebody sat there, from the first start to the last token."""
    seats = take_seats(lives)
    began, ended = min(life.first(Event.STARTED) for life in lives), max(life.token_s[-1] for life in lives)
    sat = sum(life.token_s[-1] - life.first(Event.STARTED) for life in lives)
    return sat / (len(seats) * (ended - began))


def draw_seats(runs: Mapping[str, Trace], finding: str, caption: str | None = None) -> Figure:
    """One panel per run over a common time axis: a row per seat of the batch, a bar per request, empty seats hatched.

    Raises `ValueError` for a run without a request that got a token.
    """
    lives = {name: [life for life in trace.lives if life.token_s] for name, trace in runs.items()}
    if not lives or not all(lives.values()):
        raise ValueError("there is no request that got a token: generate something first")
    rows = [len(take_seats(each)) for each in lives.values()]
    longest = max(_length_s(each) for each in lives.values())
    scale, unit = time_unit(longest)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.1 + 0.45 * len(runs) + 0.2 * sum(rows)), layout="constrained")
        axes = figure.subplots(len(runs), 1, squeeze=False, height_ratios=rows, sharex=True)[:, 0]
    for axis, (name, each) in zip(axes, lives.items()):
        _draw_run(axis, each, scale)
        length = f"{_length_s(each) * scale:,.3g} {unit}"
        axis.set_title(f"{name}: {length}, seats taken {busy_share(each):.0%} of the time", loc="left", fontsize=10)
        axis.set(ylabel="seat", ylim=(len(take_seats(each)) - 0.4, -0.6), xlim=(0, longest * scale * 1.01), yticks=[])
    axes[-1].set_xlabel(f"time ({unit})")
    handles = [Patch(color=PREFILL), Patch(color=DECODE), Patch(facecolor=WAITING, hatch="////", edgecolor="white")]
    legend(axes[0], handles, ["prefill", "decode", "empty"])
    first = next(iter(runs.values()))
    shown = caption_of(first, f"{len(next(iter(lives.values())))} requests, each an orange and a blue bar")
    return frame(figure, finding, shown if caption is None else caption)


def _length_s(lives: list[RequestLife]) -> float:
    return max(life.token_s[-1] for life in lives) - min(life.first(Event.STARTED) for life in lives)


def _draw_run(axis: Any, lives: list[RequestLife], scale: float) -> None:
    start = min(life.first(Event.STARTED) for life in lives)
    end = max(life.token_s[-1] for life in lives)
    for row, seat in enumerate(take_seats(lives)):
        axis.barh(row, (end - start) * scale, height=0.8, color=WAITING, hatch="////", edgecolor="white", linewidth=0)
        for life in seat:
            marks = (life.first(Event.STARTED), life.token_s[0], life.token_s[-1])
            for left, right, colour in ((marks[0], marks[1], PREFILL), (marks[1], marks[2], DECODE)):
                place = (left - start) * scale
                axis.barh(
                    row, (right - left) * scale, left=place, height=0.8, color=colour, edgecolor="white", linewidth=0.6
                )
