"""DistServe replanned: when the load has changed, the placement is searched again by what came last, and what comes from then on goes to the new
instances, once their weights are read (Zhong et al. 2024, section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from minillm.policy.profiler import Profiler
from minillm.sim import distserve
from minillm.sim.distserve import Placement, Setting
from minillm.sim.task import Task
from minillm.trace.workload import Arrival


@dataclass(frozen=True)
class Sampled:
    """Lengths of requests that came, drawn again."""

    seen: tuple[tuple[int, int], ...]

    def draw(self, random: Random) -> tuple[int, int]:
        """(prompt tokens, new tokens) of one of them."""
        return random.choice(self.seen)


@dataclass(frozen=True)
class Plan:
    """A placement, and from when on requests go to it."""

    from_s: float
    placement: Placement


def serve(
    arrivals: Sequence[Arrival],
    setting: Setting,
    first: Placement,
    profiler: Profiler | None,
    gpus: int = 8,
    reload_s: float = 30.0,
) -> tuple[list[Task], list[Plan]]:
    """Serve a load that changes, beginning with a placement; without a `profiler` it stays. While new instances read their weights the old
    ones serve on, and requests end where they began. A load that nothing can serve within the goals leaves the plan as it is.
    """
    plans = [Plan(0.0, first)]
    for each in sorted(arrivals, key=lambda one: one.time_s):
        if profiler is not None and profiler.see(each.time_s, each.prompt_tokens, each.new_tokens):
            placement = _planned(setting, profiler, gpus)
            if placement is not None and placement != plans[-1].placement:
                plans.append(Plan(each.time_s + reload_s, placement))
    tasks: list[Task] = []
    for plan, until in zip(plans, [*(each.from_s for each in plans[1:]), float("inf")]):
        part = [each for each in arrivals if plan.from_s <= each.time_s < until]
        tasks += distserve.build(plan.placement, setting).serve(part)
    return tasks, plans


def _planned(setting: Setting, profiler: Profiler, gpus: int) -> Placement | None:
    """The best pair for what came last, as often as its rate wants (algorithm 2)."""
    lengths = Sampled(tuple((prompt, new) for _, prompt, new in profiler.seen))
    try:
        found = distserve.place_low(replace(setting, lengths=lengths, requests=300), gpus, step=0.25)
    except ValueError:  # nothing keeps the goals
        return None
    pairs = max(1, math.ceil(profiler.profile.rate / (found.per_gpu * found.placement.gpus)))
    return replace(found.placement, prefills=pairs, decodes=pairs)
