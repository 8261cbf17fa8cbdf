"""The scheduler under random workloads, driven by a program that knows only tokens: no model, no clock."""

from __future__ import annotations

from dataclasses import replace

import pytest
from helpers import EXAMPLES, SWITCHES
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import Machine, alone

from minillm.policy.blocks import BlockPool, chain
from minillm.policy.options import EngineOptions
from minillm.policy.request import ScheduledRequest, Status
from minillm.policy.scheduler import Scheduler

OPTIONS = st.builds(
    EngineOptions,
    block_size=st.integers(1, 5),
    num_blocks=st.integers(12, 30),
    max_running=st.integers(2, 6),
    max_step_tokens=st.integers(6, 16),
    **SWITCHES,
)
REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=8),  # prompt
        st.integers(1, 4),  # tokens to generate
        st.integers(0, 12),  # step of arrival
        st.sampled_from([1, 1, 1, 2]),  # samples
        st.none() | st.integers(1, 20),  # step of cancellation
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=5 * EXAMPLES)
@given(OPTIONS, REQUESTS, st.integers(1, 3))
def test_everyone_gets_what_they_would_get_alone(options: EngineOptions, requests: list, depth: int) -> None:
    machine = Machine(options, depth)
    scheduler, expected = machine.scheduler, {}
    cancelled = set()
    for step in range(1000):
        for number, (prompt, new, arrival, samples, cancel) in enumerate(requests):
            if arrival == step:
                request = ScheduledRequest(number, list(prompt), len(prompt) + new, float(step), samples=samples)
                try:
                    scheduler.add(request)
                except ValueError:
                    cancelled.add(number)
                    continue
                expected[number] = alone(prompt, len(prompt) + new)
            if cancel is not None and arrival + cancel == step and number in scheduler.requests:
                before, in_flight = machine.pool.num_used, scheduler.requests[number].in_flight
                table = scheduler.requests[number].table
                held = table is not None and bool(table.blocks)
                scheduler.remove(number)
                cancelled.add(number)
                if held and not in_flight and not options.prefix_reuse and machine.next_id == 100:
                    assert machine.pool.num_used < before  # at once
        while len(machine.under_way) >= depth:
            machine.land()
        machine.launch(float(step))
        if not machine.under_way and not scheduler.has_work and step > 12:
            break
    else:
        raise AssertionError("the requests never end")
    for number in expected.keys() - cancelled:
        assert machine.ended[number] == expected[number]
    for number, tokens in machine.ended.items():
        if number > 100:  # a fork
            assert tokens == alone(tokens[: tokens.index(7) + 1], len(tokens))
    assert machine.pool.num_free == options.num_blocks
    assert not (scheduler.waiting or scheduler.running)


def start(options: EngineOptions, *prompts: int, new: int = 4) -> Machine:
    """A machine with requests of these prompt lengths waiting."""
    machine = Machine(replace(options, num_blocks=options.num_blocks or 64), 1)
    for number, length in enumerate(prompts):
        machine.scheduler.add(ScheduledRequest(number, [1] * length, length + new, number))
    return machine


def sizes(machine: Machine) -> list[tuple[int, int]]:
    """(request, tokens) of the next batch, which is run at once."""
    machine.launch(0.0)
    batch, _ = machine.under_way[-1]
    machine.land()
    return [(chunk.request_id, len(chunk.token_ids)) for chunk in batch.chunks]


SMALL = EngineOptions(block_size=4, max_running=4, max_step_tokens=8)


def test_decodes_first_then_prompts_begun_then_new_ones() -> None:
    machine = start(SMALL, 3, 20, 2)
    assert sizes(machine) == [(0, 3), (1, 5)]
    assert sizes(machine) == [(0, 1), (1, 7)]
    assert sizes(machine) == [(0, 1), (1, 7)]
    assert sizes(machine) == [(0, 1), (1, 1), (2, 2)]


