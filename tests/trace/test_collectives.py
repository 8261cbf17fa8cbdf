"""What all-reduces cost: formulas against programs run on the replay clock, and a line through points."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.hardware.devices import Link
from minillm.ranks import speed
from minillm.ranks.speed import fit_link
from minillm.trace.collectives import ALGORITHMS, collective_time_s, sent_share
from minillm.trace.replay import replay
from minillm.trace.trace import Kind, Span, Trace
from minillm.viz.ringboard import play, ring_moves

LINK = Link("test", bytes_per_s=1e6, latency_s=1e-3, source="")


@given(st.integers(2, 16), st.integers(1, 10_000))
def test_the_ring_by_its_formula(count: int, size: int) -> None:
    expected = 2 * (count - 1) * (1e-3 + size / count / 1e6)
    assert ALGORITHMS["ring"](count, size, LINK) == pytest.approx(expected)
    assert collective_time_s("all_reduce", count, size, LINK) == pytest.approx(expected)


@given(st.integers(2, 6))
def test_the_boards_ring_takes_the_formulas_time(count: int) -> None:
    """Its sends one by one on the replay clock: the bytes and the seconds of the formula."""
    size = 1000 * count
    spans = []
    for number, (source, target, _) in enumerate(ring_moves(count)):
        sent = {"group": "ring", "sequence": number // count, "peer": target, "message_bytes": size // count}
        spans.append(
            Span(source, Kind.COMMUNICATION, "send", float(number // count), number // count + 0.1, lane="wire", **sent)
        )
        spans.append(
            Span(
                target,
                Kind.WAITING,
                "recv",
                number // count + 0.5,
                number // count + 0.9,
                group="ring",
                sequence=number // count,
                peer=source,
            )
        )
    assert replay(Trace(spans), LINK).end_s == pytest.approx(ALGORITHMS["ring"](count, size, LINK))
    held, chunks = play(count, ring_moves(count))
    assert all(len(chunk) == count for row in held for chunk in row)
    assert {sent / count for sent in chunks} == {sent_share("ring", count)}


def test_sends_that_count_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 0's numbers would count twice"):
        play(3, [(0, 1, 0), (0, 2, 0), (1, 2, 0)])
    with pytest.raises(ValueError, match="rank 1 has all of it already"):
        play(3, [(0, 1, 0), (0, 1, 0)])
    held, sent = play(3, [(0, 1, 2), (1, 0, 2)])  # the sum takes the place of what is part of it
    assert held[0][2] == {0, 1} and sent == [1, 1, 0]


@given(st.floats(1e-6, 1e-2), st.floats(1e5, 1e11))
def test_a_line_is_found(latency_s: float, bytes_per_s: float) -> None:
    link = Link("", bytes_per_s, latency_s, "")
    sizes = [1024 * 4**power for power in range(7)]
    found = fit_link("", {size: link.time_s(size) for size in sizes})
    assert all(found.time_s(size) == pytest.approx(link.time_s(size), rel=1e-3) for size in sizes)
    with pytest.raises(ValueError, match="a line needs two points"):
        fit_link("", {1: 1.0})


@given(st.integers(2, 8), st.floats(1e-6, 1e-2), st.floats(1e5, 1e11))
def test_a_ring_over_the_link_takes_what_was_measured(count: int, latency_s: float, bytes_per_s: float) -> None:
    """Whatever carried the sums: on the replay clock they take as long."""
    fit = Link("", bytes_per_s, latency_s, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "measure_all_reduce", lambda _, sizes: {size: fit.time_s(size) for size in sizes})
        link = speed.measure_ring(SimpleNamespace(world_size=count))  # type: ignore[arg-type]
    for size in speed.RING_SIZES:
        assert collective_time_s("all_reduce", count, size, link) == pytest.approx(fit.time_s(size), rel=1e-3)
    with pytest.raises(ValueError, match="a ring has two ranks at least"):
        speed.measure_ring(SimpleNamespace(world_size=1))  # type: ignore[arg-type]
