"""The replay clock against closed forms, on programs made up from numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.hardware.devices import Link, find_device
from minillm.trace.collectives import collective_time_s
from minillm.trace.critical import critical_path
from minillm.trace.programs import pipeline_program
from minillm.trace.replay import bubble_share, is_compute, replay
from minillm.trace.trace import Clock, Kind, Span, Trace

LINK = Link("test", 1000.0, 0.5, "made up")
TIMES = st.integers(1, 6).flatmap(
    lambda m: st.lists(st.lists(st.integers(1, 9), min_size=m, max_size=m), min_size=1, max_size=6)
)


@given(st.integers(1, 8), st.integers(1, 20))
def test_the_bubble_of_equal_stages(p: int, m: int) -> None:
    run = replay(pipeline_program([[2.0] * m] * p))
    assert bubble_share(run) == pytest.approx((p - 1) / (m + p - 1))
    assert run.end_s == 2.0 * (m + p - 1)
    assert run.clock is Clock.REPLAYED


@settings(deadline=None)
@given(TIMES, st.integers(0, 3000))
def test_a_chain_is_its_recurrence(times: list[list[int]], size: int) -> None:
    """A stage begins a micro-batch when its input is there and the one before is done; a wire carries one after another."""
    run = replay(pipeline_program([[float(t) for t in row] for row in times], size), LINK)
    done = {}
    for stage, row in enumerate(times):
        now = wire = 0.0
        for batch, time in enumerate(row):
            if stage:
                wire = max(wire, done[stage - 1, batch])
                arrival, wire = wire + 0.5 + size / 1000, wire + size / 1000
                now = max(now, arrival)
            now = done[stage, batch] = now + time
    spans = {(span.rank, span.step): span.end_s for span in run.spans if is_compute(span)}
    assert spans == pytest.approx(done)


@settings(deadline=None)
@given(TIMES, st.integers(0, 3000), st.none() | st.integers(1, 4))
def test_the_critical_path_is_as_long_as_the_run(times: list[list[int]], size: int, depth: int | None) -> None:
    """It has no gaps but on the wires, starts at 0, and ends at the end; shortening a span that is not on it changes nothing."""
    program = pipeline_program([[float(t) for t in row] for row in times], size, depth)
    run = replay(program, LINK)
    path = critical_path(run)
    computed = [span for span in path if is_compute(span)]
    assert path[0].start_s == 0.0
    assert computed[-1].end_s == max(span.end_s for span in run.spans if is_compute(span))
    for before, after in zip(path, path[1:]):
        assert after.start_s >= before.start_s
    on_path = {(span.rank, span.step) for span in computed}
    shorter = [
        replace(span, cpu_s=0.9 * span.cpu_s) if is_compute(span) and (span.rank, span.step) not in on_path else span
        for span in program.spans
    ]
    assert replay(Trace(shorter), LINK).end_s == pytest.approx(run.end_s)


@given(st.integers(2, 6), st.integers(1, 5))
def test_decoding_goes_round(p: int, rounds: int) -> None:
    """With as many groups in flight as stages every stage is busy; with one, the next token waits for the whole way."""
    steps = p * rounds
    full = replay(pipeline_program([[1.0] * steps] * p, depth=p))
    alone = replay(pipeline_program([[1.0] * steps] * p, depth=1))
    assert full.end_s == steps + p - 1
    assert alone.end_s == steps * p
    assert bubble_share(alone) == pytest.approx(1 - 1 / p)


def test_a_ring_of_blocking_messages() -> None:
    """Each rank sends to the next and receives from the one before, n - 1 times: n - 1 messages long."""
    spans = []
    for turn in range(3):
        for rank in range(4):
            about = {"group": "ring", "sequence": turn}
            at = 2.0 * turn
            spans.append(Span(rank, Kind.COMMUNICATION, "send", at, at, peer=(rank + 1) % 4, message_bytes=500, lane="wire", **about))  # fmt: skip
            spans.append(Span(rank, Kind.WAITING, "recv", at + 1, at + 1, peer=(rank - 1) % 4, **about))
    assert replay(Trace(spans), LINK).end_s == pytest.approx(3 * LINK.time_s(500))


@pytest.mark.parametrize(
    ("name", "seconds"), [("all_reduce", 6 * 0.75), ("all_gather", 3 * 1.5), ("broadcast", 2 * 1.5)]
)
def test_a_collective_waits_for_the_last(name: str, seconds: float) -> None:
    spans = []
    for rank in range(4):
        spans.append(Span(rank, Kind.DECODE, "decode", 0.0, 1.0, cpu_s=1.0 + rank))
        spans.append(Span(rank, Kind.COMMUNICATION, name, 1.0, 1.0, group="g", sequence=0, message_bytes=1000))
        spans.append(Span(rank, Kind.DECODE, "decode", 2.0, 3.0, cpu_s=1.0))
    run = replay(Trace(spans), LINK)
    assert collective_time_s(name, 4, 1000, LINK) == pytest.approx(seconds)
    assert run.end_s == pytest.approx(4.0 + seconds + 1.0)
    path = critical_path(run)
    assert [span.rank for span in path if span.name == "decode"] == [3, path[-1].rank]
    with pytest.raises(ValueError, match="no formula for 'gossip'"):
        collective_time_s("gossip", 4, 1, LINK)


def test_another_device() -> None:
    """The roofline's time in the place of the recorded one."""
    device = find_device("T4")
    compute = Span(
        0, Kind.PREFILL, "prefill", 0.0, 5.0, cpu_s=5.0, gap_cpu_s=1.0, flops=int(8.1e12), memory_bytes=int(320e9) * 3
    )
    trace = Trace([compute], about={"dtype": "float32"})
    assert replay(trace).end_s == 6.0
    assert replay(trace, device=device).end_s == pytest.approx(3.0)
    assert replay(trace, device=device, dtype="float16").end_s == pytest.approx(3.0)
    assert replay(trace, device=device).about["device"] == "T4"
    with pytest.raises(ValueError, match="T4 has no rate for bfloat16"):
        replay(trace, device=device, dtype="bfloat16")


