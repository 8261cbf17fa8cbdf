"""Splitwise's pools, TetriInfer's queue, gates, dispatch and role changes: plain state machines."""

from __future__ import annotations

from random import Random

import pytest
from helpers import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.policy.admission import GATES, Predictor, Running, greedy, reserve_dynamic, reserve_static
from minillm.policy.handing import Role
from minillm.policy.pools import Pools
from minillm.policy.queue import Ordered, Queue, Windowed
from minillm.policy.router import ShortestQueue
from minillm.policy.spread import PowerOfTwo, Watcher

P, D = Role.PREFILL, Role.DECODE


def test_a_request_goes_to_the_shortest_queue_and_the_emptiest_cache() -> None:
    pools = Pools([P, P, D, D], [1000] * 4)
    assert pools.place(0, 100, 10) == (0, 2)
    assert pools.place(1, 50, 10) == (1, 3)
    assert pools.place(2, 50, 10) == (1, 3)
    pools.read(1), pools.moved(1), pools.ended(1)
    assert pools.pending == [100, 50, 1, 1] and pools.taken == [100, 50, 110, 60]


def test_machines_are_borrowed_and_go_home() -> None:
    pools = Pools([P, D, D], [1000] * 3, most_pending=100)
    assert pools.place(0, 90, 10) == (0, 1)
    assert pools.place(1, 90, 10) == (2, 2), (
        "the prompt machine has too much: a token machine is borrowed, and may decode, too"
    )
    assert pools.mixed == {2}
    pools.read(1), pools.ended(1)
    assert not pools.mixed and pools.pending[2] == 0 and pools.taken[2] == 0


WORK = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=40)


@settings(max_examples=EXAMPLES)
@given(st.integers(1, 4), st.integers(1, 4), WORK, st.randoms(use_true_random=False))
def test_pools_are_empty_when_all_is_over(prompts: int, tokens: int, work: list, random: Random) -> None:
    pools = Pools([P] * prompts + [D] * tokens, [700] * (prompts + tokens), 400)
    open_ = {}
    for number, (prompt, new) in enumerate(work):
        open_[number] = pools.place(number, prompt, new)
        while open_ and random.random() < 0.4:
            done = random.choice(list(open_))
            prompt_at, token_at = open_.pop(done)
            pools.read(done)
            if prompt_at != token_at:
                pools.moved(done)
            pools.ended(done)
    for number, (prompt_at, token_at) in open_.items():
        pools.read(number)
        if prompt_at != token_at:
            pools.moved(number)
        pools.ended(number)
    assert not any(pools.pending) and not any(pools.taken) and not pools.placed


def test_queues() -> None:
    queue: Queue[int] = Queue()
    for each in (3, 1, 2):
        queue.push(each)
    assert [queue.pop(), queue.first, len(queue)] == [3, 1, 2]
    queue.put_back(9)
    assert queue.pop() == 9
    window: Windowed[int] = Windowed(lambda each: each, 2)
    for each in (5, 4, 1):
        window.push(each)
    assert [window.pop() for _ in range(3)] == [4, 5, 1], "nobody overtakes from a later window"
    with pytest.raises(ValueError, match="size=0: give a whole number from 1"):
        Windowed(lambda each: each, 0)
    for each in (7, 6, 5, 2):
        window.push(each)
    assert window.first == 6
    window.put_back(8)
    window.remove(7)
    window.remove(2)
    assert (list(window), len(window)) == ([8, 6, 5], 3), "who was put back goes first"
    with pytest.raises(ValueError):
        window.remove(1)
    ordered: Ordered[int] = Ordered(lambda each, now_s: (each != now_s, each))
    for each in (3, 2, 1):
        ordered.push(each)
    ordered.look(2.0)
    assert list(ordered) == [2, 1, 3]


def test_gates() -> None:
    running = [Running(50, 10), Running(20, 100)]
    assert greedy(30, 500, 31, running) and not greedy(30, 0, 30, running)
    assert reserve_static(30, 70, 100, running) and not reserve_static(30, 71, 100, running)
    # in 10 steps both take 10 tokens each, and the first gives 60 back: 40 - 20 + 60
    assert reserve_dynamic(30, 50, 40, running) and not reserve_dynamic(30, 51, 40, running)
    assert not reserve_dynamic(30, 1, 30, running), "there must be room to begin"
    assert all(gate(10, 5, 100, []) for gate in GATES.values())


def test_a_predictor_is_right_as_often_as_it_says() -> None:
    random, predictor = Random(0), Predictor(200, 0.75)
    right = sum(predictor.lower_end(450, random) == 400 for _ in range(4000)) / 4000
    assert 0.72 < right < 0.78
    assert Predictor(200, 1.0).lower_end(10_000, random) == 1400, "the last bucket has no end"
    with pytest.raises(ValueError, match="accuracy=1.5: give a share from 0 to 1"):
        Predictor(200, 1.5)


def test_of_two_the_lighter() -> None:
    router = PowerOfTwo(2, Random(0))
    assert router.route(0, range(10), 500) in (0, 1)
    heavy = router.under_way[0].replica
    assert router.route(1, range(10), 500) == 1 - heavy
    router.ended(1)
    assert router.route(2, range(10), 500) == 1 - heavy and router.heavy == [1, 1]
    router.hear([5.0, 5.0])
    assert router.route(3, range(10), 5) == 0, "nobody has room: the one with the most, of equals the first"


def test_who_is_idle_changes_its_role() -> None:
    watcher, roles = Watcher(3, 10.0), [P, P, D]
    assert watcher.look(0.0, [True, False, True], roles) is None
    assert watcher.look(9.9, [True, False, True], roles) is None
    assert watcher.look(10.0, [True, False, True], roles) == (1, D)
    assert watcher.look(10.1, [True, True, True], roles) is None
    assert Watcher(2, 1.0).look(5.0, [False, True], [P, D]) is None, "the last one keeps its role"


def test_the_shortest_queue_counts_prompts() -> None:
    router = ShortestQueue(2)
    assert router.route(0, range(100), 1000) == 0
    assert router.route(1, range(10), 5) == 1
    router.gave(0)
    assert router.tokens == [1, 12] and router.route(2, range(5), 5) == 0


def test_who_is_lost_does_not_count_as_a_mate() -> None:
    watcher = Watcher(3, idle_s=1.0)
    busy, roles = [False, False, True], [P, P, D]
    assert watcher.look(0.0, busy, roles, {0}) is None
    assert watcher.look(5.0, busy, roles, {0}) is None, "the last one that is there keeps its role"
    assert watcher.look(10.0, busy, roles) == (1, D)


def test_nobody_is_idle_while_nobody_has_work() -> None:
    watcher = Watcher(3, idle_s=60.0)
    assert watcher.look(0.0, [False] * 3, [P, P, D]) is None
    assert watcher.look(36_000.0, [True, False, True], [P, P, D]) is None
    assert watcher.look(36_061.0, [True, False, True], [P, P, D]) == (1, D)


def test_samples_count_for_the_ratio() -> None:
    router = PowerOfTwo(1, Random(0))
    router.route(0, range(5), 500)
    router.join(1, 0)
    router.ended(0), router.ended(1)
    assert router.heavy == [0] and router.light == [0]


@pytest.mark.parametrize("wrong", [("a", 0.5), (1.5, 0.5), (True, 0.5), (0, 0.5), (200, "x"), (200, 1.2), (200, True)])
def test_a_predictor_says_what_it_takes(wrong: tuple) -> None:
    with pytest.raises(ValueError, match="give a "):
        Predictor(*wrong)
