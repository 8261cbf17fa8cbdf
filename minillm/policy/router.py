"""Which replica serves a request. Routers hold no clock, tensors or I/O; the engine and the simulator drive the same ones.

A router is told what is sent, given and ended, and knows no more: not what a replica computes at the moment.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.policy.blocks import chain

KEPT_BLOCKS = 65_536  # that a router remembers of each replica
BLOCK = 16  # tokens of a prompt that are found again together


@dataclass
class Outstanding:
    """A request under way: where it is, the tokens of its prompt that nobody has read yet, and those it may still give."""

    replica: int
    unread: int
    to_come: int


class Router:
    """Chooses among `replicas`, of which some may be lost. Subclasses say how, in `prefer`."""

    def __init__(self, replicas: int) -> None:
        if not isinstance(replicas, int) or replicas < 1:
            raise ValueError(f"replicas={replicas!r}: give a whole number from 1")
        self.replicas = replicas
        self.lost = set()
        self.under_way: dict[int, Outstanding] = {}
        self.tokens = [0] * replicas  # outstanding on each

    @property
    def lost(self) -> set[int]:
        """The replicas that are gone."""
        return self._lost

    @lost.setter
    def lost(self, lost: set[int]) -> None:
        self._lost = lost
        self.present = [replica for replica in range(self.replicas) if replica not in lost]

    def route(self, request_id: int, prompt: Sequence[int], most_new: int, read: int = 0) -> int:
        """The replica for a request that gives up to `most_new` tokens, and of whose prompt so many tokens are `read`, elsewhere. Raises
        `LookupError` when all are lost, and `ValueError` when `prefer` names one that is not there.
        """
        if not self.present:
            raise LookupError("every replica is lost")
        chosen = self.prefer(self.present, prompt)
        if chosen in self.lost or chosen not in range(self.replicas):
            raise ValueError(f"the router chose replica {chosen!r}; there are {', '.join(map(str, self.present))}")
        self.under_way[request_id] = Outstanding(chosen, len(prompt) - read, most_new)
        self.tokens[chosen] += len(prompt) - read + most_new
        return chosen

    def join(self, request_id: int, other_id: int) -> None:
        """One more sample of a request: it is where that one is, and gives as many tokens; the prompt is read once."""
        other = self.under_way[other_id]
        self.under_way[request_id] = Outstanding(other.replica, 0, other.to_come)
        self.tokens[other.replica] += other.to_come

    def gave(self, request_id: int) -> None:
        """A request has given a token; the first one tells that its prompt has been read."""
        if (request := self.under_way.get(request_id)) is not None:
            self.tokens[request.replica] -= request.unread + min(request.to_come, 1)
            request.unread, request.to_come = 0, max(request.to_come - 1, 0)

    def ended(self, request_id: int) -> None:
        """Nothing more comes of a request: it has finished, was cancelled, or its replica was lost."""
        if (request := self.under_way.pop(request_id, None)) is not None:
            self.tokens[request.replica] -= request.unread + request.to_come

    def lose(self, replica: int) -> list[int]:
        """A replica is gone until `regain`; the requests that were on it, which nobody serves now."""
        self.lost = self.lost | {replica}
        stranded = [number for number, request in self.under_way.items() if request.replica == replica]
        for number in stranded:
            self.ended(number)
        return stranded

    def regain(self, replica: int) -> None:
        """A replica is there again."""
        self.lost = self.lost - {replica}

    def prefer(self, present: Sequence[int], prompt: Sequence[int]) -> int:
        """Which of the replicas that are present."""
        raise NotImplementedError


class RoundRobin(Router):
    """One after the other, whatever they have to do."""

    last = -1

    def prefer(self, present: Sequence[int], prompt: Sequence[int]) -> int:
        self.last = next((replica for replica in present if replica > self.last), present[0])
        return self.last


class LeastTokens(Router):
    """Where the fewest tokens are outstanding: prompts to read and tokens to give. Of equals the first."""

    def prefer(self, present: Sequence[int], prompt: Sequence[int]) -> int:
        return min(present, key=lambda replica: self.tokens[replica])


class ShortestQueue(LeastTokens):
    """Where the fewest prompt tokens wait; a request that decodes counts as one (the JSQ of Splitwise, Patel et al. 2024)."""

    def route(self, request_id: int, prompt: Sequence[int], most_new: int, read: int = 0) -> int:
        return super().route(request_id, prompt, min(most_new, 2), read)


class PrefixAware(Router):
    """Where the fewest tokens are outstanding once the prompt is there, of which what went there before need not be read
    again. (Dynamo's KV-aware router weighs so; SGLang's changes to the shortest queue when queues differ much.)

    What a replica has may be gone from its cache meanwhile; then the guess was wrong, and nothing else.
    """

    def __init__(self, replicas: int) -> None:
        super().__init__(replicas)
        self.seen: list[OrderedDict[bytes, None]] = [OrderedDict() for _ in range(replicas)]

    def prefer(self, present: Sequence[int], prompt: Sequence[int]) -> int:
        keys, key = [], b""
        for begin in range(0, len(prompt) - BLOCK + 1, BLOCK):
            key = chain(key, prompt[begin : begin + BLOCK])
            keys.append(key)
        chosen = min(present, key=lambda replica: self.tokens[replica] - BLOCK * self._known(replica, keys))
        seen = self.seen[chosen]
        for key in keys:
            seen[key] = None
            seen.move_to_end(key)
        while len(seen) > KEPT_BLOCKS:
            seen.popitem(last=False)
        return chosen

    def lose(self, replica: int) -> list[int]:
        self.seen[replica].clear()
        return super().lose(replica)

    def _known(self, replica: int, keys: Sequence[bytes]) -> int:
        """How many blocks of the prompt's beginning went to a replica before."""
        return next((place for place, key in enumerate(keys) if key not in self.seen[replica]), len(keys))


ROUTERS: dict[str, type[Router]] = {
    "round-robin": RoundRobin,
    "least-tokens": LeastTokens,
    "prefix-aware": PrefixAware,
}


def make_router(router: str | type[Router], replicas: int) -> Router:
    """A router by its name, or of a class of your own. Raises `ValueError` that lists the names."""
    if isinstance(router, type) and issubclass(router, Router):
        return router(replicas)
    if not isinstance(router, str) or router not in ROUTERS:
        raise ValueError(f"router={router!r}: there are {', '.join(ROUTERS)}, or give a subclass of Router")
    return ROUTERS[router](replicas)
