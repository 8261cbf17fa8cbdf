"""What of a collective is waiting for its last member."""

from __future__ import annotations

from minillm.trace.trace import Kind, Span, Trace
from minillm.trace.waits import with_waits


def test_only_the_last_one_does_not_wait() -> None:
    def sum_of(rank: int, begin_s: float, sequence: int = 0, group: str = "tp") -> Span:
        return Span(rank, Kind.COMMUNICATION, "all_reduce", begin_s, 5.0, 0, group=group, sequence=sequence)

    work = Span(0, Kind.PREFILL, "prefill", 0.0, 1.0, 0)
    sent = Span(0, Kind.COMMUNICATION, "hidden states", 1.0, 2.0, 0, "wire", group="pp", peer=1)
    trace = Trace(spans=[work, sum_of(0, 1.0), sum_of(1, 4.0), sum_of(0, 2.0, sequence=1), sent])
    told = [(span.rank, span.kind, span.start_s, span.end_s) for span in with_waits(trace).spans]
    assert told == [
        (0, Kind.PREFILL, 0.0, 1.0),
        (0, Kind.WAITING, 1.0, 4.0),
        (0, Kind.COMMUNICATION, 4.0, 5.0),
        (1, Kind.COMMUNICATION, 4.0, 5.0),
        (0, Kind.COMMUNICATION, 2.0, 5.0),
        (0, Kind.COMMUNICATION, 1.0, 2.0),
    ]
