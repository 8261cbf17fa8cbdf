"""Ranks in one process, for learning: threads that take turns, so that a run is always the same and a debugger works.

`ToyComm` has `send`, `recv`, `all_reduce`, `broadcast`, `all_gather` and `barrier` of `minillm.ranks.comm.Comm`. A toy
`send` returns only when its message was received, as between GPUs; when nobody can go on, the run ends at once and says
who waits for what. It knows nothing of exercises.
"""

from __future__ import annotations

import contextvars
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from minillm.ranks.places import Spot, describe, is_cell, line_of_error
from minillm.ranks.watch import LIBRARY, shape_of


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


class _Stuck(BaseException):
    """Ends a rank that waits in vain; no `except Exception` of a learner catches it."""


@dataclass
class _Letter:
    tensor: torch.Tensor
    sent_at: int
    taken: bool = False


class _World:
    """The ranks' threads and the baton: only its holder runs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.run = ToyRun([None] * size)
        self.boxes: dict[
            tuple[int, int, int | str], list[_Letter]
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
                self.blocked[rank] = (f"{what} ({_line()})", awaited)
                self._check_stuck()
                self._pass_on(rank)
                self.baton.wait_for(lambda: self.turn == rank or self.stuck)
                if self.stuck and not ready():
                    raise _Stuck
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


class ToyComm:
    """The communicator of one toy rank: `rank`, `size`, and the calls of `Comm`."""

    def __init__(self, world: _World, rank: int) -> None:
        self._world, self.rank, self.size = world, rank, world.size

    def send(self, tensor: torch.Tensor, to: int, tag: int = 0) -> None:
        """Send `tensor` to a rank; returns when it was received. Raises `ValueError` for a rank that there is not."""
        self._post(tensor, to, _checked(tag), f"waits for rank {to} to receive")

    def recv(self, tensor: torch.Tensor, source: int, tag: int = 0) -> torch.Tensor:
        """Receive into `tensor`, in place."""
        return self._take(tensor, source, _checked(tag), f"waits to receive from rank {source}")

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place: everything goes to rank 0 and comes back."""
        parts = self._gather(tensor, "all_reduce")
        if parts is not None:
            tensor.copy_(torch.stack(parts).sum(0))
        return self._tell(tensor, "all_reduce")

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Copy the root's tensor to every rank, in place."""
        return self._tell(tensor, "broadcast", root)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n, …] on each rank -> [size · n, …] on every rank, in rank order."""
        parts = self._gather(tensor, "all_gather")
        whole = torch.cat(parts) if parts is not None else tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        return self._tell(whole, "all_gather")

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce(torch.zeros(0))

    def _gather(self, tensor: torch.Tensor, name: str) -> list[torch.Tensor] | None:
        """Every rank's tensor, on rank 0."""
        if self.rank:
            self._post(tensor, 0, name, f"waits in {name} for rank 0")
            return None
        rest = [self._take(torch.empty_like(tensor), other, name, f"waits in {name} for rank {other}") for other in range(1, self.size)]  # fmt: skip
        return [tensor.clone(), *rest]

    def _tell(self, tensor: torch.Tensor, name: str, root: int = 0) -> torch.Tensor:
        """The root's tensor, on every rank."""
        if self.rank != root:
            return self._take(tensor, root, name, f"waits in {name} for rank {root}")
        for other in range(self.size):
            if other != root:
                self._post(tensor, other, name, f"waits in {name} for rank {other}")
        return tensor

    def _post(self, tensor: torch.Tensor, to: int, tag: int | str, what: str) -> None:
        self._check(to, "to")
        letter = _Letter(tensor.detach().clone(), self._world.tick())
        self._world.boxes.setdefault((self.rank, to, tag), []).append(letter)
        self._world.woke(to)
        self._world.wait(self.rank, lambda: letter.taken, what, to)

    def _take(self, tensor: torch.Tensor, source: int, tag: int | str, what: str) -> torch.Tensor:
        self._check(source, "source")
        box = self._world.boxes.setdefault((source, self.rank, tag), [])
        self._world.tick()
        self._world.wait(self.rank, lambda: bool(box), what, source)
        letter = box.pop(0)
        letter.taken = True
        self._world.woke(source)
        sent, wanted = shape_of(letter.tensor), shape_of(tensor)
        if letter.tensor.numel() != tensor.numel() or letter.tensor.dtype != tensor.dtype:
            raise ValueError(f"rank {source} sent {sent}, but rank {self.rank} receives into {wanted}")
        name = tag if isinstance(tag, str) else "send"
        message = Message(source, self.rank, letter.tensor.nbytes, letter.sent_at, self._world.tick(), name)
        self._world.run.messages.append(message)
        with torch.no_grad():
            return tensor.copy_(letter.tensor.view(tensor.shape))

    def _check(self, other: int, name: str) -> None:
        if not 0 <= other < self.size:
            raise ValueError(f"{name}={other}: there are ranks 0 to {self.size - 1}")
        if other == self.rank:
            raise ValueError(f"{name}={other}: rank {self.rank} cannot exchange messages with itself")


_OURS = (str(Path(__file__).resolve().parents[1]) + os.sep, *LIBRARY)


def _checked(tag: int) -> int:
    if tag < 0:
        raise ValueError(f"tag={tag}: give a number from 0")
    return tag


def run_toy(function: Callable[..., Any], inputs: Sequence[Any], limit_s: float | None = None) -> ToyRun:
    """Call `function(comm, input)` as one rank per input. With `limit_s`, a rank that still runs then is named.

    Such a rank's thread cannot be ended: do that in a process that can.
    """
    world = _World(len(inputs))
    threads = [
        threading.Thread(
            target=contextvars.copy_context().run,
            args=(_live, world, rank, function, given),
            daemon=True,
            name=f"rank {rank}",
        )
        for rank, given in enumerate(inputs)
    ]
    for thread in threads:
        thread.start()
    end = None if limit_s is None else time.monotonic() + limit_s
    for thread in threads:
        thread.join(None if end is None else max(0.0, end - time.monotonic()))
    busy = world.turn
    if any(thread.is_alive() for thread in threads) and busy >= 0:
        frame = sys._current_frames().get(threads[busy].ident or 0)
        world.run.endless[busy] = _cell_line(frame) if frame is not None else "at an unknown line"
    return world.run


def _live(world: _World, rank: int, function: Callable[..., Any], given: Any) -> None:
    """A rank's life: wait for the baton, work, leave."""
    with world.baton:
        world.baton.wait_for(lambda: world.turn == rank or world.stuck)
    try:
        world.run.results[rank] = function(ToyComm(world, rank), given)
    except _Stuck:
        pass
    except BaseException as error:  # sys.exit too ends this rank, and nothing else
        message = " ".join(f"{type(error).__name__}: {error}".split())
        world.run.errors[rank] = f"{message[:100]} ({line_of_error(error)})"
    finally:
        world.leave(rank)


def _line() -> str:
    """Where in the learner's own code the running rank stands."""
    return _cell_line(sys._getframe(1))


def _cell_line(frame: FrameType) -> str:
    return _innermost([(each.f_code.co_filename, line) for each, line in traceback.walk_stack(frame)])


def _innermost(spots: list[Spot]) -> str:
    """Of places from the innermost out: the first that is a cell's, else the first outside this package and threading."""
    own = [spot for spot in spots if not spot[0].startswith(_OURS) and not spot[0].endswith("threading.py")]
    cells = [spot for spot in own if is_cell(spot[0])]
    best = (cells or own)[:1]
    return describe(*best[0]) if best else "at an unknown line"
