"""What each rank did, over time, and under it what a rank held meanwhile. The still picture; `live.py` has one that zooms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.trace.replay import bubble_share
from minillm.trace.trace import Category, Clock, Kind, Span, Trace
from minillm.viz.style import INK, STYLE, WIDTH, frame, legend
from minillm.viz.words import CATEGORY_COLOURS, KIND_COLOURS, batch_letters, byte_unit, caption_of, plain, time_unit

LEGEND = {
    Kind.PREFILL: "prefill: reads the prompt",
    Kind.DECODE: "decode: next tokens",
    Kind.COMMUNICATION: "communication",
    Kind.WAITING: "waiting",
}


def draw_timeline(
    trace: Trace,
    finding: str,
    caption: str | None = None,
    notes: Sequence[str] = (),
    memory_rank: int | None = None,
) -> Figure:
    """Rank under rank from the first span on, `notes[i]` above the i-th lane; below, the memory of one rank.

    `memory_rank` is by default the rank that holds most. A trace without timed memory samples has no lower part.
    Raises `ValueError` for a trace without spans.
    """
    if not trace.spans:
        raise ValueError("this trace has no spans to draw: generate something first")
    lanes = sorted({(span.rank, span.lane) for span in trace.spans})
    timed = any(sample.time_s > 0 for sample in trace.memory)
    upper = 0.62 if notes else 0.5
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.2 + upper * len(lanes) + (1.6 if timed else 0.0)), layout="constrained")
        rows = figure.subplots(
            1 + timed, 1, sharex=True, height_ratios=[upper * len(lanes) + 0.4, 1.3][: 1 + timed], squeeze=False
        )  # fmt: skip
    scale, unit = time_unit(trace.end_s - trace.start_s)
    draw_lanes(rows[0, 0], trace, lanes, notes, scale)
    if timed:
        _draw_memory(rows[1, 0], trace, _fullest(trace) if memory_rank is None else memory_rank, scale)
    rows[-1, 0].set(xlabel=f"time ({unit})", xlim=(0, (trace.end_s - trace.start_s) * scale * 1.01 or 1.0))
    return frame(figure, finding, caption_of(trace) if caption is None else caption)


def draw_runs(runs: Mapping[str, Trace], finding: str, caption: str, bubbles: bool = True) -> Figure:
    """One panel per run over a common time axis: what each rank did, how long it took and, with `bubbles`, the share that was
    idle.

    Raises `ValueError` for a run in which nothing was computed.
    """
    shown = {name: trace.only("compute") for name, trace in runs.items()}
    length_s = max(trace.end_s - trace.start_s for trace in shown.values())
    scale, unit = time_unit(length_s)
    with mpl.rc_context(STYLE):
        rows = [len(trace.ranks) for trace in shown.values()]
        figure = Figure(figsize=(WIDTH, 1.0 + 0.5 * len(runs) + 0.3 * sum(rows)), layout="constrained")
        axes = figure.subplots(len(runs), 1, sharex=True, height_ratios=rows, squeeze=False)[:, 0]
    for number, (axis, (name, trace)) in enumerate(zip(axes, shown.items())):
        lanes = sorted({(span.rank, span.lane) for span in trace.spans})
        draw_lanes(axis, trace, lanes, (), scale, () if number else set().union(*map(_kinds, shown.values())))
        took = plain((trace.end_s - trace.start_s) * scale)
        idle = f", {bubble_share(trace):.0%} of the ranks' time is bubble" if bubbles else ""
        axis.set_title(f"{name}: {took} {unit}{idle}", loc="left", fontsize=10)
    axes[-1].set(xlabel=f"time ({unit})", xlim=(0, length_s * scale * 1.01))
    return frame(figure, finding, caption)


def draw_lanes(
    axis: Any, trace: Trace, lanes: list[tuple[int, str]], notes: Sequence[str], scale: float,
    keys: Collection[Kind] | None = None,
) -> None:  # fmt: skip
    """Lane under lane, a bar for each span, with its batch's letter where there is room; above, what the colours of `keys`
    mean, by default of the kinds that are drawn. On the replay clock a rank that has nothing left to do waits.
    """
    place = {lane: row for row, lane in enumerate(lanes)}
    edge = (trace.end_s - trace.start_s) / 250  # narrower bars get no white edge, or it would cover them
    letters, room = batch_letters(trace), (trace.end_s - trace.start_s) / 55
    for span in _drawn(trace):
        letter = letters.get(span.request_ids, "") if span.duration_s > room else ""
        middle = ((span.start_s + span.end_s) / 2 - trace.start_s) * scale
        axis.text(
            middle, place[span.rank, span.lane], letter, ha="center", va="center_baseline", fontsize=9, color="white"
        )
        waits = span.kind is Kind.WAITING
        axis.barh(
            place[span.rank, span.lane], span.duration_s * scale, left=(span.start_s - trace.start_s) * scale,
            height=0.42, color=KIND_COLOURS[span.kind], edgecolor="white", linewidth=0.0 if waits or span.duration_s < edge else 0.5,
            hatch="////" if waits else None,
        )  # fmt: skip
    for row, note in enumerate(notes[: len(lanes)]):
        axis.text(0, row - 0.28, note, va="bottom", ha="left", fontsize=9.5, color=INK)
    several = len({lane for _, lane in lanes}) > 1
    axis.set_yticks(
        range(len(lanes)), [f"rank {rank}" + (f"\n{lane}" if several else "") for rank, lane in lanes]
    )  # fmt: skip
    axis.set_ylim(len(lanes) - 0.6, -0.75 if notes else -0.5)
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    kinds = [kind for kind in KIND_COLOURS if kind in (_kinds(trace) if keys is None else keys)]
    if kinds:
        legend(axis, [_patch(kind) for kind in kinds], [LEGEND[kind] for kind in kinds])


def _drawn(trace: Trace) -> list[Span]:
    return [*trace.spans, *(_idle_after(trace) if trace.clock is Clock.REPLAYED else ())]


def _kinds(trace: Trace) -> set[Kind]:
    return {span.kind for span in _drawn(trace)}


def _idle_after(trace: Trace) -> list[Span]:
    """From each lane's last span to the end of the run."""
    ends: dict[tuple[int, str], float] = {}
    for span in trace.spans:
        ends[span.rank, span.lane] = max(span.end_s, ends.get((span.rank, span.lane), 0.0))
    return [Span(rank, Kind.WAITING, "nothing left", end, trace.end_s, lane=lane) for (rank, lane), end in ends.items()]


