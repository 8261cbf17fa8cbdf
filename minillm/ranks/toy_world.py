"""The world of toy ranks: their letters on the way, the baton that only one of them holds, and what a run leaves.

It knows no communicator; `toy.py` has that.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from minillm.ranks.places import line_of_frame


@dataclass(frozen=True)
class Message:
    """One message that was received: from rank `source` to `target`, in a "send" or inside a collective.

    Times count the run's communication calls.
    """

    source: int
    target: int
    bytes: int
    sent_at: int
    received_at: int
    operation: str = "send"


@dataclass
class ToyRun:
    """What a run left: each rank's result, the messages, and what stopped it, if something did."""

    results: list[Any]
    messages: list[Message] = field(default_factory=list)
    waits: dict[int, str] = field(default_factory=dict)  # ranks that could not go on: what they waited for
    waits_for: dict[int, int] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)  # ranks that raised: the error and its line
    endless: dict[int, str] = field(default_factory=dict)  # the rank that did not end: its line

    @property
    def bytes(self) -> int:
        """All bytes that were received."""
        return sum(message.bytes for message in self.messages)

    @property
    def ended(self) -> bool:
        """Whether every rank returned."""
        return not (self.waits or self.errors or self.endless)


class Stuck(BaseException):
    """Ends a rank that waits in vain; no `except Exception` of a learner catches it."""


@dataclass
class Letter:
    """A message on its way: what was sent, its number among all messages, and whether somebody took it."""

    tensor: torch.Tensor
    sent_at: int
    taken: bool = False


class World:
    """The ranks' threads and the baton: only its holder runs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.run = ToyRun([None] * size)
        self.boxes: dict[
            tuple[int, int, int | str], list[Letter]
        ] = {}  # (source, target, tag or collective) -> letters
        self.turn = 0
        self.alive = set(range(size))
        self.blocked: dict[int, tuple[str, int]] = {}
        self.calls = 0
        self.stuck = False
        self.baton = threading.Condition()

    def wait(self, rank: int, ready: Callable[[], bool], what: str, awaited: int) -> None:
        """Hand the baton on until `ready()`; ends the rank when nobody can go on."""
        with self.baton:
            while not ready():
                self.blocked[rank] = (f"{what} ({line_of_frame(sys._getframe(1))})", awaited)
                self._check_stuck()
                self._pass_on(rank)
                self.baton.wait_for(lambda: self.turn == rank or self.stuck)
                if self.stuck and not ready():
                    raise Stuck
            self.blocked.pop(rank, None)

    def tick(self) -> int:
        """Number a communication call."""
        self.calls += 1
        return self.calls

    def woke(self, rank: int) -> None:
        """What this rank waited for has come, if it waited."""
        self.blocked.pop(rank, None)

    def leave(self, rank: int) -> None:
        """The rank has returned or raised."""
        with self.baton:
            self.alive.discard(rank)
            self.blocked.pop(rank, None)
            self._check_stuck()
            self._pass_on(rank)

    def _check_stuck(self) -> None:
        if self.alive and not self.stuck and all(rank in self.blocked for rank in self.alive):
            self.stuck = True
            self.run.waits = {rank: what for rank, (what, _) in sorted(self.blocked.items())}
            self.run.waits_for = {rank: other for rank, (_, other) in self.blocked.items()}

    def _pass_on(self, rank: int) -> None:
        """To the next rank that can go on, or to all when nobody can."""
        order = [(rank + step) % self.size for step in range(1, self.size + 1)]
        free = [other for other in order if other in self.alive and other not in self.blocked]
        self.turn = free[0] if free else -1
        self.baton.notify_all()
