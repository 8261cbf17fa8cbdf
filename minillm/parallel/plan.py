"""What a step takes on any layout of any device and link, by the roofline and α + β · bytes, before anything is run.

A step is the next token of all requests (decode), or their prompts (prefill). Nothing but products, attention, sums and
hidden states is counted, and nothing overlaps within a stage, so that real engines differ; which layout wins is rarely
changed by it. The file runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from minillm.hardware.devices import Device, Link
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import USABLE
from minillm.parallel.balance import predict_costs
from minillm.parallel.layout import Layout
from minillm.parallel.numbering import ORDER, apart, crossing, places_of
from minillm.parallel.shards import Shard
from minillm.trace.collectives import ALGORITHMS


@dataclass(frozen=True)
class Load:
    """What a step takes in: `tokens` new ones of each of some `sequences`, after `context` others."""

    sequences: int
    tokens: int
    context: int


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: what the slowest rank computes, what all ranks wait for sums, and for hidden states."""

    computed_s: float
    summed_s: float
    sent_s: float = 0.0
    fits: bool = True  # whether the fullest rank's weights and KV are within what is used of a device's memory

    @property
    def total_s(self) -> float:
        """A block begins when the sum of the one before is there, so that they add."""
        return self.computed_s + self.summed_s + self.sent_s


@dataclass(frozen=True)
class StepPlan:
    """A step on a layout as far as it does not depend on links: seconds that the slowest rank of each stage computes for a
    group, sums in each stage, bytes of what is summed or sent on, and how many groups follow one another.
    """

    layout: Layout
    decode: bool
    groups: int
    computed_s: tuple[float, ...]
    sums: tuple[int, ...]
    message: int

    def time(self, link: Link, hops: Sequence[Link] | None = None) -> StepTime:
        """With sums by `link`, and hidden states from each stage to the next, and back to the first, by `hops` if they are others."""
        one_sum = min(algorithm(self.layout.tp, self.message, link) for algorithm in ALGORITHMS.values())
        summed = [count * one_sum for count in self.sums]
        hop_s = [each.time_s(self.message) for each in hops or [link] * self.layout.pp] if self.layout.pp > 1 else [0.0]
        busiest = max(range(self.layout.pp), key=lambda stage: self.computed_s[stage] + summed[stage])
        first = StepTime(sum(self.computed_s), sum(summed), sum(hop_s))
        if self.decode:
            together = StepTime(self.groups * self.computed_s[busiest], self.groups * summed[busiest])
            return max(first, together, key=lambda time: time.total_s)
        behind = self.groups - 1
        return StepTime(
            first.computed_s + behind * self.computed_s[busiest],
            first.summed_s + behind * summed[busiest],
            sum(hop_s[:-1]),
        )

    def total_s(self, speed: Any, link: Link) -> Any:
        """The same in all, on devices that are `speed` times as fast, for whole arrays of speeds and of the link's figures."""
        sums = [algorithm(self.layout.tp, self.message, link) for algorithm in ALGORITHMS.values()]
        one_sum = reduce(np.minimum, sums)
        hop = link.time_s(self.message) if self.layout.pp > 1 else 0.0
        stages = [own / speed + count * one_sum for own, count in zip(self.computed_s, self.sums)]
        first, busiest = sum(stages), reduce(np.maximum, stages)
        if self.decode:
            return np.maximum(first + self.layout.pp * hop, self.groups * busiest)
        return first + (self.groups - 1) * busiest + (self.layout.pp - 1) * hop


