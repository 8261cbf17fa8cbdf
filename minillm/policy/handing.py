"""Who reads a prompt and who goes on with it, when prefill and decode are on different instances.

A plain state machine that is told what happens and says who does what next. Instances are alike: one has a role only because requests
are sent to it for that. Decode takes a request when it has room for it; until its cache has come, prefill keeps it (DistServe, Zhong
et al. 2024, section 4.3). With `early` room is asked for as soon as the prompt begins, so that the cache can move while it is
computed (Splitwise, Patel et al. 2024, section 4.2).
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from enum import Enum

from minillm.policy.router import Router

NOBODY = -1


class Role(Enum):
    """What an instance is for."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass
class Way:
    """Where a request is: the instance that reads its prompt or keeps its cache, the one that goes on with it, and how many tokens it
    may still give, as is thought; whether its prompt of so many tokens is `read`, and its cache has come to where it goes on; which
    `reading` of that instance it is, and of how many `tokens`.
    """

    prefill: int
    decode: int
    to_come: int
    prompt: int = 0
    read: bool = False
    came: bool = False
    reading: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Stranded:
    """What becomes of the requests of an instance that is lost: some begin `anew`, some have a cache that may go `elsewhere`, and
    for some the decode instance, which waits in vain, goes on `alone`.
    """

    anew: list[int]
    elsewhere: list[int]
    alone: list[int]


