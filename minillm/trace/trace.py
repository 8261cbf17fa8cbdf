"""What a run leaves behind: spans of work on each rank, and samples of the memory it held.

Pictures and tables are drawn from a `Trace` and nothing else. The file loads no torch; who records is `recorder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from minillm.trace.life import RequestLife


class Kind(Enum):
    """What a span's time was spent on."""

    PREFILL = "prefill"
    DECODE = "decode"
    COMMUNICATION = "communication"
    WAITING = "waiting"


class Category(Enum):
    """What memory is held for."""

    WEIGHTS = "weights"
    KV_CACHE = "KV cache"
    ACTIVATIONS = "activations"


class Clock(Enum):
    """Whose time a trace shows: as it ran here, laid out again one device per rank, or computed from a plan."""

    MEASURED = "measured"
    REPLAYED = "replayed"
    PLANNED = "planned"


@dataclass(frozen=True)
class Span:
    """One stretch of work on a rank.

    Times are seconds of the host's monotonic clock; `cpu_s` is the thread's own CPU time in it, `gap_cpu_s` that
    between this rank's span before and it, such as for scheduling. `message_bytes` is what
    this rank put on a link; `flops` and `memory_bytes` (read and written) follow from shapes by formula (`model/cost.py`).
    Within a `lane` of a rank, spans come in program order. `group`, `sequence` and `peer` match the sides of a message.
    """

    rank: int
    kind: Kind
    name: str
    start_s: float
    end_s: float
    step: int = 0
    lane: str = "compute"
    cpu_s: float | None = None
    tokens: int = 0
    request_ids: tuple[int, ...] = ()
    flops: int = 0
    memory_bytes: int = 0
    message_bytes: int = 0
    group: str = ""
    sequence: int = -1
    peer: int = -1
    gap_cpu_s: float | None = None

    @property
    def duration_s(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class MemorySample:
    """Bytes that a rank held for one category, from `time_s` on until its next sample of that category."""

    rank: int
    category: Category
    time_s: float
    bytes: int


@dataclass
class Trace:
    """The spans and memory samples of one run in the order in which they were recorded, and the lives of its requests.

    `about` says what ran: model, layout, device, machine. It is what a picture's caption is made of.
    """

    spans: list[Span] = field(default_factory=list)
    memory: list[MemorySample] = field(default_factory=list)
    clock: Clock = Clock.MEASURED
    about: dict[str, Any] = field(default_factory=dict)
    lives: list[RequestLife] = field(default_factory=list)

    @property
    def ranks(self) -> list[int]:
        """The ranks that recorded something."""
        return sorted({span.rank for span in self.spans} | {sample.rank for sample in self.memory})

    @property
    def start_s(self) -> float:
        """When the first span began; 0 for a trace without spans."""
        return min((span.start_s for span in self.spans), default=0.0)

    @property
    def end_s(self) -> float:
        """When the last span ended; 0 for a trace without spans."""
        return max((span.end_s for span in self.spans), default=0.0)

    def only(self, lane: str) -> Trace:
        """The spans of one lane, such as "compute", alone: without the others, and without the memory."""
        return replace(self, spans=[span for span in self.spans if span.lane == lane], memory=[])

    def peak_bytes(self, rank: int) -> dict[Category, int]:
        """The most that a rank held at any time, by category."""
        peaks: dict[Category, int] = {}
        for sample in self.memory:
            if sample.rank == rank:
                peaks[sample.category] = max(peaks.get(sample.category, 0), sample.bytes)
        return peaks

    def trim(self, spans: int, lives: int) -> None:
        """Forget the oldest once there are more than twice as many: what a server keeps is a window.

        What each rank's weights take stays.
        """
        for kept, most in ((self.spans, spans), (self.lives, lives)):
            if len(kept) > 2 * most:
                del kept[:-most]
        if len(self.memory) > 4 * spans + len(self.ranks):
            weights = [sample for sample in self.memory if sample.category is Category.WEIGHTS]
            others = [sample for sample in self.memory if sample.category is not Category.WEIGHTS]
            self.memory[:] = weights + others[-2 * spans :]

    @classmethod
    def of_ranks(cls, traces: Sequence[Trace]) -> Trace:
        """One trace from what each rank recorded for itself: the n-th becomes rank n."""
        spans = [replace(span, rank=rank) for rank, trace in enumerate(traces) for span in trace.spans]
        memory = [replace(sample, rank=rank) for rank, trace in enumerate(traces) for sample in trace.memory]
        lives = [replace(life, rank=rank) for rank, trace in enumerate(traces) for life in trace.lives]
        about = dict(traces[0].about) if traces else {}
        spans.sort(key=lambda span: span.end_s)
        return cls(spans, sorted(memory, key=lambda sample: sample.time_s), about=about, lives=lives)
