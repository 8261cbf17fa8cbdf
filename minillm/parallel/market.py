"""The global manager at work: in the launching process, among the engines of instances that borrow of each other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from minillm.parallel.remote import RemoteEngine
from minillm.policy.loans import Heartbeat
from minillm.policy.options import EngineOptions
from minillm.policy.planning import GManager, PlannedMove
from minillm.policy.request import Load

BEAT_S = 0.02  # how often it looks at the heartbeats


class Exchange:
    """Hears the engines' heartbeats and tells them what others would lend and, unless they borrow on demand, what to move."""

    def __init__(self, engines: Sequence[RemoteEngine], options: EngineOptions) -> None:
        if len({place.node for engine in engines for place in engine.instance.ranks.places}) > 1:
            raise ValueError("borrowing=True: these instances are on several hosts, and borrow only within one")
        self.engines, self.options = engines, options
        self.manager = GManager([], options.block_size)
        self._missed: set[RemoteEngine] = set()  # who has not come back
        self.planned: list[PlannedMove] = []  # all that was ever planned
        self._looked_s = 0.0
        self._moves: list[PlannedMove] = []
        self.regain()
        self._tell_all()

    def miss(self, engine: RemoteEngine) -> None:
        """An engine does not come back for the time being: others are not to count on it."""
        self._missed.add(engine)
        self._tell_all()

    def regain(self) -> None:
        """See who is there: an instance that starts anew is another party."""
        back = {engine for engine in self._missed if engine.instance.alive}
        self._missed -= back
        present = {
            engine.party for engine in self.engines if engine.instance.alive and engine.number in engine.instance.opened
        }
        for party in self.manager.beats.keys() - present:
            self.manager.leave(party)
        for engine in self.engines:
            if engine.party in present - self.manager.beats.keys():
                self.manager.join(engine.party)
                most, blocks = self._most(engine), engine.num_blocks
                self.manager.heartbeat(Heartbeat(engine.party, 0, 0, blocks, blocks, most))
        if back:
            self._tell_all()

    def given_up(self) -> list[RemoteEngine]:
        """Engines that others have nothing to do with any more, because a link broke or was too slow, and that have no work: they
        are to begin anew.
        """
        self._hear()
        lost = {party for beat in self.manager.beats.values() if beat is not None for party in beat.lost}
        return [
            engine for engine in self.engines if engine.at_rest and engine.party in lost & self.manager.beats.keys()
        ]

    def due(self) -> list[RemoteEngine]:
        """The engines to tell something now; before, heartbeats are heard and moves planned."""
        now = time.monotonic()
        if now - self._looked_s < BEAT_S:
            return []
        self._looked_s = now
        self._hear()
        self._moves = [] if self.options.on_demand else self.manager.plan()
        self.planned += self._moves
        return [engine for engine in self.engines if not engine.at_rest]

    def load(self, engine: RemoteEngine) -> Load:
        """How full an engine is: at rest it tells nothing, and holds what others have there."""
        if not engine.at_rest:
            return engine.load
        self._hear()
        return replace(engine.load, used_blocks=self.manager.ledger.owed_to(engine.party))

    def held(self) -> list[dict[int, int]]:
        """Of each engine's blocks those in use, by the engine whose requests they are of, as last heard: never more than there are,
        though heartbeats are of different ages; what it says of its own requests comes first.
        """
        self._hear()
        placed, engines = self.manager.placement(), {engine.party: at for at, engine in enumerate(self.engines)}
        held: list[dict[int, int]] = []
        for number, engine in enumerate(self.engines):
            there = {engines[who]: blocks for who, blocks in placed.get(engine.party, {}).items() if who in engines}
            free = engine.num_blocks
            for who in sorted(there, key=lambda who: who != number):
                there[who] = min(there[who], free)
                free -= there[who]
            held.append(there)
        return held

    def _hear(self) -> None:
        for engine in self.engines:
            if engine.beat is not None and engine.beat.instance in self.manager.beats:
                self.manager.heartbeat(engine.beat)

    def tell(self, engine: RemoteEngine) -> None:
        """Tell an engine what concerns it."""
        mine = [(move.request_id, move.blocks, move.creditor) for move in self._moves if move.debtor == engine.party]
        engine.follow(self.manager.view(), self._beyond(engine), mine)

    def _tell_all(self) -> None:
        for engine in self.engines:
            if engine.instance.alive:
                engine.follow(self.manager.view(), self._beyond(engine), [])

    def _beyond(self, engine: RemoteEngine) -> int:
        """The most blocks that others lend it."""
        return sum(self._most(other) for other in self.engines if other is not engine and other not in self._missed)

    def _most(self, engine: RemoteEngine) -> int:
        """The most blocks that an engine lends."""
        return engine.num_blocks if self.options.most_lent is None else min(self.options.most_lent, engine.num_blocks)