class Dispatcher:
    """Sends requests through instances with `roles`. Raises `ValueError` when nobody has one of the two."""

    guesses = True  # it may be told what lengths are thought to be

    def __init__(self, roles: Sequence[Role], prefill: Router, decode: Router, early: bool = False) -> None:
        self.roles = list(roles)
        self.routers = {Role.PREFILL: prefill, Role.DECODE: decode}
        self.early = early
        self.lost: set[int] = set()
        self.turning: dict[int, Role] = {}  # what they are to be once their last request has left
        self.ways: dict[int, Way] = {}
        for role in Role:
            if role not in self.roles:
                raise ValueError(f"there is no {role.value} instance: give at least one")
        self._tell()

    def present(self, role: Role) -> list[int]:
        """Who has a role, and takes requests for it."""
        return [
            number
            for number, each in enumerate(self.roles)
            if each is role and number not in self.lost and number not in self.turning
        ]

    def route(self, request_id: int, prompt: Sequence[int], most_new: int) -> int:
        """A request is there: who reads its prompt. Raises `LookupError` when nobody is there to."""
        chosen = self.routers[Role.PREFILL].route(request_id, prompt, 1)
        self.ways[request_id] = Way(chosen, NOBODY, most_new, len(prompt))
        return chosen

    def hands(self, request_id: int) -> bool:
        """Whether it is to go on elsewhere after its first token."""
        return self.ways[request_id].prefill != NOBODY

    def join(self, request_id: int, other_id: int) -> None:
        """One more sample of a request: it comes of the same prompt."""
        self.routers[Role.PREFILL].join(request_id, other_id)
        other = self.ways[other_id]
        self.ways[request_id] = Way(other.prefill, NOBODY, other.to_come, other.prompt)

    def started(self, request_id: int) -> int | None:
        """Its prompt is being read: who is to have room for it already, if somebody is."""
        way = self.ways.get(request_id)
        return self._onward(request_id, way) if self.early and way is not None and way.decode == NOBODY else None

    def read(self, request_id: int) -> int | None:
        """It has its first token, and more to come: who goes on with it, unless that is settled. None, too, while nobody can."""
        way = self.ways[request_id]
        if not way.read:
            way.read, way.to_come = True, way.to_come - 1
            self.routers[Role.PREFILL].ended(request_id)
        return self._onward(request_id, way) if way.decode == NOBODY else None

    def unread(self, request_id: int) -> int | None:
        """Its prompt was put aside, and is read again later: who keeps room for it in vain."""
        way = self.ways[request_id]
        was, way.decode, way.came = way.decode, NOBODY, False
        self.routers[Role.DECODE].ended(request_id)
        return was if was != NOBODY else None

    def gave(self, request_id: int) -> None:
        """Its decode instance has given a token."""
        self.ways[request_id].to_come -= 1
        self.routers[Role.DECODE].gave(request_id)

    def came(self, request_id: int) -> int | None:
        """Its cache has come to its decode instance: who may forget it now, as by `free`."""
        self.ways[request_id].came = True
        return self.free(request_id)

    def free(self, request_id: int) -> int | None:
        """Who may forget a request: its first token is known, and its cache is where it goes on."""
        way = self.ways[request_id]
        return self.alone(request_id) if way.read and way.came else None

    def alone(self, request_id: int) -> int | None:
        """Its decode instance goes on with what it has: who may forget it."""
        way = self.ways[request_id]
        if way.prefill == NOBODY:
            return None
        was, way.prefill = way.prefill, NOBODY
        self.routers[Role.PREFILL].ended(request_id)
        self._settle()
        return was

    def ended(self, request_id: int) -> None:
        """Nothing more comes of it."""
        self.ways.pop(request_id, None)
        for router in self.routers.values():
            router.ended(request_id)
        self._settle()

    def lose(self, instance: int) -> Stranded:
        """An instance is gone until `regain`."""
        self.lost.add(instance)
        for router in self.routers.values():
            router.lose(instance)
        stranded = Stranded([], [], [])
        for request_id, way in list(self.ways.items()):
            if way.prefill == instance:
                way.prefill = NOBODY
                (stranded.alone if way.decode != NOBODY else stranded.anew).append(request_id)
            elif way.decode == instance:
                way.decode, way.came = NOBODY, False
                (stranded.anew if way.prefill == NOBODY else stranded.elsewhere).append(request_id)
        for request_id in stranded.anew:
            self.ended(request_id)
        self._settle()
        self._tell()
        return stranded

    def regain(self, instance: int) -> None:
        """It is there again."""
        self.lost.discard(instance)
        self._tell()

    def flip(self, instance: int, role: Role) -> None:
        """Let an instance change its role: it gets no more requests for the old one and, when its last one has left, begins the new.

        Raises `ValueError` when nobody else would have the old role.
        """
        if self.turning.get(instance, self.roles[instance]) is role:
            return
        if self.roles[instance] is role:  # it was to become another
            del self.turning[instance]
        else:
            others = set(self.present(self.roles[instance])) | (self.lost - self.turning.keys())
            if not any(self.roles[other] is self.roles[instance] for other in others - {instance}):
                raise ValueError(f"instance {instance} is the last one for {self.roles[instance].value}: let it be")
            self.turning[instance] = role
        self._settle()
        self._tell()

    def helpless(self, away: Set[int]) -> bool:
        """Whether without these instances nothing could be served."""
        return any(all(n in away for n, each in enumerate(self.roles) if each is role) for role in Role)

    def busy(self, instance: int) -> bool:
        """Whether a request is there."""
        return any(instance in (way.prefill, way.decode) for way in self.ways.values())

    def _onward(self, request_id: int, way: Way) -> int | None:
        if not self.present(Role.DECODE):
            return None
        prompt = range(way.prompt)
        way.decode = self.routers[Role.DECODE].route(request_id, prompt, max(1, way.to_come), read=way.prompt)
        return way.decode

    def _settle(self) -> None:
        """Let those turn who have nothing left to do."""
        turned = [instance for instance in self.turning if not self.busy(instance)]
        for instance in turned:
            self.roles[instance] = self.turning.pop(instance)
        if turned:
            self._tell()

    def _tell(self) -> None:
        """Let the routers know who is there for them."""
        for role, router in self.routers.items():
            router.lost = set(range(len(self.roles))) - set(self.present(role))
