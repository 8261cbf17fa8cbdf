"""Clusters in which a monitor hears from all, as TetriInfer's does: how much room each has, and who is idle for long (Hu et al. 2024,
sections 3.2 and 3.5).
"""

from __future__ import annotations

from collections.abc import Sequence

from minillm.policy.handing import Dispatcher, Role
from minillm.policy.spread import BROADCAST_S, PowerOfTwo, Watcher
from minillm.sim.cluster import Apart, Kind, Wires
from minillm.sim.task import Task


class Broadcasting(Apart):
    """Every 100 ms all hear how much room each has, and who was idle for `idle_s` may change its role (None: never). `flips` are when, who,
    and to what.
    """

    def __init__(
        self, kinds: Sequence[Kind], dispatcher: Dispatcher, wires: Wires, idle_s: float | None = None
    ) -> None:  # fmt: skip
        super().__init__(kinds, dispatcher, wires)
        self.watcher = Watcher(len(kinds), idle_s) if idle_s is not None else None
        self.flips: list[tuple[float, int, Role]] = []
        self._listening = False

    def arrive(self, task: Task) -> None:
        if not self._listening:
            self._listening = True
            self._hear()
            self.clock.at(self.clock.now_s + BROADCAST_S, self._broadcast)
        super().arrive(task)

    def _broadcast(self) -> None:
        """Again and again while there is anything to do."""
        self._hear()
        if any(not machine.drained for machine in self.machines):
            self.clock.at(self.clock.now_s + BROADCAST_S, self._broadcast)
        else:
            self._listening = False

    def _hear(self) -> None:
        if isinstance(spread := self.dispatcher.routers[Role.DECODE], PowerOfTwo):
            spread.hear([machine.free for machine in self.machines])
        if self.watcher is not None and not self.dispatcher.turning:
            self._watch(self.watcher)

    def _watch(self, watcher: Watcher) -> None:
        busy = [not machine.drained for machine in self.machines]
        if turn := watcher.look(self.clock.now_s, busy, self.dispatcher.roles):
            self.dispatcher.flip(*turn)
            self.flips.append((self.clock.now_s, *turn))