@pytest.mark.parametrize(("order", "expected"), [("sjf", [1, 0, 3, 2, 4]), ("ljf", [0, 1, 2, 3, 4])])
def test_prompts_sorted_a_window_at_a_time(order: str, expected: list[int]) -> None:
    """TetriInfer: nobody overtakes from a later window, however short."""
    machine = start(replace(SMALL, prompt_order=order, prompt_window=2, max_running=1), 8, 3, 7, 5, 1, new=1)
    assert [sizes(machine)[0][0] for _ in range(5)] == expected


def test_what_was_read_elsewhere_and_what_is_urgent_does_not_wait_for_prompts() -> None:
    machine = start(replace(SMALL, prompt_order="ljf", prompt_window=8, max_running=1), 2, 8, 5, 3)
    machine.scheduler.requests[2].priority = -1.0
    machine.scheduler.requests[3].arriving = 3
    assert machine.scheduler.waiting.first.request_id == 3
    assert [each.request_id for each in machine.scheduler.waiting] == [3, 2, 1, 0]


def test_two_orders_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="prompt_order='sjf' and an order of one's own: give one of them"):
        Scheduler(BlockPool(4, 4), replace(SMALL, prompt_order="sjf"), lambda request, now_s: -request.arrival_s)
    with pytest.raises(ValueError, match="prompt_order='shortest': give one of fcfs, sjf, ljf"):
        replace(SMALL, prompt_order="shortest")
    with pytest.raises(ValueError, match="prompt_window=0: give a whole number from 1"):
        replace(SMALL, prompt_window=0)


def test_without_chunks_a_prompt_runs_whole() -> None:
    machine = start(replace(SMALL, chunked_prefill=False), 3, 20, 2)
    assert sizes(machine) == [(0, 3)]  # 20 are above what is left
    assert sizes(machine) == [(0, 1), (1, 20)]
    assert sizes(machine) == [(0, 1), (1, 1), (2, 2)]


def test_a_static_batch_ends_before_the_next_begins() -> None:
    machine = start(replace(SMALL, continuous=False, max_running=2), 3, 3, 3, new=2)
    assert [sizes(machine) for _ in range(4)] == [[(0, 3), (1, 3)], [(0, 1), (1, 1)], [(2, 3)], [(2, 1)]]


def test_a_static_batch_of_one_always_begins() -> None:
    """Though its samples would take more blocks than there are, did they share none."""
    machine = Machine(replace(SMALL, continuous=False, block_size=1, num_blocks=12), 1)
    machine.scheduler.add(ScheduledRequest(0, [0] * 7, 8, samples=2))
    assert sizes(machine) == [(0, 7)]


def test_the_latest_is_preempted_and_comes_back() -> None:
    machine = start(replace(SMALL, num_blocks=3), 4, 4, new=6)
    assert sizes(machine) == [(0, 4), (1, 4)]
    assert sizes(machine) == [(0, 1)]  # both want a second block; there is one
    assert machine.scheduler.requests[1].status is Status.WAITING
    while machine.scheduler.has_work:
        sizes(machine)
    assert {number: len(tokens) for number, tokens in machine.ended.items()} == {0: 10, 1: 10}


def test_without_preemption_the_longest_length_is_reserved() -> None:
    machine = start(replace(SMALL, num_blocks=4, preemption=False), 4, 4, new=6)
    assert sizes(machine) == [(0, 4)]  # it may grow to three blocks of the four


def test_priority_goes_before_arrival() -> None:
    machine = start(replace(SMALL, max_running=1), 2, 2, new=1)
    machine.scheduler.requests[1].priority = -1.0
    assert sizes(machine) == [(1, 2)]


def test_an_order_of_ones_own() -> None:
    machine = start(replace(SMALL, max_running=1), 5, 2, new=1)
    machine.scheduler.order = lambda request, now_s: len(request.tokens)  # the shortest first
    assert sizes(machine) == [(1, 2)]


def test_what_can_never_run_is_refused_and_others_stay() -> None:
    machine = start(replace(SMALL, num_blocks=2), 4)
    for request, text in (
        (ScheduledRequest(1, [1] * 4, 10), "may need room for 9 tokens, but the KV cache has room for 8"),
        (ScheduledRequest(0, [1], 2), "there is a request 0 already"),
        (ScheduledRequest(1, [1], 2, samples=5), "n=5 samples, but only 4"),
    ):
        with pytest.raises(ValueError, match=text):
            machine.scheduler.add(request)
    assert sizes(machine) == [(0, 4)]


