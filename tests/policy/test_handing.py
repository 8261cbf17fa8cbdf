"""Prefill and decode on different instances: random loads, losses and changes of role, driven by a program that knows only tokens."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from helpers import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import Machine, alone

from minillm.engine.handing import guard
from minillm.policy.admission import GATES
from minillm.policy.handing import Dispatcher, Role
from minillm.policy.options import DECODE_ROUTERS, DISPATCHES, EngineOptions
from minillm.policy.pooled import PoolDispatcher
from minillm.policy.pools import Pools
from minillm.policy.request import ScheduledRequest, Status
from minillm.policy.router import LeastTokens
from minillm.policy.spread import PowerOfTwo

OPTIONS = st.builds(
    EngineOptions,
    block_size=st.integers(1, 4),
    num_blocks=st.integers(12, 20),
    max_running=st.integers(2, 5),
    max_step_tokens=st.integers(5, 12),
    chunked_prefill=st.booleans(),
    preemption=st.booleans(),
    prefix_reuse=st.booleans(),
    dispatch=st.sampled_from(DISPATCHES),
    decode_router=st.sampled_from(DECODE_ROUTERS),
    gate=st.sampled_from(list(GATES)),
)


def make_dispatcher(roles: list[Role], options: EngineOptions, early: bool, chance: Random) -> Dispatcher:
    """As the options say. Pools begin to borrow soon."""
    if options.dispatch == "pools":
        room = [options.num_blocks * options.block_size] * len(roles)
        return PoolDispatcher(Pools(roles, room, most_pending=10, block=options.block_size), early)
    power = options.decode_router == "power-of-two"
    decode = PowerOfTwo(len(roles), chance) if power else LeastTokens(len(roles))
    return Dispatcher(roles, LeastTokens(len(roles)), decode, early)


class Cluster:
    """Instances that hand requests over. Caches travel for some ticks; what is on its way when an end of it is lost is lost."""

    def __init__(self, options: EngineOptions, roles: list[Role], early: bool, chance: Random) -> None:
        self.options, self.chance = options, chance
        self.dispatcher = make_dispatcher(roles, options, early, chance)
        self.machines = [self.machine() for _ in roles]
        self.moving: dict[int, int] = {}  # request -> ticks that its cache still takes
        self.started: set[int] = set()
        self.homeless: list[int] = []
        self.tokens: dict[int, list[int]] = {}  # as the user knows them
        self.longest: dict[int, int] = {}
        self.done: set[int] = set()

    def machine(self) -> Machine:
        machine = Machine(self.options, 1)
        if self.options.gate != "greedy":
            guard(machine.scheduler, GATES[self.options.gate])
        return machine

    def arrive(self, number: int, prompt: list[int], new: int) -> None:
        self.tokens[number], self.longest[number] = list(prompt), len(prompt) + new
        self.homeless.append(number)

    def tick(self) -> None:
        for number in [each for each in self.homeless if self.dispatcher.present(Role.PREFILL)]:
            self.homeless.remove(number)
            tokens = self.tokens[number]
            at = self.dispatcher.route(number, tokens, self.longest[number] - len(tokens))
            handed = self.dispatcher.hands(number)
            self.add(at, ScheduledRequest(number, list(tokens), self.longest[number], number, handed=handed))
        for number, way in list(self.dispatcher.ways.items()):
            if way.read and way.decode < 0:
                self.send_on(number, self.dispatcher.read(number))
        for place, machine in enumerate(self.machines):
            if place not in self.dispatcher.lost:
                self.step(place, machine)
        for number, ticks in list(self.moving.items()):
            self.moving[number] = ticks - 1
            if ticks <= 0 and self.computed(number):
                self.land(number)

    def add(self, at: int, request: ScheduledRequest) -> None:
        self.machines[at].scheduler.add(request)

    def step(self, place: int, machine: Machine) -> None:
        batch = machine.scheduler.schedule(0.0)
        for number in batch.arrivals:
            self.moving[number] = self.chance.randrange(4)
        for number in batch.preempted:
            if self.dispatcher.ways[number].prefill == place:
                self.started.discard(number)
                self.withdraw(number, self.dispatcher.unread(number))
        for chunk in batch.chunks:
            if self.dispatcher.ways[chunk.request_id].prefill == place and chunk.request_id not in self.started:
                self.started.add(chunk.request_id)
                self.send_on(chunk.request_id, self.dispatcher.started(chunk.request_id))
        machine.run(batch)
        for number in [each for each, ticks in self.moving.items() if ticks <= 0]:
            if self.dispatcher.ways[number].prefill == place and self.computed(number):
                self.land(number)  # before the token is known
        for number, token in machine.news():
            self.tokens[number].append(token)
            if self.dispatcher.ways[number].prefill != place:
                self.dispatcher.gave(number)
            if len(self.tokens[number]) == self.longest[number]:
                self.end(number)
            elif self.dispatcher.ways[number].prefill == place:
                decode = self.dispatcher.ways[number].decode
                if decode >= 0:
                    self.machines[decode].scheduler.requests[number].tokens.append(token)
                self.send_on(number, self.dispatcher.read(number))
                self.free(number, self.dispatcher.free(number))

    def send_on(self, number: int, decode: int | None) -> None:
        if decode is None:
            return
        way, tokens = self.dispatcher.ways[number], self.tokens[number]
        request = ScheduledRequest(number, list(tokens), self.longest[number], number)
        request.arriving = len(tokens) - way.read
        request.predicted = len(tokens) + self.chance.randrange(12)
        self.add(decode, request)

    def land(self, number: int) -> None:
        """The cache has come: what is in it lies in the blocks of its decode instance now."""
        del self.moving[number]
        way = self.dispatcher.ways[number]
        here, there = self.machines[way.prefill], self.machines[way.decode]
        kept, coming = here.scheduler.requests[number], there.scheduler.requests[number]
        assert kept.table is not None and coming.table is not None
        size = self.options.block_size
        for at in range(coming.arriving):
            there.memory[coming.table.blocks[at // size], at % size] = here.memory[
                kept.table.blocks[at // size], at % size
            ]
        there.scheduler.arrived(number)
        self.free(number, self.dispatcher.came(number))

    def computed(self, number: int) -> bool:
        """Whether all of its prompt's K and V are there, though its token may not be."""
        way = self.dispatcher.ways[number]
        request = self.machines[way.prefill].scheduler.requests[number]
        return request.computed + request.in_flight >= self.machines[way.decode].scheduler.requests[number].arriving

    def free(self, number: int, place: int | None) -> None:
        if place is not None:
            self.machines[place].scheduler.remove(number)

    def withdraw(self, number: int, decode: int | None) -> None:
        if decode is not None:
            self.forget(number, decode)

    def forget(self, number: int, place: int) -> None:
        """An instance has nothing to do with a request any more, and nothing of it is on its way there."""
        scheduler = self.machines[place].scheduler
        if number in scheduler.requests:
            expecting = scheduler.requests[number].arriving > 0
            scheduler.remove(number)
            if expecting and number in scheduler.requests:
                scheduler.missed(number)
        self.moving.pop(number, None)

    def end(self, number: int) -> None:
        way = self.dispatcher.ways[number]
        for place in {way.prefill, way.decode} - {-1}:
            self.forget(number, place)
        self.dispatcher.ended(number)
        self.done.add(number)

    def lose(self, place: int) -> None:
        self.machines[place] = self.machine()
        stranded = self.dispatcher.lose(place)
        for number in [*stranded.anew, *stranded.elsewhere, *stranded.alone]:
            self.moving.pop(number, None)
        for number in stranded.anew:
            for at in range(len(self.machines)):
                self.forget(number, at)
        self.homeless += stranded.anew
        self.started -= set(stranded.anew)
        for number in stranded.alone:
            decode = self.machines[self.dispatcher.ways[number].decode]
            decode.scheduler.requests[number].tokens[:] = self.tokens[number]
            decode.scheduler.missed(number)
            decode.missed.add(number)


