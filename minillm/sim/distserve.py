"""DistServe simulated: placements of prefill and decode, the goodput of each, and the two searches for the best one (Zhong et al. 2024,
section 4; latencies by its released coefficients).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

import numpy as np

from minillm.hardware.devices import Link
from minillm.hardware.profiles import CACHE_TOKENS
from minillm.policy.handing import Dispatcher, Role
from minillm.policy.router import LeastTokens, ShortestQueue
from minillm.sim.cluster import Apart, Cluster, Kind, Together, Wires
from minillm.sim.costs import Fitted
from minillm.sim.machine import Limits
from minillm.sim.task import Task
from minillm.trace.metrics import SLO
from minillm.trace.workload import Arrival, Lengths

SATURATING = 512  # L_m: tokens of prompts that saturate the GPU
TOKEN_BYTES = {"OPT-13B": 2 * 40 * 5120 * 2.0, "OPT-66B": 2 * 64 * 9216 * 2.0}
LAYERS = {"OPT-13B": 40, "OPT-66B": 64}
MAX_DECODES = 1024
SHARED_LENGTHS = Lengths(
    800, 0.85, 145, 0.9
)  # with the means of ShareGPT there (755 in, 200 out; figure 7): it is not at hand
LONGEST = 2048  # of a prompt and its answer, in OPT


@dataclass(frozen=True)
class Parallelism:
    """How one instance lies over GPUs: tensor parallel ranks and pipeline stages."""

    tp: int
    pp: int = 1

    def __post_init__(self) -> None:
        if self.tp < 1 or self.pp < 1:
            raise ValueError(f"tp={self.tp}, pp={self.pp}: give at least 1 of each")

    @property
    def gpus(self) -> int:
        """All ranks."""
        return self.tp * self.pp


@dataclass(frozen=True)
class Placement:
    """So many prefill instances and decode instances, all of a kind alike; no `prefill` and no `decode`: only the other half is simulated."""

    prefill: Parallelism | None
    decode: Parallelism | None
    prefills: int = 1
    decodes: int = 1

    def __post_init__(self) -> None:
        if self.prefills < 1 or self.decodes < 1:
            raise ValueError(f"{self.prefills} prefill and {self.decodes} decode instances: give at least 1 of each")

    @property
    def gpus(self) -> int:
        """All of them."""
        parts = ((self.prefill, self.prefills), (self.decode, self.decodes))
        return sum(each.gpus * count for each, count in parts if each is not None)


class Drawn(Protocol):
    """Lengths that are drawn."""

    def draw(self, random: Random) -> tuple[int, int]:
        """(prompt tokens, new tokens) of one request."""


@dataclass(frozen=True)
class Setting:
    """What is served, and what is asked: `percent` of requests keep to each half of the SLO by themselves, as the released search asks.

    `saturating` tokens of prompts go into one step (None: as many as fit the cache, as in the released simulator); caches move over `link` (None:
    in no time, as there).
    """

    model: str = "OPT-13B"
    slo: SLO = SLO(0.2, 0.1)
    percent: float = 90.0
    lengths: Drawn = SHARED_LENGTHS
    requests: int = 300
    saturating: int | None = SATURATING
    link: Link | None = None
    engine: str = "DistServe"


BOTH = Placement(Parallelism(2), Parallelism(1))  # what the paper's search takes for OPT-13B (table 3)
FIGURE_8 = Setting(slo=SLO(0.25, 0.1))


def load(setting: Setting, rate: float, seed: int) -> list[Arrival]:
    """Poisson arrivals whose lengths are drawn, those that are too long for the model drawn again."""
    random, now = Random(seed), 0.0
    arrivals: list[Arrival] = []
    while len(arrivals) < setting.requests:
        prompt, new = setting.lengths.draw(random)
        if prompt + new < LONGEST:
            now += random.expovariate(rate)
            arrivals.append(Arrival(now, prompt, new))
    return arrivals


def build(placement: Placement, setting: Setting) -> Cluster:
    """The cluster of a placement. Of one half alone, the other takes no time."""
    kinds, roles = [], []
    for parallelism, count, role in (
        (placement.prefill, placement.prefills, Role.PREFILL), (placement.decode, placement.decodes, Role.DECODE),
    ):  # fmt: skip
        kinds += [kind(setting, parallelism, role)] * count
        roles += [role] * count
    wires = Wires(setting.link, TOKEN_BYTES[setting.model], LAYERS[setting.model])
    dispatcher = Dispatcher(roles, ShortestQueue(len(roles)), LeastTokens(len(roles)))
    return Apart(kinds, dispatcher, wires)


def colocated(setting: Setting, tp: int, count: int = 1, chunk: int | None = None) -> Cluster:
    """Instances that do both: prompts first, as vLLM did, or with `chunk` cut to a budget of so many tokens a step, decodes along."""
    costs = Fitted.published(setting.model, tp, engine=setting.engine)
    limits = Limits(
        _cache(setting.model, Parallelism(tp)),
        MAX_DECODES,
        8192 if chunk is None else chunk,
        chunked=chunk is not None,
        apart=chunk is None,
    )
    return Together([Kind(costs, limits, tp)] * count, LeastTokens(count))


def kind(setting: Setting, parallelism: Parallelism | None, role: Role) -> Kind:
    """One instance; without a parallelism one whose steps take no time."""
    if parallelism is None:
        return Kind(_Instant(), Limits(10**9, 10**6, 10**9), 0)
    costs = Fitted.published(setting.model, parallelism.tp, parallelism.pp, setting.engine)
    cache = _cache(setting.model, parallelism)
    step = (setting.saturating or cache) if role is Role.PREFILL else cache
    return Kind(costs, Limits(cache, MAX_DECODES, step), parallelism.gpus)


def _cache(model: str, parallelism: Parallelism) -> int:
    """Tokens that fit beside the weights: as published, or for stages what the same GPUs have as tensor parallel ranks."""
    for gpus in (parallelism.gpus, parallelism.tp):
        if (model, gpus) in CACHE_TOKENS:
            return CACHE_TOKENS[model, gpus] * parallelism.gpus // gpus
    raise ValueError(f"{model} on tp={parallelism.tp} is not published")


class _Instant:
    """Steps that take next to no time."""

    stages = 1

    def prompt_s(self, tokens: int, squares: int) -> float:
        return 1e-9

    def decode(self, batch: int) -> tuple[float, float]:
        return 1e-9, 0.0

    def mixed_s(self, tokens: int, squares: int, batch: int, context: int) -> float:
        return 1e-9


def keeps(tasks: Sequence[Task], setting: Setting) -> bool:
    """Whether the percentile of TTFT and that of TPOT are both within the SLO."""
    ttft = np.percentile([task.ttft_s for task in tasks], setting.percent)
    tpot = np.percentile([task.tpot_s for task in tasks], setting.percent)
    return bool(ttft <= setting.slo.ttft_s and tpot <= setting.slo.tpot_s)


def attainment(tasks: Sequence[Task], slo: SLO) -> float:
    """The share of requests that keep to both (SLO attainment)."""
    return sum(task.ttft_s <= slo.ttft_s and task.tpot_s <= slo.tpot_s for task in tasks) / len(tasks)


def goodput(
    make: Callable[[], Cluster], setting: Setting, seed: int = 0, most: float = 16.0, step: float = 1 / 64
) -> float:
    """The highest rate for each GPU at which the SLO is kept, in requests per second, by bisection to `step` (section 4.1)."""
    gpus = max(1, make().gpus)
    low, high = 0.0, most
    while high - low > step:
        rate = (low + high) / 2
        if keeps(make().serve(load(setting, rate * gpus, seed)), setting):
            low = rate
        else:
            high = rate
    return low


@dataclass(frozen=True)
class Found:
    """The best placement and its goodput for each GPU, and how many were simulated."""

    placement: Placement
    per_gpu: float
    tried: int


def options(setting: Setting, gpus: int, most_pp: int = 1) -> Iterator[Parallelism]:
    """The parallelisms that fit so many GPUs and whose times are published."""
    for tp in sorted({tp for (model, tp) in CACHE_TOKENS if model == setting.model}):
        for pp in range(1, most_pp + 1):
            if tp * pp <= gpus:
                yield Parallelism(tp, pp)


def place_high(setting: Setting, rate: float, gpus: int = 4, seed: int = 0) -> Found:
    """Algorithm 1, where caches cross nodes fast: the best of each half by itself, then as many instances as `rate` wants."""
    each = list(options(setting, gpus))
    prefill_rate, prefill = max(
        ((_rated(Placement(one, None), setting, seed), one) for one in each), key=lambda rated: rated[0]
    )
    decode_rate, decode = max(
        ((_rated(Placement(None, one), setting, seed), one) for one in each), key=lambda rated: rated[0]
    )
    if not prefill_rate or not decode_rate:
        raise ValueError(_hopeless(setting, seed))
    halves = prefill_rate * prefill.gpus, decode_rate * decode.gpus
    prefills, decodes = (max(1, math.ceil(rate / half)) for half in halves)
    placement = Placement(prefill, decode, prefills, decodes)
    return Found(placement, min(halves[0] * prefills, halves[1] * decodes) / placement.gpus, 2 * len(each))


def place_low(setting: Setting, gpus: int = 4, seed: int = 0, step: float = 1 / 64) -> Found:
    """Algorithm 2, where a cache stays within its node: the best pair that fits one node, simulated together, with rates to `step`."""
    pairs = [
        Placement(prefill, decode)
        for prefill in options(setting, gpus)
        for decode in options(setting, gpus - prefill.gpus)
    ]
    if not pairs:
        raise ValueError(f"{setting.model} does not fit {gpus} GPUs twice, for prefill and for decode: give more")
    per_gpu, placement = max(
        ((_rated(pair, setting, seed, step), pair) for pair in pairs), key=lambda rated: (rated[0], -rated[1].gpus)
    )
    if not per_gpu:
        raise ValueError(_hopeless(setting, seed))
    return Found(placement, per_gpu, len(pairs))


def _rated(placement: Placement, setting: Setting, seed: int, step: float = 1 / 64) -> float:
    return goodput(lambda: build(placement, setting), setting, seed, step=step)


def _hopeless(setting: Setting, seed: int) -> str:
    """What even the fastest parallelism misses when hardly anybody is there."""
    fastest = list(options(setting, 64))[-1]
    tasks = build(Placement(fastest, fastest), setting).serve(load(replace(setting, requests=100), 0.01, seed))
    ttft, tpot = (
        float(np.percentile([getattr(task, name) for task in tasks], setting.percent)) for name in ("ttft_s", "tpot_s")
    )
    return (
        f"nothing keeps to TTFT {setting.slo.ttft_s:g} s and TPOT {setting.slo.tpot_s:g} s for {setting.percent:g} %: with tp={fastest.tp}, "
        f"and nobody else there, they are {ttft:.3g} s and {tpot:.3g} s"
    )
