"""A rank on another host, as the leader of a launched job sees it: its keeper, which starts and ends it there, and the process.

The other side is in `keeper.py`.
"""

from __future__ import annotations

import multiprocessing
import threading
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from queue import Empty, Queue
from typing import Any

from minillm.ranks.board import BOARD_BYTES
from minillm.ranks.errors import Fault, RankError, Verdict
from minillm.ranks.keeper import Card, Standing
from minillm.ranks.process import RankProcess
from minillm.ranks.worker import Seat

JOIN_S = 60.0  # how long all processes of a launcher may take to come
ANSWER_S = 2.0  # how long it may take to tell when it is asked


@dataclass(frozen=True)
class Pipe:
    """A connection to a rank: its "calls" or its "control", of the process with this ticket."""

    what: str
    ticket: int
    link: Connection


class Keeper:
    """The leader's side of a launched process: a place where a rank can be started."""

    def __init__(self, card: Card, link: Connection, pipes: Queue[Pipe]) -> None:
        self.card, self.link, self._pipes = card, link, pipes
        self.node, self.local_rank = card.node, card.local_rank
        self.gone = False
        self.process: RemoteProcess | None = None
        self._tickets = 0
        threading.Thread(target=self._hear, name=f"minillm rank {card.rank}", daemon=True).start()

    def start(self, seat: Seat) -> RankProcess:
        """Start a rank process there. Raises `RankError` when that does not happen."""
        self._tickets += 1
        self.process = RemoteProcess(self, self._tickets)
        self.say("start", self._tickets, replace(seat, environment={}))
        found: dict[str, Connection] = {}
        try:
            while len(found) < 2:
                if self.gone:
                    raise Empty
                pipe = self._pipes.get(timeout=JOIN_S)
                if pipe.ticket == self._tickets:
                    found[pipe.what] = pipe.link
                else:
                    pipe.link.close()  # of a start that took too long
        except Empty:
            what = "is gone" if self.gone else f"started none within {JOIN_S:g} s"
            text = f"no process for rank {self.card.rank}: {self.describe()} {what}"
            raise RankError(Verdict(Fault.DIED, [seat.rank], text)) from None
        self.process.calls, self.process.control = found["calls"], found["control"]
        return self.process

    def describe(self) -> str:
        """ "node 1 (hostname)"."""
        return f"node {self.card.node} ({self.card.host})"

    def say(self, *message: Any) -> None:
        """Tell the keeper something; one that is gone does not hear it."""
        with suppress(OSError, ValueError):
            self.link.send(message)

    def _hear(self) -> None:
        try:
            while True:
                standing = self.link.recv()
                if self.process is not None:
                    self.process.take(standing)
        except (EOFError, OSError):
            self.gone = True
            if self.process is not None:
                self.process.lost()


class RemoteProcess(RankProcess):
    """A rank on another host, or of another launched process on this one, as its keeper tells of it."""

    def __init__(self, keeper: Keeper, ticket: int) -> None:
        nowhere, _ = multiprocessing.Pipe()  # until the rank's own come
        self._board = bytearray(BOARD_BYTES)
        super().__init__(nowhere, nowhere, memoryview(self._board))
        self._keeper, self._standing = keeper, Standing(ticket, 0, None, 0, None, False, 0.0)
        self._asked = 0
        self._told = threading.Condition()
        self._end, self._end_there = multiprocessing.Pipe(duplex=False)

    def take(self, standing: Standing) -> None:
        """What the keeper tells; of a process before this one it does not matter."""
        if standing.ticket != self._standing.ticket or self._standing.exit_code is not None:
            return
        if standing.board is not None:
            self._board[:] = standing.board
        with self._told:
            self._standing = standing
            self._told.notify_all()
        if standing.exit_code is not None:
            self._end_there.close()

    def lost(self) -> None:
        """Its keeper is gone, and with it the process."""
        self.take(replace(self._standing, board=None, exit_code=1))

    @property
    def pid(self) -> int:
        return self._standing.pid

    @property
    def exit_code(self) -> int | None:
        return self._standing.exit_code

    @property
    def exit_text(self) -> str:
        return f"with {self._keeper.describe()}, which is gone" if self._keeper.gone else super().exit_text

    @property
    def sentinel(self) -> Any:
        return self._end

    @property
    def stopped(self) -> bool:
        return self._standing.stopped

    @property
    def cpu_s(self) -> float:
        return self._standing.cpu_s

    def join(self, timeout_s: float) -> None:
        with self._told:
            self._told.wait_for(lambda: self.exit_code is not None, timeout_s)

    def refresh(self) -> None:
        self._asked += 1
        self._keeper.say("tell", self._asked)
        with self._told:
            self._told.wait_for(lambda: self._standing.answers >= self._asked or self.exit_code is not None, ANSWER_S)

    def end(self) -> None:
        self._keeper.say("end")

    def close_pipes(self) -> None:
        super().close_pipes()
        self._end.close()