@settings(deadline=None, max_examples=5 * EXAMPLES)
@given(
    OPTIONS,
    st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=8),
    st.integers(1, 2),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 10_000),
    st.booleans(),
)  # fmt: skip
def test_every_request_gets_its_tokens(
    options: EngineOptions, requests: list, prefill: int, decode: int, early: bool, seed: int, troubled: bool
) -> None:
    chance = Random(seed)
    cluster = Cluster(options, [Role.PREFILL] * prefill + [Role.DECODE] * decode, early, chance)
    for tick in range(1500):
        for number, (prompt, new, arrival) in enumerate(requests):
            if arrival == tick:
                cluster.arrive(number, prompt, new)
        if troubled and tick < 60 and chance.random() < 0.1:
            place = chance.randrange(len(cluster.machines))
            if place in cluster.dispatcher.lost:
                cluster.dispatcher.regain(place)
            elif chance.random() < 0.5:
                cluster.lose(place)
            else:
                try:
                    cluster.dispatcher.flip(place, chance.choice(list(Role)))
                except ValueError as error:
                    assert "last one" in str(error)
        if tick == 60:
            for place in list(cluster.dispatcher.lost):
                cluster.dispatcher.regain(place)
        cluster.tick()
        if tick > 60 and len(cluster.done) == len(requests):
            break
    else:
        raise AssertionError(f"the requests never end: {cluster.dispatcher.ways}")
    for number, (prompt, new, _) in enumerate(requests):
        assert cluster.tokens[number] == alone(prompt, len(prompt) + new)
    for machine in cluster.machines:
        assert machine.pool.num_free == options.num_blocks and not machine.scheduler.requests
    assert not cluster.dispatcher.ways and not any(cluster.dispatcher.routers[role].under_way for role in Role)
    assert not any(any(cluster.dispatcher.routers[role].tokens) for role in Role)
    if isinstance(cluster.dispatcher, PoolDispatcher):
        pools = cluster.dispatcher.pools
        assert not any(pools.pending) and not any(pools.taken) and not pools.placed and not pools.mixed


