"""A batch being put together by the scheduler."""

from __future__ import annotations

from minillm.policy.batch import Chunk
from minillm.policy.request import ScheduledRequest


class Step:
    """A batch being put together: `budget` tokens and `places` for requests are left."""

    def __init__(self, budget: int, places: int) -> None:
        self.budget, self.places = budget, places
        self.chunks: list[Chunk] = []
        self.copies: list[tuple[int, int]] = []
        self.preempted: list[int] = []
        self.arrivals: list[int] = []
        self.has_prompt = False

    @property
    def has_place(self) -> bool:
        """Whether another request fits."""
        return self.budget > 0 and len(self.chunks) < self.places

    def take(self, request: ScheduledRequest, count: int) -> None:
        """Put a request's next tokens into the batch."""
        start = request.computed + request.in_flight
        end = start + count
        assert request.table is not None
        self.copies += request.table.write(start, end)
        tokens, table = tuple(request.tokens[start:end]), tuple(request.table.blocks)
        away, samples = tuple(request.table.away), end == len(request.tokens)
        self.chunks.append(Chunk(request.request_id, start, tokens, table, samples, away, request.reading))
        request.in_flight += count
        self.budget -= count
        self.has_prompt |= count > 1 or start == 0
