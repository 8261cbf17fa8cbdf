"""Splitwise simulated: its designs of clusters, what they cost and draw, its nine service level objectives, and the rate that keeps them
(Patel et al. 2024; numbers as printed there, or as in the released scripts where it says so).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np

from minillm.hardware.devices import Link
from minillm.policy.handing import Dispatcher, Role
from minillm.policy.pooled import PoolDispatcher
from minillm.policy.pools import Pools
from minillm.policy.router import LeastTokens, ShortestQueue
from minillm.sim.cluster import Apart, Cluster, Kind, Together, Wires
from minillm.sim.costs import Measured, at
from minillm.sim.machine import Limits
from minillm.sim.task import Task
from minillm.trace.workload import Arrival, Lengths, Quantiles

SLOW_DOWNS = {"ttft": (2.0, 3.0, 6.0), "tbt": (1.25, 1.5, 5.0), "e2e": (1.25, 1.5, 5.0)}  # at P50, P90, P99 (table VI)
MIXED_SLOWER = 1.1  # a step with prompts and tokens, over one of prompts alone
MAX_BATCH, MAX_TOKENS = 512, 2048


@dataclass(frozen=True)
class MachineType:
    """A machine of eight GPUs. `power` and `cost` as in the released scripts; `capped` to 70 % of its power, which prompts feel and tokens
    do not.
    """

    gpu: str
    power: float
    cost: float
    capped: bool = False


A100 = MachineType("A100", 24.8, 2.21)
H100 = MachineType("H100", 44.0, 4.76)
H100_CAPPED = MachineType("H100", 44.0 * 0.7, 4.76, capped=True)
TYPES = {"A": A100, "H": H100, "Hcap": H100_CAPPED}


@dataclass(frozen=True)
class Hosted:
    """A model on such machines: KV bytes a token, and what fits beside the weights of 640 GB."""

    name: str
    token_bytes: float
    cache_tokens: int
    layers: int


BLOOM = Hosted("BLOOM-176B", 2 * 70 * 14336 * 2.0, int((640e9 - 352e9) / (2 * 70 * 14336 * 2)), 70)
LLAMA = Hosted("Llama-2-70B", 2 * 80 * 1024 * 2.0, int((640e9 - 140e9) / (2 * 80 * 1024 * 2)), 80)


@dataclass(frozen=True)
class Design:
    """A cluster: so many machines of a type read prompts, and so many of a type go on with them; without the latter all do both."""

    name: str
    prompt: MachineType
    prompts: int
    token: MachineType | None = None
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.prompts < 1 or (self.token is not None and self.tokens < 1):
            raise ValueError(f"{self.name}: {self.prompts} and {self.tokens} machines: give at least 1 of each kind")

    @property
    def power(self) -> float:
        """Of all machines, in the scripts' unit."""
        return self.prompts * self.prompt.power + (self.tokens * self.token.power if self.token else 0.0)

    @property
    def cost(self) -> float:
        """Of all machines."""
        return self.prompts * self.prompt.cost + (self.tokens * self.token.cost if self.token else 0.0)

    @property
    def machines(self) -> int:
        """All of them."""
        return self.prompts + self.tokens


def build(
    design: Design, model: Hosted = BLOOM, link: Link | None = None, as_released: bool = True, mixed: bool = True
) -> Cluster:
    """The cluster of a design. Without a `link` caches move as in the released simulator: 200 GiB/s for each of them, all at once; without
    the `mixed` pool machines keep to their roles.
    """
    kind = partial(_kind, model, as_released)
    if design.token is None:
        return Together([kind(design.prompt)] * design.prompts, ShortestQueue(design.prompts))
    kinds = [kind(design.prompt)] * design.prompts + [kind(design.token)] * design.tokens
    homes = [Role.PREFILL] * design.prompts + [Role.DECODE] * design.tokens
    wires = Wires(
        link or Link("released", 200 * 2**30, 0.0, "splitwise-sim"), model.token_bytes, model.layers, link is not None
    )
    if not mixed:
        return Apart(kinds, Dispatcher(homes, ShortestQueue(len(kinds)), LeastTokens(len(kinds)), early=True), wires)
    return Apart(kinds, PoolDispatcher(Pools(homes, [model.cache_tokens] * len(kinds))), wires)


def _kind(model: Hosted, as_released: bool, machine: MachineType) -> Kind:
    costs = Measured.published(model.name, machine.gpu, machine.capped, as_released)
    return Kind(costs, Limits(model.cache_tokens, MAX_BATCH, MAX_TOKENS), gpus=8)


def slow_downs(tasks: Sequence[Task], model: Hosted = BLOOM) -> dict[str, list[float]]:
    """TTFT, TBT and E2E of all requests over those of an A100 machine that has nothing else to do, at P50, P90, P99."""
    alone = Measured.published(model.name, "A100", as_released=True)
    prompt = np.array([alone.prompt_s(task.prompt, 0) for task in tasks])
    token = np.array([at(alone.tokens, task.prompt) / 1e3 for task in tasks])
    more = np.array([task.new - 1 for task in tasks])
    several = more > 0
    ttft = np.array([task.ttft_s for task in tasks]) / prompt
    tbt = (np.array([task.tpot_s for task in tasks]) / token)[several]
    e2e = np.array([task.e2e_s for task in tasks]) / (prompt + token * more)
    return {
        name: [float(each) for each in np.percentile(values, (50, 90, 99))]
        for name, values in (("ttft", ttft), ("tbt", tbt), ("e2e", e2e))
        if len(values)
    }


def misses(tasks: Sequence[Task], model: Hosted = BLOOM) -> list[str]:
    """Which of the nine objectives are not kept, and by how much; empty when all are."""
    found = slow_downs(tasks, model)
    return [
        f"{name} P{percent}: {value:.2f} times an idle A100's, {limit:g} allowed"
        for name, limits in SLOW_DOWNS.items()
        for percent, limit, value in zip((50, 90, 99), limits, found.get(name, []))
        if value > limit
    ]


Load = Callable[[float, int], list[Arrival]]


def poisson_load(lengths: Sequence[tuple[int, int]] | Lengths | Quantiles, seconds: float = 120.0) -> Load:
    """Loads of so many seconds at a rate and a seed, as the released scripts make them: Poisson arrivals, lengths drawn from a trace's, prompts
    and answers apart.
    """

    def load(rate: float, seed: int) -> list[Arrival]:
        random, now, arrivals = Random(seed), 0.0, []
        while (now := now + random.expovariate(rate)) < seconds:
            if isinstance(lengths, Lengths | Quantiles):
                sizes = lengths.draw(random)
            else:
                sizes = random.choice(lengths)[0], random.choice(lengths)[1]
            arrivals.append(Arrival(now, *sizes))
        return arrivals

    return load


def highest_rate(keeps: Callable[[float], bool], low: float, high: float, step: float) -> float:
    """The highest multiple of `step` from `low` to `high` at which the objectives are kept, by bisection; 0 when not even at `low`."""
    if not keeps(low):
        return 0.0
    while high - low > step * 1.001:
        middle = low + step * round((high - low) / 2 / step)
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low