def test_after_an_error_requests_start_again() -> None:
    machine = start(SMALL, 3, 20)
    first = machine.scheduler.schedule(0.0)
    machine.scheduler.remove(1)  # takes effect when its batch comes back, or is given up
    assert machine.scheduler.recover() == {0, 1}
    assert list(machine.scheduler.requests) == [0]
    assert machine.pool.num_used == 0
    assert machine.scheduler.schedule(0.0).chunks == first.chunks[:1]


def test_the_last_token_needs_no_room() -> None:
    machine = start(replace(SMALL, num_blocks=2), 5, new=4)  # 9 tokens, of which 8 are cached
    while machine.scheduler.has_work:
        sizes(machine)
    assert len(machine.ended[0]) == 9


def test_a_fork_stands_where_its_parent_stands() -> None:
    machine = start(SMALL, 2)
    machine.scheduler.requests[0].priority = 3.0
    machine.scheduler.requests[0].arrival_s = 7.0
    sizes(machine)
    twin = ScheduledRequest(9, [1, 1, 5], 6)
    machine.scheduler.fork(0, twin)
    assert (twin.priority, twin.arrival_s) == (3.0, 7.0)


def test_a_prompt_begun_waits_for_those_that_decode() -> None:
    """Of higher priority, it keeps what it has computed while the others' batch is put together."""
    machine = start(replace(SMALL, num_blocks=6, max_step_tokens=4), 4, 16, new=6)
    machine.scheduler.requests[1].priority = -1.0
    machine.scheduler.requests[0].priority = -2.0
    sizes(machine)
    machine.scheduler.requests[0].priority = 2.0  # from now on the other one goes first
    while machine.scheduler.has_work:
        computed = machine.scheduler.requests[1].computed if 1 in machine.scheduler.requests else 99
        sizes(machine)
        assert 1 not in machine.scheduler.requests or machine.scheduler.requests[1].computed >= computed
    assert {number: len(tokens) for number, tokens in machine.ended.items()} == {0: 10, 1: 22}


def test_a_prompt_that_waits_is_hashed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("minillm.policy.blocks.chain", lambda parent, tokens: calls.append(1) or chain(parent, tokens))
    machine = start(replace(SMALL, prefix_reuse=True, max_running=2, num_blocks=9), 16, 32, new=3)
    sizes(machine)
    before = len(calls)
    for _ in range(3):
        sizes(machine)
    assert len(calls) - before <= 7 + 3  # its own keys once; the other one's new blocks
    assert machine.scheduler.requests[1].computed == 0 or machine.scheduler.requests[1].status is Status.RUNNING


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"block_size": 0}, "block_size=0: give a whole number from 1"),
        ({"max_running": -3}, "max_running=-3"),
        ({"max_step_tokens": 2.5}, "max_step_tokens=2.5"),
        ({"num_blocks": True}, "num_blocks=True"),
        ({"continuous": 1}, "continuous=1: give True or False"),
        ({"max_running": 600}, "max_step_tokens=512 is below max_running=600"),
    ],
)
def test_options_that_cannot_be(values: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        EngineOptions(**values)


@pytest.mark.parametrize(("requests", "depth", "sizes_"), [(4, 3, [2, 1, 1]), (5, 4, [2, 1, 1, 1]), (20, 3, [7, 7, 6])])
def test_as_many_groups_as_batches_under_way(requests: int, depth: int, sizes_: list[int]) -> None:
    """Also when memory, and not the number of places, is what keeps others waiting."""
    options = EngineOptions(block_size=4, num_blocks=requests * 5, max_running=64, max_step_tokens=600)
    machine = Machine(options, depth)
    for number in range(requests + 40):
        machine.scheduler.add(ScheduledRequest(number, [1] * 17, 20, number))
    for round_ in range(3):
        while len(machine.under_way) < depth:
            machine.launch(float(round_))
        assert sorted((len(batch.chunks) for batch, _ in machine.under_way), reverse=True) == sizes_
        machine.land()
