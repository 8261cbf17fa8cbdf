"""Where an instance's manager meets the others': what it wants to say to them, and what they say to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from minillm.parallel.door import LinkLost
from minillm.parallel.lending_step import creditors_of
from minillm.parallel.links import Link, Links
from minillm.policy.batch import Batch, Chunk
from minillm.policy.lending import RManager
from minillm.policy.loans import Ask, CalledBack, Heartbeat, Returned, Unclaimed
from minillm.policy.options import EngineOptions
from minillm.policy.scheduler import Scheduler


class Borrower:
    """The account of an instance, and its voice: it carries what the manager wants to say to others, and what they say to it. One lock
    is for all that touches the account and the scheduler, since others are answered while a step is computed.
    """

    def __init__(self, links: Links, scheduler: Scheduler, options: EngineOptions) -> None:
        self.lock = threading.RLock()
        self.links, self.scheduler = links, scheduler
        most = scheduler.pool.num_blocks if options.most_lent is None else options.most_lent
        self.manager = RManager(links.door.party, scheduler, most, options.on_demand, options.move_blocks)

    def negotiate(self, now_s: float) -> None:
        """Before a step: ask others for room, answer what they call for, and tell them what they are to know."""
        with self.lock:
            asks = self.manager.asks(now_s)
        for ask in asks:
            blocks = self._ask(ask)
            with self.lock:
                if not self.manager.granted(ask, tuple(blocks)) and ask.firm:
                    break
        with self.lock:
            self.manager.settle()
        self.tell()

    def tell(self) -> None:
        """Tell others what they are to know."""
        with self.lock:
            notices = self.manager.notices()
        for notice in notices:
            to = (
                notice.away.creditor
                if isinstance(notice, Returned)
                else notice.debtor
                if isinstance(notice, CalledBack)
                else notice.creditor
            )
            try:
                if isinstance(notice, Returned):
                    self._to(to).ask("returned", False, blocks=notice.away.blocks)
                elif isinstance(notice, Unclaimed):
                    self._to(to).ask("unclaimed", False)
                else:
                    self._to(to).ask("called back", False, blocks=notice.blocks, age=notice.age)
            except LinkLost:
                self.lost(to)

    def lost(self, party: int) -> None:
        """An instance is gone, or has broken its word: there is nothing between the two any more."""
        with self.lock:
            self.manager.lost(party)
        self._to(party).close()

    def hear(self, what: str, party: int, details: dict[str, Any]) -> Any:
        """What another instance says, on a thread of its own."""
        with self.lock:
            if what == "lost":
                self.manager.lost(party)
            elif party in self.manager.gone:
                raise LinkLost(f"instance {party} has been given up")
            if what == "ask":
                ask = Ask(
                    self.manager.number,
                    details["request_id"],
                    details["blocks"],
                    tuple(details["age"]),
                    details["firm"],
                )
                return self.manager.try_move_kvcache(party, ask, time.monotonic())
            if what == "returned":
                self.manager.take_back(party, details["blocks"])
            elif what == "unclaimed":
                self.manager.unclaimed(party)
            elif what == "called back":
                self.manager.called_back(
                    party, CalledBack(self.manager.number, details["blocks"], tuple(details["age"]))
                )
            return None

    def follow(self, view: dict[int, int], beyond: int, moves: Sequence[tuple[int, int, int]]) -> None:
        """What the global manager says: what others would lend, all that they lend at most, and moves (request, blocks, creditor)."""
        with self.lock:
            self.manager.view = {party: room for party, room in view.items() if party != self.manager.number}
            self.scheduler.beyond = beyond
            for move in moves:
                self.manager.move_kvcache(*move)

    def attach(self, batch: Batch) -> Batch:
        """The batch, with what has to be done before it."""
        return replace(batch, moves=self.manager.moves(), over=self.manager.over())

    def landed(self, batch: Batch, unheard: Sequence[Chunk]) -> None:
        """A batch is back; of some chunks the answers of others are missing, so these are taken for lost."""
        self.manager.landed(batch.moves)
        for party in creditors_of(unheard):
            self.lost(party)

    def heartbeat(self) -> Heartbeat:
        """How the instance stands."""
        with self.lock:
            return self.manager.heartbeat()

    def _ask(self, ask: Ask) -> Sequence[int]:
        try:
            return self._to(ask.creditor).ask(
                "ask", request_id=ask.request_id, blocks=ask.blocks, age=ask.age, firm=ask.firm
            )
        except LinkLost:
            self.lost(ask.creditor)
            return ()

    def _to(self, party: int) -> Link:
        return self.links.to(party, "words")
