"""The control plane over prefill and decode instances: who is sent what, what they broadcast, and who is to change its role. The policies are
those of `policy/`, and the simulator's.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from minillm.parallel.remote import RemoteEngine
from minillm.policy.handing import Dispatcher, Role
from minillm.policy.options import EngineOptions
from minillm.policy.pooled import PoolDispatcher
from minillm.policy.pools import Pools
from minillm.policy.request import ScheduledRequest
from minillm.policy.router import LeastTokens, Router
from minillm.policy.spread import BROADCAST_S, PowerOfTwo, Watcher


def make_dispatcher(roles: Sequence[Role], options: EngineOptions, prefill: Router) -> Dispatcher:
    """The dispatcher that the options ask for; `prefill` chooses who reads, where it keeps to roles."""
    if options.dispatch == "pools":
        return PoolDispatcher(Pools(roles, [0] * len(roles), block=options.block_size), options.kv_transfer != "whole")
    decode = PowerOfTwo(len(roles)) if options.decode_router == "power-of-two" else LeastTokens(len(roles))
    return Dispatcher(roles, prefill, decode, options.kv_transfer != "whole")


class Control:
    """Watches `engines`, and tells a dispatcher what it may know of them."""

    def __init__(self, dispatcher: Dispatcher, engines: Sequence[RemoteEngine], options: EngineOptions) -> None:
        self.dispatcher, self.engines, self.options = dispatcher, engines, options
        self.watcher = Watcher(len(engines), options.idle_s) if options.idle_s is not None else None
        self.flips: list[tuple[float, int, Role]] = []
        self.random = Random(0)
        self._heard_s = float("-inf")
        if isinstance(dispatcher, PoolDispatcher):
            dispatcher.pools.cache_tokens = [each.num_blocks * options.block_size for each in engines]

    def predict(self, requests: Sequence[ScheduledRequest]) -> int:
        """Say how long a request that has just come, and other samples of its prompt, may become; returns how many tokens a dispatcher counts on."""
        first, predictor = requests[0], self.options.predictor
        most_new = first.longest - len(first.tokens)
        if predictor is not None and not first.predicted:
            guess = len(first.tokens) + max(1, predictor.lower_end(most_new, self.random))
            for each in requests:
                each.predicted = guess
        guessed = first.predicted - len(first.tokens) if first.predicted and self.dispatcher.guesses else most_new
        return max(1, guessed)

    def look(self, now_s: float) -> None:
        """Every 100 ms all hear how much room each has, and who has been idle for long may change its role."""
        if now_s < self._heard_s + BROADCAST_S:
            return
        self._heard_s = now_s
        decode = self.dispatcher.routers[Role.DECODE]
        if isinstance(decode, PowerOfTwo):
            loads = [each.load for each in self.engines]
            decode.hear([(load.num_blocks - load.used_blocks) * self.options.block_size for load in loads])
        if self.watcher is not None and not self.dispatcher.turning:
            busy = [self.dispatcher.busy(number) for number in range(len(self.engines))]
            if turn := self.watcher.look(now_s, busy, self.dispatcher.roles, self.dispatcher.lost):
                self.dispatcher.flip(*turn)
                self.flips.append((now_s, *turn))
