"""A request as the scheduler sees it, in which order requests go, and how full an engine is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from minillm.policy.blocks import BlockTable


class Status(Enum):
    """Where a request stands with the scheduler."""

    WAITING = "waiting"  # holds no blocks: new, or preempted
    RUNNING = "running"  # holds blocks
    KEPT = "kept"  # holds blocks until another instance, which goes on with it, has their content
    GONE = "gone"  # finished or cancelled


@dataclass(eq=False)
class ScheduledRequest:
    """A request as the scheduler sees it.

    `tokens` is the prompt and what was generated, `longest` the most there can be; `computed` of them are in the cache, and
    the `in_flight` next ones in batches under way. `samples` sequences will come of it, by forks; each takes one of the places of a batch.

    One that is to be `handed` over goes on at another instance after its first token. Each time that its prompt is read has a number,
    `reading`, which other samples of it share. At the instance where it goes on, K and V of as many of its tokens are `arriving`; until
    they are there they count as `in_flight`, and none is computed. `predicted` is how long its sequence is thought to become (0: `longest`).
    """

    request_id: int
    tokens: list[int]
    longest: int
    arrival_s: float = 0.0
    priority: float = 0.0
    samples: int = 1
    status: Status = Status.WAITING
    computed: int = 0
    reused: int = 0  # tokens found in the cache when it last started
    in_flight: int = 0
    table: BlockTable | None = field(default=None, repr=False)
    handed: bool = False
    reading: int = 0
    arriving: int = 0
    predicted: int = 0

    @property
    def most_cached(self) -> int:
        """The most tokens that will be in the cache: all but the last, which nothing follows, or which follows elsewhere."""
        return len(self.tokens) if self.handed else max(len(self.tokens), self.longest - 1)

    @property
    def to_come(self) -> int:
        """Tokens that it is thought to give yet, at least one."""
        return max(1, (self.predicted or self.longest) - len(self.tokens))

    @property
    def remaining(self) -> int:
        """Tokens neither in the cache nor under way: 1 when it decodes, 0 when it waits for its next token, or for its cache."""
        return 0 if self.arriving and self.in_flight else len(self.tokens) - self.computed - self.in_flight


@dataclass(frozen=True)
class Load:
    """How full an engine is: its requests, and the blocks of its KV cache."""

    running: int
    waiting: int
    used_blocks: int
    num_blocks: int


Order = Callable[[ScheduledRequest, float], Any]


def first_come(request: ScheduledRequest, now_s: float) -> Any:
    """The default order: by `priority`, the lowest first, then by arrival."""
    return request.priority, request.arrival_s, request.request_id
