"""What is known of one rank at one moment, and how to say it in a line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

from minillm.ranks.board import Notice, State, View
from minillm.ranks.places import Spot, describe, describe_source
from minillm.ranks.worker import Failure

# What a healthy rank raises when another one went away: a consequence, never the cause.
_CONSEQUENCE = re.compile(
    r"connection (closed|reset|refused)|closed by peer|broken pipe|socket|gloo|nccl|remote process|read error|write error",
    re.IGNORECASE,
)
_OWN_FAULT = re.compile(r"enforce fail|invalid argument", re.IGNORECASE)  # the transport's words for a wrong call


class Life(Enum):
    """How far a rank has come with the present call."""

    RUNNING = "running"
    RETURNED = "returned"
    RAISED = "raised"
    DIED = "died"


@dataclass
class Rank:
    """What is known of one rank at one moment."""

    number: int
    life: Life
    view: View
    failure: Failure | None = None
    raised_at_s: float = 0.0
    exit_text: str = ""  # how the process ended
    place: str = ""  # where its main thread stands, when it was asked
    spots: list[Spot] = field(default_factory=list)
    inside_torch: bool = False  # and whether that is inside one of torch's own waits

    @property
    def waits(self) -> Notice | None:
        """The operation that the rank waits in, or waited in when it lost its connection."""
        if self.life is Life.RUNNING:
            return self.view.current
        return self.view.last if self.is_consequence else None

    @property
    def is_consequence(self) -> bool:
        """Whether the rank raised only because another one went away."""
        failure, last = self.failure, self.view.last
        if failure is None or last is None or last.state not in (State.WAITING, State.FAILED):
            return False  # it raised outside any communication
        kinds = ("RuntimeError", "DistBackendError", "DistNetworkError")
        return failure.kind in kinds and bool(_CONSEQUENCE.search(failure.text)) and not _OWN_FAULT.search(failure.text)

    def describe(self) -> str:
        """One line: what the rank does, or how it ended."""
        if self.life is Life.RETURNED:
            return "has returned"
        if self.life is Life.DIED:
            last = self.view.current
            return f"{self.exit_text}{f', in {describe_notice(last)}' if last else ''}"
        if self.failure is not None and self.waits is None:
            return f"raised {self.failure.headline}" + (
                f", {describe(*self.failure.spots[-1])}" if self.failure.spots else ""
            )
        if self.waits is not None:
            return f"waits in {describe_notice(self.waits)}"
        return self.place or "runs"


def describe_notice(notice: Notice) -> str:
    """ "all_reduce [4] float32, line 3: dist.all_reduce(x)"."""
    return f"{describe_operation(notice)}, {describe_source(notice.source)}"


def describe_operation(notice: Notice) -> str:
    """ "all_reduce [4] float32", "recv [4] float32 from rank 1"."""
    toward = ""
    if notice.partner:
        toward = f" {'to' if 'send' in notice.name else 'from'} rank {notice.members[0]}"
    return f"{notice.name}{' ' * bool(notice.signature)}{notice.signature}{toward}"
