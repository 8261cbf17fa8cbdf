"""Routers: what they count agrees with what they were told; each sends where it says."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.policy.router import BLOCK, ROUTERS, LeastTokens, PrefixAware, RoundRobin, Router, make_router


@given(st.sampled_from(list(ROUTERS)), st.integers(1, 4), st.integers(0, 10**6))
def test_counts_agree_with_what_was_told(name: str, replicas: int, seed: int) -> None:
    """Random requests that give, end and lose their replicas: a router's tokens are those of the requests under way."""
    router, chance = make_router(name, replicas), random.Random(seed)
    told: dict[int, list[int]] = {}  # replica, unread, to come
    for number in range(60):
        happens = chance.random()
        if happens < 0.4 and len(router.lost) < replicas:
            prompt = [chance.randrange(3) for _ in range(chance.randrange(1, 50))]
            chosen = router.route(number, prompt, 5)
            assert chosen not in router.lost
            told[number] = [chosen, len(prompt), 5]
        elif happens < 0.7 and told:
            each = chance.choice(list(told))
            router.gave(each)
            told[each][1:] = [0, max(told[each][2] - 1, 0)]
        elif happens < 0.85 and told:
            each = chance.choice(list(told))
            router.ended(each)
            del told[each]
        elif happens < 0.93:
            gone = chance.randrange(replicas)
            assert sorted(router.lose(gone)) == sorted(each for each in told if told[each][0] == gone)
            told = {each: about for each, about in told.items() if about[0] != gone}
        elif router.lost:
            router.regain(chance.choice(sorted(router.lost)))
        for replica in range(replicas):
            assert router.tokens[replica] == sum(sum(about[1:]) for about in told.values() if about[0] == replica)
        router.ended(-1)  # a request that it never had
        router.gave(-1)


@given(st.integers(1, 5), st.integers(1, 20))
def test_round_robin_goes_round(replicas: int, requests: int) -> None:
    router = RoundRobin(replicas)
    assert [router.route(n, [1], 1) for n in range(requests)] == [n % replicas for n in range(requests)]


def test_round_robin_goes_round_those_that_are_there() -> None:
    router = RoundRobin(3)
    router.lose(1)
    assert [router.route(n, [1], 1) for n in range(4)] == [0, 2, 0, 2]
    router.regain(1)
    assert [router.route(n, [1], 1) for n in range(4, 7)] == [0, 1, 2]


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 4))
def test_least_tokens_keeps_replicas_within_one_request_of_each_other(lengths: list[int], replicas: int) -> None:
    """Nothing ends: the fullest was the emptiest before its last request (Graham's bound on greedy lists)."""
    router = LeastTokens(replicas)
    for number, length in enumerate(lengths):
        router.route(number, [0] * length, 0)
    assert max(router.tokens) <= min(router.tokens) + max(lengths)


def test_a_prefix_goes_where_it_is_known_unless_that_replica_is_busy() -> None:
    router = PrefixAware(2)
    shared = list(range(4 * BLOCK))
    assert router.route(0, shared, 8) == 0
    router.ended(0)
    assert router.route(1, [9] * 8, 8) == 0  # nothing known: of equals the first
    assert router.route(2, [*shared, 5], 8) == 0  # 16 more tokens there, but 64 fewer to read
    assert router.route(3, [*shared, 6], 8) == 1  # now 89 more
    assert router.route(4, [*shared, 7], 0) == 1  # known on both by now


def test_a_replica_that_comes_back_has_forgotten_its_prefixes() -> None:
    for lost, expected in ((False, 0), (True, 1)):
        router = PrefixAware(2)
        assert router.route(0, list(range(64)), 0) == 0
        router.ended(0)
        if lost:
            router.lose(0)
            router.regain(0)
        assert router.route(1, [9], 0) == 0  # has a token more to do from here on
        assert router.route(2, list(range(64)), 0) == expected


def test_refusals() -> None:
    with pytest.raises(ValueError, match="router='best': there are round-robin, least-tokens, prefix-aware"):
        make_router("best", 2)
    with pytest.raises(ValueError, match="replicas=0: give a whole number from 1"):
        Router(0)
    router = LeastTokens(1)
    router.lose(0)
    with pytest.raises(LookupError, match="every replica is lost"):
        router.route(0, [1], 1)
