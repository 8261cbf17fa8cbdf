"""What a failed job says: one exception that names the culprit and where every other rank was waiting.

It knows nothing of processes; `diagnosis` fills it, `pool` raises it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Fault(Enum):
    """Why a job on several ranks ended early."""

    RAISED = "raised"  # a rank's own code raised
    DIED = "died"  # a rank's process ended: killed, exited, crashed
    DISAGREED = "disagreed"  # the same collective of a group, called differently
    ABSENT = "absent"  # a rank returned while others wait for it
    LATE = "late"  # a rank computes, sleeps or is stopped while others wait for it
    DEADLOCK = "deadlock"  # ranks wait for one another in a circle
    LOST = "lost"  # the reply could not be sent or read


@dataclass
class Verdict:
    """A diagnosis: who caused it, and where each rank stood (rank -> one line)."""

    fault: Fault
    culprits: list[int]
    headline: str
    collective: str | None = None
    line: str | None = None
    places: dict[int, str] = field(default_factory=dict)
    waits_for: dict[int, list[int]] = field(default_factory=dict)
    details: str = ""
    recoverable: bool = False  # every rank has replied and no group is out of step: the ranks live on


class RankError(RuntimeError):
    """A job on several ranks failed.

    `rank` is the first culprit, `ranks` all of them; `fault` says what happened, `collective` and `line` where;
    `waiting` maps every other rank to the place where it stood, `waits_for` to the ranks it was waiting for.
    """

    def __init__(self, verdict: Verdict, note: str = "") -> None:
        self.verdict = verdict
        self.fault = verdict.fault
        self.ranks = list(verdict.culprits)
        self.rank = self.ranks[0] if self.ranks else None
        self.collective = verdict.collective
        self.line = verdict.line
        self.waiting = {rank: text for rank, text in verdict.places.items() if rank not in self.ranks}
        self.waits_for = verdict.waits_for
        super().__init__(self._text(note))

    def _render_traceback_(self) -> list[str]:
        """What a notebook shows: the diagnosis alone, without the launching side's own frames."""
        return [f"RankError: {self}"]

    def _text(self, note: str) -> str:
        lines = [self.verdict.headline]
        lines += [f"  rank {rank}  {text}" for rank, text in sorted(self.verdict.places.items())]
        if self.verdict.details:
            lines += ["", self.verdict.details.rstrip()]
        if note:
            lines += ["", note]
        return "\n".join(lines)


class Stopped(KeyboardInterrupt):
    """The stop button, or Ctrl-C, while ranks ran; the text says where each of them stood."""

    def _render_traceback_(self) -> list[str]:
        return [f"KeyboardInterrupt: {self}"]
