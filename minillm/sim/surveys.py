"""Many simulations of one question each: how two devices share a queue, which pair of layouts serves most, how a share of requests falls with
the rate. What lesson 14 draws, after DistServe (Zhong et al. 2024, sections 3.1, 4, figure 8).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random
from statistics import mean, stdev

from minillm.hardware.profiles import Fit
from minillm.policy.router import RoundRobin
from minillm.sim import distserve
from minillm.sim.cluster import Cluster, Kind, Together
from minillm.sim.costs import Fitted
from minillm.sim.distserve import BOTH, FIGURE_8, Placement, Setting
from minillm.sim.machine import Limits
from minillm.trace.metrics import SLO
from minillm.trace.workload import Arrival, Lengths

QUEUED, RUNS = 5000, 4  # prompts of one simulation, and simulations: about 1 %
DOTS = (0.3, 0.6, 0.85, 1.05)
REQUESTS = 400
RATES = tuple(round(0.25 * 1.2**step, 2) for step in range(21))  # 0.25 to 9.6 requests/s for each GPU
EQUAL = 1.25  # times: seeds differ by as much as a step of the rates

Point = tuple[float, float, float]  # rate for each GPU, share within the goals, its deviation from seed to seed


def mean_ttft(load: float, stages: int, gain: float) -> float:
    """Mean TTFT in units of one device's prompt time, DistServe's (2) for two stages and (3) for ranks that are `gain` times as fast, (1)
    for neither; infinity where the queue is not stable.
    """
    if stages == 2:
        return 1 + load / (4 * (2 - load)) if load < 2 else float("inf")
    return 1 / gain + load / (2 * gain * (gain - load)) if load < gain else float("inf")


@lru_cache(256)
def simulated_ttft(load: float, stages: int, gain: float) -> float:
    """The same by simulations of random arrivals, the mean over `RUNS` of them."""
    fit, found = (1e3 / gain, 0.0, 0.0), []
    kind = Kind(Fitted(Fit(fit, fit, fit), stages=stages), Limits(10**9, 10**6, 1))
    for seed in range(RUNS):
        random, now_s, arrivals = Random(seed), 0.0, []
        for _ in range(QUEUED):
            now_s += random.expovariate(load)
            arrivals.append(Arrival(now_s, 1, 1))
        found += [task.ttft_s for task in Together([kind], RoundRobin(1)).serve(arrivals)]
    return mean(found)


@dataclass(frozen=True)
class Queues:
    """Mean TTFT over the load: loads and times by formula, and dots by simulation."""

    loads: list[float]
    times: list[float]
    dots: list[tuple[float, float]]
    form: tuple[int, float]  # stages, and how many times as fast


def queues(gain: float) -> dict[str, Queues]:
    """A pipeline of two stages, and two tensor parallel ranks that are `gain` times as fast as one device."""
    found = {}
    for name, stages, faster, most in (
        ("a pipeline", 2, 1.0, 1.3),
        ("tensor parallel ranks", 1, gain, min(1.3, 0.96 * gain)),
    ):
        loads = [most * (step + 1) / 60 for step in range(60)]
        dots = [(load, simulated_ttft(load, stages, faster)) for load in DOTS if load < 0.93 * faster * stages]
        found[name] = Queues(loads, [mean_ttft(load, stages, faster) for load in loads], dots, (stages, faster))
    return found


@dataclass(frozen=True)
class Survey:
    """Goodput for each GPU of `pairs` (tensor parallel ranks of a prefill and of a decode instance), and of ways to do both `together`."""

    pairs: Mapping[tuple[int, int], float]
    together: Mapping[str, float]

    @property
    def best(self) -> tuple[int, int]:
        """The pair that serves most."""
        return max(self.pairs, key=lambda pair: self.pairs[pair])

    @property
    def words(self) -> str:
        """Who serves most, and by how much."""
        apart, (name, both) = self.pairs[self.best], max(self.together.items(), key=lambda each: each[1])
        pair, way = f"{self.best[0]} and {self.best[1]} ranks", name.removeprefix("both, ")
        if not apart and not both:
            return "Nothing keeps these goals"
        if not both:
            return f"Only apart keeps the goals, on {pair}"
        if not apart:
            return f"Only doing both keeps the goals, on {way}"
        if min(apart, both) >= RATES[-1]:
            return f"Both keep them at {RATES[-1]:.1f} requests/s for each GPU, the highest rate looked at"
        if max(apart, both) < EQUAL * min(apart, both):
            return f"About equal: apart on {pair}, doing both on {way}"
        first, second = ("Apart", "doing both") if apart > both else ("Doing both", "the best pair")
        return f"{first} wins, on {pair if apart > both else way}: {max(apart, both) / min(apart, both):.1f} times {second}"


def survey(setting: Setting, gpus: int = 4, seeds: int = 1) -> Survey:
    """All pairs that fit so many GPUs, and all ways of doing both that do: with prompts first and, on the most ranks, in chunks. `REQUESTS` a
    simulation, so that the start counts for little; rates are looked for among `RATES`.
    """
    setting = replace(setting, requests=REQUESTS)
    rate = lambda make: mean(highest(make, setting, seed) for seed in range(seeds))  # noqa: E731
    one = list(distserve.options(setting, gpus))
    pairs = {
        (prefill.tp, decode.tp): rate(lambda: distserve.build(Placement(prefill, decode), setting))  # noqa: B023
        for prefill in one
        for decode in one
        if prefill.gpus + decode.gpus <= gpus
    }
    together = {ranks_text(each.tp): rate(lambda: distserve.colocated(setting, each.tp)) for each in one}  # noqa: B023
    most = one[-1].tp
    together[f"{ranks_text(most)}, chunks"] = rate(lambda: distserve.colocated(setting, most, chunk=512))
    return Survey(pairs, together)


def ranks_text(ranks: int) -> str:
    """What doing both on so many ranks is called."""
    return f"both, {ranks} rank{'s' * (ranks > 1)}"


def highest(make: Callable[[], Cluster], setting: Setting, seed: int) -> float:
    """The highest of `RATES` for each GPU at which the goals are kept, 0 for none."""
    gpus, low, high = make().gpus, -1, len(RATES)
    while high - low > 1:
        middle = (low + high) // 2
        tasks = make().serve(distserve.load(setting, RATES[middle] * gpus, seed))
        low, high = (middle, high) if distserve.keeps(tasks, setting) else (low, middle)
    return RATES[low] if low >= 0 else 0.0


def asking(ttft_ms: float, tpot_ms: float, tokens_in: int, tokens_out: int) -> Setting:
    """OPT-13B under these goals, with lengths drawn around these medians."""
    return Setting(slo=SLO(ttft_ms / 1e3, tpot_ms / 1e3), lengths=Lengths(tokens_in, 0.5, tokens_out, 0.5))


def figure8(
    seeds: int = 8, rates: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
) -> dict[str, list[Point]]:
    """SLO attainment over the rate for each GPU: DistServe's placement, doing both on two GPUs with the same step times, and its vLLM on one."""
    theirs = replace(FIGURE_8, engine="vLLM")
    ways: dict[str, tuple[Setting, Callable[[], Cluster]]] = {
        "DistServe, 2 and 1 GPUs": (FIGURE_8, lambda: distserve.build(BOTH, FIGURE_8)),
        "doing both, 2 GPUs": (FIGURE_8, lambda: distserve.colocated(FIGURE_8, 2)),
        "vLLM of 2023, 1 GPU": (theirs, lambda: distserve.colocated(theirs, 1)),
    }
    return {name: [_point(make, setting, rate, seeds) for rate in rates] for name, (setting, make) in ways.items()}


def knee(points: Sequence[Point], share: float = 0.9) -> float:
    """The rate at which the share falls below `share`, by a line between two points; 0 when it starts below."""
    for (rate, value, _), (further, less, _) in zip(points, points[1:]):
        if value < share:
            break
        if less < share:
            return rate + (further - rate) * (value - share) / (value - less)
    return points[-1][0] if points[-1][1] >= share and points[0][1] >= share else 0.0


def knees(points: Sequence[Point], share: float = 0.9) -> tuple[float, float]:
    """Between which rates it falls below `share`, when all points are lower or higher by their deviation."""
    low, high = ([(rate, value + sign * up, up) for rate, value, up in points] for sign in (-1, 1))
    return knee(low, share), knee(high, share)


def _point(make: Callable[[], Cluster], setting: Setting, rate: float, seeds: int) -> Point:
    shares = []
    for seed in range(seeds):
        cluster = make()
        tasks = cluster.serve(distserve.load(setting, rate * cluster.gpus, seed))
        shares.append(distserve.attainment(tasks, setting.slo))
    return rate, mean(shares), stdev(shares) if seeds > 1 else 0.0
