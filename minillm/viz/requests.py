"""The lives of requests, one under the other; and how long each token took to come."""

from __future__ import annotations

from statistics import median
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from minillm.trace.life import LOST_BLOCKS, Event, RequestLife
from minillm.trace.trace import Trace
from minillm.viz.style import COMMUNICATION, DECODE, GUESS, INK, PREFILL, WAITING, frame, legend, new_figure
from minillm.viz.words import caption_of, plain, time_unit

MOST_ROWS = 40
ROOM = 1 / 250  # of the picture's width: the least a bar needs for a tick


def draw_requests(trace: Trace, finding: str, caption: str | None = None) -> Figure:
    """A bar per request: waiting from its arrival, prefill, then decode with a tick for every token.

    Between two tokens it waits while steps run in which it has no part, and after it was preempted; then it is prefilled
    again. Where another instance goes on with it, it waits there for room, and then for its cache.

    At most 40 requests are drawn, the first to arrive; the caption says so. Raises `ValueError` for a trace without any.
    """
    lives = _lives(trace)
    drawn = lives[:MOST_ROWS]
    start = min(life.first(Event.ARRIVED) for life in drawn)
    longest_s = max(life.token_s[-1] for life in drawn) - start or 1e-9
    scale, unit = time_unit(longest_s)
    figure, (axis,) = new_figure(1.3 + 0.3 * max(len(drawn), 3))
    for row, life in enumerate(drawn):
        _draw_life(axis, row, life, _waits(trace, life), start, scale, longest_s)
    axis.set_yticks(range(len(drawn)), [str(life.request_id) for life in drawn])
    axis.set(xlabel=f"time ({unit})", ylabel="request", ylim=(len(drawn) - 0.4, -0.6), xlim=(0, None))
    axis.tick_params(axis="y", length=0)
    handles = [Patch(facecolor=WAITING, hatch="////", edgecolor="white"), Patch(color=PREFILL), Patch(color=DECODE)]
    names = ["waits", "prefill, up to the first token", "decode, a tick a token"]
    if any(_move(life) for life in drawn):
        handles.insert(2, Patch(color=COMMUNICATION))
        names.insert(2, "its cache moves")
    legend(axis, handles, names)
    more = f"the first {MOST_ROWS} of {len(lives)} requests" if len(lives) > MOST_ROWS else f"{len(lives)} requests"
    return frame(figure, finding, caption_of(trace, more) if caption is None else caption)


def _draw_life(
    axis: Any, row: int, life: RequestLife, waits: list[tuple[float, float]], start: float, scale: float, longest_s: float
) -> None:  # fmt: skip
    """Waiting, prefill and decode of one request, `longest_s` being the seconds that the picture is wide."""
    began, tokens = life.first(Event.STARTED), life.token_s
    arrived = life.first(Event.ARRIVED)
    for left, right, colour, hatch in (
        (arrived, began, WAITING, "////"),
        (began, tokens[0], PREFILL, None),
        (tokens[0], tokens[-1], DECODE, None),
        *((a, b, WAITING, "////") for a, b in waits),
        *((a, b, PREFILL, None) for a, b in _again(life)),
        *_move(life),
    ):
        axis.barh(row, (right - left) * scale, left=(left - start) * scale, height=0.62, color=colour, hatch=hatch, edgecolor="white", linewidth=0)  # fmt: skip
    ticks = [(when - start) * scale for when in tokens]
    if (len(tokens) - 1) * ROOM > (tokens[-1] - tokens[0]) / longest_s:
        return  # finer than the eye: ticks would cover the bar
    axis.vlines(ticks, row - 0.31, row + 0.31, color="white", linewidth=0.8)


