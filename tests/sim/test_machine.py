"""Simulated machines: the steps of the engine's scheduler, closed forms of queues, nothing kept when all is over."""

from __future__ import annotations

import subprocess
import sys
from collections import deque
from random import Random

import pytest
from helpers import EXAMPLES
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minillm.hardware.devices import Link
from minillm.hardware.profiles import Fit
from minillm.policy.blocks import BlockPool
from minillm.policy.handing import Dispatcher, Role
from minillm.policy.options import EngineOptions
from minillm.policy.request import ScheduledRequest
from minillm.policy.router import LeastTokens, RoundRobin
from minillm.policy.scheduler import Scheduler
from minillm.sim.cluster import Apart, Cluster, Kind, Together, Wires
from minillm.sim.costs import Costs, Fitted
from minillm.sim.machine import Limits
from minillm.trace.workload import Arrival

COSTS = Fitted(Fit((10.0, 0.1, 1e-5), (9.0, 1e-3, 0.04), (7.0, 9e-4, 0.16)))
WORK = st.lists(
    st.builds(Arrival, st.floats(0, 2).map(lambda at: round(at, 3)), st.integers(1, 40), st.integers(1, 30)),
    min_size=1,
    max_size=12,
)


def scheduled(arrivals: list[Arrival], costs: Costs, options: EngineOptions) -> dict[int, list[float]]:
    """When each request gets its tokens if the engine's scheduler decides, with blocks of one token."""
    assert options.num_blocks is not None
    scheduler = Scheduler(BlockPool(options.num_blocks, 1), options)
    coming = deque(sorted(enumerate(arrivals), key=lambda each: each[1].time_s))
    tokens: dict[int, list[float]] = {number: [] for number in range(len(arrivals))}
    now_s = 0.0
    while coming or scheduler.has_work:
        if not scheduler.has_work:
            now_s = max(now_s, coming[0][1].time_s)
        while coming and coming[0][1].time_s <= now_s:
            number, each = coming.popleft()
            longest = each.prompt_tokens + each.new_tokens
            scheduler.add(ScheduledRequest(number, [0] * each.prompt_tokens, longest, each.time_s))
        batch = scheduler.schedule(now_s)
        decodes = [each for each in batch.chunks if len(tokens[each.request_id]) and each.samples and each.start]
        decodes = [each for each in decodes if len(each.token_ids) == 1]
        prompts = [each for each in batch.chunks if each not in decodes]
        read = sum(len(each.token_ids) for each in prompts)
        squares = sum(each.end**2 - each.start**2 for each in prompts)
        context = sum(each.end for each in decodes)
        if not prompts:
            base_s, slope_s = costs.decode(len(decodes))
            now_s += base_s + slope_s * context
        elif decodes:
            now_s += costs.mixed_s(read, squares, len(decodes), context)
        else:
            now_s += costs.prompt_s(read, squares)
        scheduler.postprocess(batch, [0 if each.samples else None for each in batch.chunks])
        for each in batch.chunks:
            if each.samples:
                tokens[each.request_id].append(now_s)
                if len(tokens[each.request_id]) == arrivals[each.request_id].new_tokens:
                    scheduler.remove(each.request_id)
    return tokens


@settings(max_examples=EXAMPLES)
@given(WORK, st.integers(1, 6), st.integers(6, 60), st.booleans(), st.booleans())
def test_steps_are_those_of_the_engines_scheduler(
    work: list[Arrival], running: int, budget: int, chunked: bool, reserve: bool
) -> None:
    cache = 80 if reserve else 1000
    options = EngineOptions(
        block_size=1, num_blocks=cache, max_running=running, max_step_tokens=budget, chunked_prefill=chunked, preemption=not reserve
    )  # fmt: skip
    limits = Limits(cache, running, budget, chunked=chunked, reserve=reserve)
    tasks = Together([Kind(COSTS, limits)], RoundRobin(1)).serve(work)
    for number, times in scheduled(work, COSTS, options).items():
        task = tasks[number]
        assert task.first_s == pytest.approx(times[0])
        assert task.finished_s == pytest.approx(times[-1])
        gaps = [after - before for before, after in zip(times, times[1:])]
        assert task.longest_gap_s == pytest.approx(max(gaps, default=0.0))


