"""The life of a request: an enum of events, time-stamped, and every latency that follows from them.

    ARRIVED ──waits── STARTED ──prefill── TOKEN ──decode── TOKEN … TOKEN ── FINISHED
                         └─────── PREEMPTED or MOVED ──waits── STARTED …       (or CANCELLED, FAILED at any point)

The file knows no tensors and no texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Event(Enum):
    """What happens to a request."""

    ARRIVED = "arrived"  # it was handed to the engine
    STARTED = "started"  # its prompt is being computed, for the first time or again after it was preempted
    TOKEN = "token"  # it got a token; the first one ends the prefill
    TRANSFER = "transfer"  # an instance for decode has room for its K and V, which may come now
    CAME = "came"  # they are there
    PREEMPTED = "preempted"  # its blocks were taken; it waits again
    MOVED = "moved"  # its replica was lost; it waits at another one
    FINISHED = "finished"  # it got its last token
    CANCELLED = "cancelled"  # its user gave it up
    FAILED = "failed"  # the ranks that served it are gone


LOST_BLOCKS = frozenset({Event.PREEMPTED, Event.MOVED})  # whoever has, is prefilled again


@dataclass
class RequestLife:
    """What happened to one request, in order, in seconds of the host's monotonic clock.

    `rank` is the first one of the replica that served it. `reused_tokens` of its prompt were found in the cache when it started.
    """

    request_id: int
    rank: int = 0
    prompt_tokens: int = 0
    moments: list[tuple[Event, float]] = field(default_factory=list)
    reused_tokens: int = 0

    def note(self, event: Event, now_s: float) -> None:
        """It happened now."""
        self.moments.append((event, now_s))

    def first(self, event: Event) -> float:
        """When it happened first. Raises `ValueError` when it has not."""
        for what, when in self.moments:
            if what is event:
                return when
        raise ValueError(f"request {self.request_id} has not {event.value} yet")

    @property
    def token_s(self) -> list[float]:
        """When each token came."""
        return [when for what, when in self.moments if what is Event.TOKEN]

    @property
    def queue_s(self) -> float:
        """How long it waited before its prefill began."""
        return self.first(Event.STARTED) - self.first(Event.ARRIVED)

    @property
    def ttft_s(self) -> float:
        """Time to first token: from arrival to the first token."""
        return self.first(Event.TOKEN) - self.first(Event.ARRIVED)

    @property
    def e2e_s(self) -> float:
        """End-to-end latency: from arrival to the last token."""
        self.first(Event.TOKEN)  # or there is no latency yet
        return self.token_s[-1] - self.first(Event.ARRIVED)

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first: (e2e - TTFT) / (n - 1); 0 for a single token (DistServe, section 2)."""
        return (self.e2e_s - self.ttft_s) / max(1, len(self.token_s) - 1)

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: the gap before each token but the first. Their mean is TPOT; their tail is what is felt."""
        times = self.token_s
        return [after - before for before, after in zip(times, times[1:])]
