"""Pictures of prefill and decode apart: who stutters, what moves, and which goals are met."""

from __future__ import annotations

import pytest

from minillm.disagg.sizing import Demand, rates_of
from minillm.hardware.devices import find_device
from minillm.model.shapes import SHAPES
from minillm.trace.life import Event, RequestLife
from minillm.trace.trace import Kind, Span, Trace
from minillm.viz.moves import draw_moves, waits_of
from minillm.viz.sizing import draw_ratio, draw_stall
from minillm.viz.slo_plane import SLOPlane
from minillm.viz.stutter import draw_stutter, longest_gap

LLAMA, H100 = SHAPES["Llama-3.1-8B"], find_device("H100")


def life(number: int, prompt: int, tokens: list[float], arrived: float = 0.0) -> RequestLife:
    moments = [(Event.ARRIVED, arrived), (Event.STARTED, arrived + 0.01), *((Event.TOKEN, at) for at in tokens)]
    return RequestLife(number, prompt_tokens=prompt, moments=[*moments, (Event.FINISHED, tokens[-1])])


def test_the_longest_gap_is_named() -> None:
    lives = [life(0, 8, [0.1, 0.2, 0.9, 1.0]), life(1, 100, [0.8, 0.9], 0.15)]
    assert longest_gap(lives) == (0.2, 0.9)
    later = [life(0, 8, [0.1, 0.2, 0.35, 2.0]), life(1, 100, [0.3, 0.4], 0.15)]
    assert longest_gap(later) == (0.2, 0.35), "only while the long prompt is read"
    axis = draw_stutter({"together": lives, "apart": lives}, "finding", "caption", guess_s=0.3).axes[0]
    texts = [text.get_text() for text in axis.texts]
    assert texts.count(" 700 ms") == 2 and " your guess" in texts
    with pytest.raises(ValueError, match="together: nothing streams"):
        draw_stutter({"together": lives[1:]}, "finding", "caption")


def test_what_is_seen_of_a_move_is_told() -> None:
    spans = [
        Span(0, Kind.PREFILL, "step", 0.0, 1.0, 1, request_ids=(0,)),
        Span(0, Kind.COMMUNICATION, "KV cache", 1.0, 1.2, 1, message_bytes=10, request_ids=(0,)),
        Span(1, Kind.DECODE, "step", 1.25, 1.3, 1, request_ids=(0,)),
    ]
    trace = Trace(spans=spans, lives=[life(0, 8, [1.0, 1.3])])
    assert waits_of(trace) == (1.0, 1.25)
    axes = draw_moves({"whole": trace, "layer": trace}, "finding", "caption").axes
    assert [text.get_text() for axis in axes for text in axis.texts] == ["250 ms until decode begins "] * 2
    with pytest.raises(ValueError, match="no cache was moved"):
        draw_moves({"whole": Trace(spans=spans[::2], lives=trace.lives)}, "", "")


def test_goals_are_met_inside_the_rectangle() -> None:
    ways = {"together": [life(0, 8, [0.1, 0.2, 0.9]), life(1, 99, [0.5, 0.6])], "apart": [life(0, 8, [0.1, 0.2, 0.3]), life(1, 99, [2.0, 2.1])]}  # fmt: skip
    plane = SLOPlane(ways, "question", "caption", 50, ttft_s=1.0, gap_s=0.3)
    assert plane.inside(1.0, 0.3) == {"together": 1, "apart": 1}
    assert plane.inside(3.0, 0.3) == {"together": 1, "apart": 2}
    assert plane.long == [False, True] and plane.dots[1] == [[0.1, pytest.approx(0.1)], [2.0, pytest.approx(0.1)]]
    titles = [axis.get_title(loc="left") for axis in plane.figure().axes]
    assert titles[0].startswith("together\n1 of 2 inside: ")
    somebody = SLOPlane(ways, "question", "caption", 50)
    assert sum(somebody.inside(*somebody.slo).values()) > 0
    with pytest.raises(ValueError, match="has no gap"):
        SLOPlane({"one": [life(0, 8, [0.1])]}, "", "", 50)
    with pytest.raises(ValueError, match="the same requests"):
        SLOPlane({"one": ways["apart"], "two": ways["apart"][:1]}, "", "", 50)


def test_a_winner_flips() -> None:
    findings = [draw_stall(LLAMA, H100, "bfloat16", 4096, gbits, "")._suptitle.get_text() for gbits in (1, 100, 10_000)]
    assert "too slow" in findings[0] and "layer by layer is hidden" in findings[1] and "any way" in findings[2]
    ratios = [
        draw_ratio(rates_of(LLAMA, H100, "bfloat16", Demand(tokens_in, out, 0.03)), 8, "")._suptitle.get_text()
        for tokens_in, out in ((8192, 16), (128, 1024))
    ]
    assert ratios[0].startswith("7:1") and ratios[1].startswith("1:7")
    strict, loose = (rates_of(LLAMA, H100, "bfloat16", Demand(2048, 256, goal)) for goal in (0.012, 0.1))
    assert strict.split(strict.best(8), 8 - strict.best(8)) > 8 * strict.both
    assert loose.split(loose.best(8), 8 - loose.best(8)) < 8 * loose.both
    tight = draw_ratio(rates_of(LLAMA, H100, "bfloat16", Demand(8192, 16, 0.01)), 8, "")._suptitle.get_text()
    assert "break the goal" in tight
