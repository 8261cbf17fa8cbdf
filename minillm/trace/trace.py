"""What a run leaves behind: spans of work on each rank. Pictures and tables are drawn from a `Trace` and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum


class Kind(Enum):
    """What a span's time was spent on."""

    PREFILL = "prefill"
    DECODE = "decode"
    COMMUNICATION = "communication"
    WAITING = "waiting"


@dataclass(frozen=True)
class Span:
    """One stretch of work on a rank; times in seconds of the monotonic clock."""

    rank: int
    kind: Kind
    name: str
    start_s: float
    end_s: float
    tokens: int = 0
    request_ids: tuple[int, ...] = ()

    @property
    def duration_s(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass
class Trace:
    """The spans of one run, in the order in which they ended."""

    spans: list[Span] = field(default_factory=list)

    def add(self, span: Span) -> None:
        """Record a span."""
        self.spans.append(span)

    @classmethod
    def of_ranks(cls, traces: Sequence[Trace]) -> Trace:
        """One trace from what each rank recorded for itself: the n-th becomes rank n."""
        spans = [replace(span, rank=rank) for rank, trace in enumerate(traces) for span in trace.spans]
        return cls(sorted(spans, key=lambda span: span.end_s))