def _waits(trace: Trace, life: RequestLife) -> list[tuple[float, float]]:
    """Stretches between its first and last token in which only others were served, and those without its blocks."""
    first, last = life.token_s[0], life.token_s[-1]
    first = max([first, *(when for what, when in life.moments if what is Event.MOVED)])  # what a lost rank did is lost
    others: list[tuple[float, float]] = []
    going_on = False
    came = [when for what, when in life.moments if what is Event.CAME]
    first = max([first, *came])
    mine = [span for span in trace.spans if life.request_id in span.request_ids]
    ranks = {span.rank for span in mine if not came or span.start_s >= came[-1]}  # of the replica that has it
    for span in sorted((span for span in trace.spans if span.rank in ranks), key=lambda span: span.start_s):
        if life.request_id in span.request_ids:
            going_on = False
        elif span.request_ids and first <= span.start_s and span.end_s <= last:
            others.append((others.pop()[0] if going_on else span.start_s, span.end_s))
            going_on = True
    moments = [*life.moments, (Event.FINISHED, last)]
    lost = [(when, after) for (what, when), (_, after) in zip(moments, moments[1:]) if what in LOST_BLOCKS]
    return lost + others


def _move(life: RequestLife) -> list[tuple[float, float, str, str | None]]:
    """After the first token, where another instance goes on: waiting for room there, and for its cache; as bars."""
    moments = dict(life.moments)  # the last of each kind
    if Event.CAME not in moments or moments[Event.CAME] <= life.token_s[0]:
        return []
    begin = max(life.token_s[0], moments[Event.TRANSFER])
    return [(life.token_s[0], begin, WAITING, "////"), (begin, moments[Event.CAME], COMMUNICATION, None)]


def _again(life: RequestLife) -> list[tuple[float, float]]:
    """Prefills after the first one: from each later start to the token after it."""
    starts = [when for what, when in life.moments if what is Event.STARTED][1:]
    return [(when, next((token for token in life.token_s if token > when), when)) for when in starts]


def draw_latency(trace: Trace, finding: str, caption: str | None = None, guess_times: float | None = None) -> Figure:
    """Milliseconds from token to token, in the order of the tokens: the first bar is TTFT, the others are ITL.

    With several requests a bar is their median, and the line on it reaches to the slowest. `guess_times`, how many
    times TPOT the learner expected TTFT to be, is drawn as a dashed mark on the first bar.
    """
    lives = _lives(trace)
    figure, (axis,) = new_figure(3.4)
    gaps = [[life.ttft_s, *life.itl_s] for life in lives]
    longest = max(map(len, gaps))
    middle = [median(row[place] for row in gaps if len(row) > place) * 1e3 for place in range(longest)]
    axis.bar(range(1, longest + 1), middle, width=0.8, color=[PREFILL] + [DECODE] * (longest - 1))
    if len(gaps) > 1:
        worst = [max(row[place] for row in gaps if len(row) > place) * 1e3 for place in range(longest)]
        axis.vlines(range(1, longest + 1), middle, worst, color=INK, linewidth=1.2)
    high = max(max(row) for row in gaps) * 1e3
    axis.set(
        xlabel="token of the answer", ylabel="ms since the token before", ylim=(0, high * 1.1), xlim=(0.3, longest + 0.7)
    )  # fmt: skip
    axis.text(
        1.55,
        middle[0] * 0.95,
        f"TTFT {plain(middle[0])} ms: prefill, from arrival on",
        color=INK,
        va="center",
        fontsize=9.5,
    )
    if longest > 1:
        tpot = median(life.tpot_s for life in lives if len(life.token_s) > 1) * 1e3
        axis.text(
            longest / 2, max(middle[1:]) + 0.05 * high, f"TPOT {plain(tpot)} ms: decode, one step a token", color=INK, fontsize=9.5
        )  # fmt: skip
    if guess_times is not None and longest > 1:
        level = guess_times * median(middle[1:])
        top = max(high * 1.1, min(level * 1.1, high * 4))  # a guess far above is named, not drawn at a wrong height
        axis.set_ylim(0, top)
        text = f"your guess {plain(guess_times)} × TPOT" + (", far above ↑" if level > top else "")
        if level <= top:
            axis.hlines(level, 0.3, 3.5, color=GUESS, linestyle="--", linewidth=1.8)
        axis.text(3.6, min(level, top * 0.96), text, color=GUESS, va="center", fontsize=9.5)
    return frame(figure, finding, caption_of(trace) if caption is None else caption)


def _lives(trace: Trace) -> list[RequestLife]:
    """The lives that got a token, by arrival."""
    lives = sorted((life for life in trace.lives if life.token_s), key=lambda life: life.first(Event.ARRIVED))
    if not lives:
        raise ValueError("this trace has no request that got a token: generate something first")
    return lives