def _patch(kind: Kind) -> Patch:
    return Patch(facecolor=KIND_COLOURS[kind], edgecolor="white", hatch="////" if kind is Kind.WAITING else None)


def _fullest(trace: Trace) -> int:
    return max(trace.ranks, key=lambda rank: sum(trace.peak_bytes(rank).values()))


def memory_steps(trace: Trace, rank: int) -> dict[Category, list[tuple[float, int]]]:
    """For each category, (time, bytes) from the run's start to its end: what the rank held from then on."""
    steps: dict[Category, list[tuple[float, int]]] = {}
    for category in Category:
        samples = [s for s in trace.memory if s.rank == rank and s.category is category]
        if samples:
            inside = [(max(s.time_s, trace.start_s), s.bytes) for s in samples]
            steps[category] = [*inside, (trace.end_s, inside[-1][1])]
    return steps


def _draw_memory(axis: Any, trace: Trace, rank: int, scale: float) -> None:
    steps = memory_steps(trace, rank)
    times = sorted({when for series in steps.values() for when, _ in series} | {trace.start_s, trace.end_s})
    series = [[_held(steps[category], when) for when in times] for category in steps]
    most = max((sum(column) for column in zip(*series)), default=0)
    size, unit = byte_unit(most)
    axis.stackplot(
        [(when - trace.start_s) * scale for when in times],
        [[held / size for held in row] for row in series],
        colors=[CATEGORY_COLOURS[category] for category in steps],
        step="post",
    )
    axis.set(ylabel=f"{unit} on rank {rank}", ylim=(0, 1.08 * most / size or 1.0))
    handles = [Patch(color=CATEGORY_COLOURS[category]) for category in steps]
    legend(axis, handles, [category.value for category in steps])


def _held(series: list[tuple[float, int]], when: float) -> int:
    """What was held at a time: the last sample not after it."""
    return next((count for moment, count in reversed(series) if moment <= when), 0)