def clusters(limits: Limits, count: int, early: bool) -> list[Cluster]:
    kinds = [Kind(COSTS, limits)] * count
    roles = [Role.PREFILL if number % 2 == 0 else Role.DECODE for number in range(count)]
    dispatcher = Dispatcher(roles, LeastTokens(count), LeastTokens(count), early)
    wires = Wires(Link("slow", 1e6, 1e-3, ""), 100.0, 10 if early else 0)
    return [Together(kinds, LeastTokens(count)), Apart(kinds, dispatcher, wires)]


LIMITS = st.builds(
    Limits, st.sampled_from([70, 90, 500]), st.integers(1, 8), st.integers(8, 80), st.booleans(), st.booleans(), st.booleans()
)  # fmt: skip


@settings(max_examples=EXAMPLES)
@given(WORK, LIMITS, st.integers(2, 5), st.booleans())
@example([Arrival(1.719, 1, 7), Arrival(1.766, 35, 2), Arrival(1.711, 40, 9)], Limits(90, 3, 8, False), 2, False)
def test_everyone_is_served_and_nothing_is_kept(work: list[Arrival], limits: Limits, count: int, early: bool) -> None:
    for cluster in clusters(limits, count, early):
        tasks = cluster.serve(work)
        for task in tasks:
            assert task.given == task.new
            assert task.arrival_s <= task.started_s < task.first_s <= task.finished_s
            assert task.longest_gap_s >= task.tpot_s * (1 - 1e-9)
        for machine in cluster.machines:
            assert machine.drained and machine.used == machine.decodes.context == machine.decodes.batch == 0


def test_a_cache_that_moves_layer_by_layer_is_there_a_layer_after_the_prompt_is_read() -> None:
    limits = Limits(5000)
    for early, late_s in ((True, 0.001 + 1000 * 100 / 10 / 1e6), (False, 0.001 + 1000 * 100 / 1e6)):
        (task,) = clusters(limits, 2, early)[1].serve([Arrival(0.0, 1000, 3)])
        assert task.came_s - task.first_s == pytest.approx(late_s)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_mean_ttft_is_that_of_the_formulas(load: float) -> None:
    """M/D/1, and DistServe's (2) and (3): one machine, two stages, two ranks with a speed-up of 1.6 (section 3.1)."""
    service, count, speed_up = 1.0, 200_000, 1.6
    random, now, arrivals = Random(1), 0.0, []
    for _ in range(count):
        now += random.expovariate(load)
        arrivals.append(Arrival(now, 1, 1))
    limits = Limits(10**9, 10**6, 1)
    forms = {
        1.0: service + load / (2 * (1 - load)),
        2.0: service + load / (4 * (2 - load)),
        speed_up: service / speed_up + load / (2 * speed_up * (speed_up - load)),
    }
    for form, expected in forms.items():
        length = 1e3 * service / (1 if form == 2.0 else form)
        costs = Fitted(Fit((length, 0.0, 0.0), (1.0, 0.0, 0.0), (1.0, 0.0, 0.0)), stages=2 if form == 2.0 else 1)
        tasks = Together([Kind(costs, limits)], RoundRobin(1)).serve(arrivals)
        assert sum(task.ttft_s for task in tasks) / count == pytest.approx(expected, rel=0.01)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="a cluster of no machines serves nobody"):
        Together([], RoundRobin(1))
    kind = Kind(COSTS, Limits(50))
    with pytest.raises(ValueError, match="needs 69 tokens of KV cache, but machine 0 has room for 50"):
        Together([kind], RoundRobin(1)).serve([Arrival(0.0, 60, 10)])
    with pytest.raises(ValueError, match="max_running=0: give a whole number from 1"):
        Limits(50, 0)
    with pytest.raises(ValueError, match="2 roles for 3 machines"):
        Apart([kind] * 3, Dispatcher([Role.PREFILL, Role.DECODE], RoundRobin(2), RoundRobin(2)), Wires())


def test_it_loads_no_torch() -> None:
    text = "import sys, minillm.sim.cluster; print([m for m in ('torch', 'matplotlib', 'IPython') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", text], capture_output=True, text=True).stdout.strip() == "[]"