def test_waiting_for_nobody() -> None:
    program = pipeline_program([[1.0], [1.0]])
    lost = Trace([span for span in program.spans if span.kind is not Kind.COMMUNICATION])
    with pytest.raises(ValueError, match="rank 1 waits for 'hidden states' from rank 0, which never comes"):
        replay(lost)
    with pytest.raises(ValueError, match="nothing was computed"):
        bubble_share(Trace())
    with pytest.raises(ValueError, match="a time for each micro-batch"):
        pipeline_program([[1.0], [1.0, 2.0]])


def overlapped(chunks: int, compute_s: float, message_bytes: int) -> Trace:
    """Two ranks compute a product in parts, whose sums are under way while the next part is computed."""
    spans = []
    for rank in range(2):
        for part in range(chunks):
            at = 2.0 * part
            spans.append(Span(rank, Kind.PREFILL, "part", at, at + 1, cpu_s=compute_s * (1 + 0.7 * rank)))
            sent = {"group": "tp", "sequence": part, "message_bytes": message_bytes}
            spans.append(Span(rank, Kind.COMMUNICATION, "all_reduce", at + 0.5, at + 3, lane="wire", **sent))
        for part in range(chunks):
            at = 2.0 * chunks + part
            spans.append(Span(rank, Kind.WAITING, "all_reduce", at, at + 0.5, group="tp", sequence=part))
    return Trace(spans)


def test_sums_under_way_while_the_work_goes_on() -> None:
    """Long work hides all sums but the last; long sums hide all work but the first part."""
    link = Link("test", bytes_per_s=1000.0, latency_s=0.0, source="")
    sum_s = collective_time_s("all_reduce", 2, 500, link)
    run = replay(overlapped(4, 1.0, 500), link)
    assert run.end_s == pytest.approx(4 * 1.7 + sum_s)  # rank 1 takes 1.7 s a part
    assert [span.name for span in critical_path(run)] == ["part"] * 4 + ["all_reduce"]
    run = replay(overlapped(4, 0.01, 500), link)
    assert run.end_s == pytest.approx(0.017 + 4 * sum_s)
    assert [span.lane for span in critical_path(run)] == ["compute"] + ["wire"] * 4
    assert replay(overlapped(4, 1.0, 500)).end_s == pytest.approx(6.8)  # a free link