def plan_step(layout: Layout, device: Device, config: ModelConfig, dtype: str, load: Load) -> StepPlan:
    """Requests are dealt out to the replicas, and those of a replica into groups that follow one another through its stages.

    In decode as many groups as stages are under way, and a group's next step begins when its last token is there: a round
    lasts as long as a group needs for all stages, or a stage for all groups. In prefill a group is one prompt, and the last
    one is through when it has passed all stages behind the others (GPipe, section 2.3). 2 sums a layer and the embedding's,
    each by the algorithm that is fastest then.
    """
    mine = -(-load.sequences // layout.dp)
    groups = min(layout.pp, mine) if load.tokens == 1 else mine
    group = replace(load, sequences=-(-mine // groups))
    message = group.sequences * group.tokens * config.hidden_size * DTYPE_BYTES[dtype]
    computed = tuple(_computed_s(layout, stage, device, config, dtype, group) for stage in range(layout.pp))
    sums = tuple(2 * len(layout.layers(config.layers, stage)) + (stage == 0) for stage in range(layout.pp))
    return StepPlan(layout, load.tokens == 1, groups, computed, sums, message)


def step_time(
    layout: Layout, device: Device, link: Link, config: ModelConfig, dtype: str, load: Load,
    hops: Sequence[Link] | None = None,
) -> StepTime:  # fmt: skip
    """A planned step (`plan_step`), and whether the fullest rank has the room for it."""
    found = plan_step(layout, device, config, dtype, load).time(link, hops)
    return replace(found, fits=fullest_bytes(layout, config, dtype, load) <= USABLE * device.memory_bytes)


@dataclass(frozen=True)
class Hosts:
    """Devices in hosts of `size`: a fast link inside each, and for each device one of its own, slower, to those elsewhere."""

    device: Device
    size: int
    inside: Link
    between: Link

    def sums(self, layout: Layout, order: Sequence[str] = ORDER) -> Link:
        """What sums go by: in each step of a ring everybody waits for the slowest link in it."""
        return self.between if crossing(layout, "tp", self.size, order) else self.inside

    def hops(self, layout: Layout, order: Sequence[str] = ORDER) -> list[Link]:
        """What hidden states go by from each stage to the next, and from the last to the first."""
        ways = [(stage, (stage + 1) % layout.pp) for stage in range(layout.pp)]
        return [self.between if self._apart(layout, way, order) else self.inside for way in ways]

    def step_time(
        self, layout: Layout, config: ModelConfig, dtype: str, load: Load, order: Sequence[str] = ORDER
    ) -> StepTime:
        """A planned step on them, with ranks numbered in an order of axes."""
        sums, hops = self.sums(layout, order), self.hops(layout, order)
        return step_time(layout, self.device, sums, config, dtype, load, hops)

    def _apart(self, layout: Layout, way: tuple[int, int], order: Sequence[str]) -> bool:
        first, second = way
        here = (place for place in places_of(layout) if place["pp"] == first)
        return any(apart(layout, place, place | {"pp": second}, self.size, order) for place in here)


def fullest_bytes(layout: Layout, config: ModelConfig, dtype: str, load: Load) -> float:
    """Weights of the fullest rank of a replica, and its part of the KV of the requests there."""
    size, mine = DTYPE_BYTES[dtype], -(-load.sequences // layout.dp)
    cached = mine * (load.context + load.tokens) * 2 * config.head_dim * size
    all_shards = [Shard(config, replace(layout, dp=1), rank) for rank in range(layout.pp * layout.tp)]
    shards = {shard.extent: shard for shard in all_shards}.values()  # one of each kind
    return max(shard.weight_bytes(size) + cached * len(shard.layers) * len(shard.kv_heads) for shard in shards)


def _computed_s(
    layout: Layout, stage: int, device: Device, config: ModelConfig, dtype: str, group: Load
) -> float:  # fmt: skip
    """What the slowest rank of a stage computes for one group."""
    shards = [Shard(config, replace(layout, dp=1), stage * layout.tp + rank) for rank in range(layout.tp)]
    slowest = 0.0
    for _, heads, kv_heads, columns, words, _, _ in {shard.extent for shard in shards}:
        mine = replace(config, heads=heads, kv_heads=kv_heads, intermediate_size=columns, vocab_size=words)
        costs = predict_costs(mine, device, dtype, group.sequences, group.tokens, group.context)
        seconds = len(shards[0].layers) * costs.layer_s
        seconds += costs.embedding_s * shards[0].first_stage + costs.head_s * shards[0].last_stage
        slowest = max(slowest, seconds)
    return slowest