def two(**options: int) -> Cluster:
    both = replace(EngineOptions(block_size=2, num_blocks=4, max_running=4, max_step_tokens=8), **options)
    return Cluster(both, [Role.PREFILL, Role.DECODE], False, Random(0))


def test_prefill_keeps_what_decode_has_no_room_for() -> None:
    cluster = two()
    for number in range(4):
        cluster.arrive(number, [1, 0, 1], 4)
    seen = set()
    while len(cluster.done) < 4:
        cluster.tick()
        kept = [each for each in cluster.machines[0].scheduler.requests.values() if each.status is Status.KEPT]
        seen.add(len(kept))
        assert all(each.table is not None and each.table.blocks for each in kept)
    assert 2 in seen  # the pool is full, and the next prompt waits for it
    assert all(cluster.tokens[number] == alone([1, 0, 1], 7) for number in range(4))


def test_an_instance_turns_when_its_last_request_has_left() -> None:
    roles = [Role.PREFILL, Role.PREFILL, Role.DECODE]
    dispatcher = Dispatcher(roles, LeastTokens(3), LeastTokens(3))
    assert dispatcher.route(7, [1, 2], 3) == 0
    dispatcher.flip(0, Role.DECODE)
    assert dispatcher.present(Role.PREFILL) == [1] and dispatcher.present(Role.DECODE) == [2]
    assert dispatcher.read(7) == 2 and dispatcher.came(7) == 0
    assert dispatcher.present(Role.DECODE) == [0, 2]
    with pytest.raises(ValueError, match="instance 1 is the last one for prefill: let it be"):
        dispatcher.flip(1, Role.DECODE)


def test_both_roles_are_needed() -> None:
    with pytest.raises(ValueError, match="there is no decode instance: give at least one"):
        Dispatcher([Role.PREFILL], LeastTokens(1), LeastTokens(1))
