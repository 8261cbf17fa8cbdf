"""DistServe plans anew when the load has changed, and not before."""

from __future__ import annotations

from random import Random

import pytest

from minillm.policy.profiler import Profile, Profiler
from minillm.sim.distserve import BOTH, Setting, attainment
from minillm.sim.replanning import serve
from minillm.trace.metrics import SLO
from minillm.trace.workload import Arrival, Lengths

SETTING = Setting(slo=SLO(0.4, 0.04))


def load(rate: float, begin_s: float, end_s: float, lengths: Lengths, seed: int) -> list[Arrival]:
    random, now_s, arrivals = Random(seed), begin_s, []
    while (now_s := now_s + random.expovariate(rate)) < end_s:
        prompt, new = lengths.draw(random)
        arrivals.append(Arrival(now_s, min(prompt, 1500), min(new, 500)))
    return arrivals


def test_a_load_that_changes_is_planned_for_anew() -> None:
    code, chat = Lengths(1100, 0.3, 20, 0.4), Lengths(100, 0.4, 200, 0.4)
    arrivals = load(3, 0, 60, code, 1) + load(14, 60, 130, chat, 2)
    stays, (plan,) = serve(arrivals, SETTING, BOTH, None)
    assert plan.placement == BOTH and len(stays) == len(arrivals)
    tasks, plans = serve(arrivals, SETTING, BOTH, Profiler(window=60), gpus=4, reload_s=5)
    assert len(tasks) == len(arrivals) and all(task.given == task.new for task in tasks)
    assert len(plans) > 1 and any(60 < each.from_s < 120 for each in plans)
    assert all(before.from_s < after.from_s for before, after in zip(plans, plans[1:]))
    assert attainment(tasks, SETTING.slo) > attainment(stays, SETTING.slo)


def test_a_load_that_stays_is_planned_for_once() -> None:
    profiler = Profiler(window=50)
    told = [profiler.see(0.1 * n, 100 + n % 3, 20) for n in range(500)]
    assert told.index(True) == 49 and sum(told) == 1
    assert profiler.planned == Profile(pytest.approx(10), pytest.approx(101, abs=0.1), 20)


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="window=1: give a whole number of requests from 2"):
        Profiler(window=1)
    with pytest.raises(ValueError, match="factor=1: give a number above 1"):
        Profiler(factor=1)
    hopeless = Setting(slo=SLO(1e-3, 1e-3))
    _, plans = serve(load(4, 0, 30, Lengths(100, 0.4, 20, 0.4), 3), hopeless, BOTH, Profiler(window=20), gpus=4)
    assert [each.placement for each in plans] == [BOTH]
