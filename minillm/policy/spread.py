"""How TetriInfer sends requests to decode instances: of two drawn at random the one with fewer heavy requests for each light one (Hu et al.
2024, section 3.3.4), and when an instance changes its role (section 3.5).

Plain state machines; what they know of the instances is what was last broadcast.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from random import Random

from minillm.policy.admission import HEAVY
from minillm.policy.handing import Role
from minillm.policy.router import Router


class PowerOfTwo(Router):
    """Of the replicas that have room for a request, as far as was last broadcast, two are drawn, and the one with the lower ratio of heavy to
    light requests is taken. When none has room, it is the one with the most.
    """

    def __init__(self, replicas: int, random: Random | None = None) -> None:
        super().__init__(replicas)
        self.random = random or Random(0)
        self.room = [float("inf")] * replicas  # tokens, as of the last broadcast
        self.heavy, self.light = [0] * replicas, [0] * replicas
        self._need = 0

    def hear(self, room: Sequence[float]) -> None:
        """The instances broadcast how many tokens they have room for."""
        self.room = list(room)

    def route(self, request_id: int, prompt: Sequence[int], most_new: int, read: int = 0) -> int:
        self._need = len(prompt) + most_new
        chosen = super().route(request_id, prompt, most_new, read)
        (self.heavy if most_new > HEAVY else self.light)[chosen] += 1
        return chosen

    def prefer(self, present: Sequence[int], prompt: Sequence[int]) -> int:
        able = [replica for replica in present if self.room[replica] >= self._need]
        if not able:
            return max(present, key=self.room.__getitem__)
        two = self.random.sample(able, min(2, len(able)))
        return min(two, key=lambda replica: (self.heavy[replica] / max(1, self.light[replica]), self.tokens[replica]))

    def join(self, request_id: int, other_id: int) -> None:
        super().join(request_id, other_id)
        request = self.under_way[request_id]
        (self.heavy if request.to_come > HEAVY else self.light)[request.replica] += 1

    def gave(self, request_id: int) -> None:
        """Counts stay as they were predicted until the request ends."""

    def ended(self, request_id: int) -> None:
        if (request := self.under_way.get(request_id)) is not None:
            (self.heavy if request.to_come > HEAVY else self.light)[request.replica] -= 1
        super().ended(request_id)


BROADCAST_S = 0.1  # how often all hear of each other (section 3.2)


class Watcher:
    """Notices who has been idle for `idle_s` while others have work, and says that it may change its role."""

    def __init__(self, instances: int, idle_s: float = 60.0) -> None:
        if not idle_s > 0:
            raise ValueError(f"idle_s={idle_s!r}: give seconds above 0")
        self.idle_s = idle_s
        self._since: list[float | None] = [None] * instances

    def look(
        self, now_s: float, busy: Sequence[bool], roles: Sequence[Role], lost: Set[int] = frozenset()
    ) -> tuple[int, Role] | None:
        """Who is to have which role, if anybody: the one that is idle longest, if all with the other role have work and another one that is
        there has its role. Those who are `lost` count for nothing.
        """
        for number, each in enumerate(busy):
            began = self._since[number] if self._since[number] is not None else now_s
            self._since[number] = None if each or number in lost or not any(busy) else began
        idle = [
            (since, number)
            for number, since in enumerate(self._since)
            if since is not None and now_s - since >= self.idle_s
        ]
        for _, number in sorted(idle):
            other = Role.DECODE if roles[number] is Role.PREFILL else Role.PREFILL
            mates = [n for n, role in enumerate(roles) if role is roles[number] and n != number and n not in lost]
            if mates and all(busy[n] for n, role in enumerate(roles) if role is other and n not in lost):
                return number, other
        return None
