"""Splitwise's scheduler as a dispatcher: who reads a prompt and who goes on with it is settled when a request comes, and some stay where they
are (Patel et al. 2024, section IV.A). A plain state machine; what it decides by is in `pools.py`.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from minillm.policy.handing import NOBODY, Dispatcher, Role, Stranded, Way
from minillm.policy.pools import Pools
from minillm.policy.router import Router


class Settled(Router):
    """Sends each request where it was decided that it goes."""

    def __init__(self, replicas: int) -> None:
        super().__init__(replicas)
        self.choice = 0

    def prefer(self, present: Sequence[int], prompt: Sequence[int]) -> int:
        return self.choice


class PoolDispatcher(Dispatcher):
    """Sends requests as `pools` say. Roles are homes: any machine may do anything. Room is kept for what may come, and several samples of a
    prompt stay where it is read.
    """

    guesses = False

    def __init__(self, pools: Pools, early: bool = True) -> None:
        self.pools = pools
        self._settled = {role: Settled(len(pools.homes)) for role in Role}
        super().__init__(pools.homes, self._settled[Role.PREFILL], self._settled[Role.DECODE], early)

    def present(self, role: Role) -> list[int]:
        return [number for number in range(len(self.roles)) if number not in self.lost]

    def route(self, request_id: int, prompt: Sequence[int], most_new: int) -> int:
        reader, decoder = self.pools.place(request_id, len(prompt), most_new)
        if reader == decoder:
            self.ways[request_id] = Way(NOBODY, reader, most_new, len(prompt), read=True, came=True)
            return reader
        self._settled[Role.PREFILL].choice = reader
        return super().route(request_id, prompt, most_new)

    def join(self, request_id: int, other_id: int) -> None:
        other = self.ways[other_id]
        if self.hands(other_id):
            self.routers[Role.PREFILL].ended(other_id)
            other.prefill, other.decode, other.read, other.came = NOBODY, other.prefill, True, True
            self.pools.stay(other_id)
        self.pools.join(request_id, other_id)
        self.ways[request_id] = Way(NOBODY, other.decode, other.to_come, other.prompt, read=True, came=True)

    def read(self, request_id: int) -> int | None:
        self.pools.read(request_id)
        return super().read(request_id)

    def gave(self, request_id: int) -> None:
        if request_id in self.pools.placed:
            self.pools.read(request_id)
        super().gave(request_id)

    def alone(self, request_id: int) -> int | None:
        self.pools.read(request_id)
        self.pools.moved(request_id)
        return super().alone(request_id)

    def ended(self, request_id: int) -> None:
        if request_id in self.pools.placed:
            self.pools.ended(request_id)
        super().ended(request_id)

    def lose(self, instance: int) -> Stranded:
        """As its own, but what was to go on there begins anew, for where it is kept somebody else's cache may wait for room."""
        self.pools.lose(instance)
        stranded = super().lose(instance)
        for request_id in stranded.alone:
            self.pools.read(request_id)
            self.pools.moved(request_id)
        meant = [each for each in self.ways if self.hands(each) and self.pools.placed[each].token_at == instance]
        for request_id in meant:
            self.ended(request_id)
        return Stranded(stranded.anew + meant, [], stranded.alone)

    def regain(self, instance: int) -> None:
        self.pools.regain(instance)
        super().regain(instance)

    def flip(self, instance: int, role: Role) -> None:
        """Give an instance another home, at once. Raises `ValueError` for the last one of its pool."""
        self.pools.rehome(instance, role)
        self.roles[instance] = role

    def helpless(self, away: Set[int]) -> bool:
        return len(away) == len(self.roles)

    def _onward(self, request_id: int, way: Way) -> int | None:
        self._settled[Role.DECODE].choice = self.pools.placed[request_id].token_at
        return super()._onward(request_id, way)
