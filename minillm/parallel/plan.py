"""What a step takes on any layout of any device and link, by the roofline and α + β · bytes, before anything is run.

A step is the next token of all requests (decode), or their prompts (prefill). Nothing but products, attention, sums and
hidden states is counted, and nothing overlaps within a stage, so that real engines differ; which layout wins is rarely
changed by it. The file runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from minillm.hardware.devices import Device, Link
from minillm.model.config import DTYPE_BYTES, ModelConfig
from minillm.model.cost import USABLE
from minillm.parallel.balance import predict_costs
from minillm.parallel.layout import Layout
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


def step_time(
    layout: Layout, device: Device, link: Link, config: ModelConfig, dtype: str, load: Load, hops: Link | None = None
) -> StepTime:
    """Requests are dealt out to the replicas, and those of a replica into groups that follow one another through its stages.

    In decode as many groups as stages are under way, and a group's next step begins when its last token is there: a round
    lasts as long as a group needs for all stages, or a stage for all groups. In prefill a group is one prompt, and the last
    one is through when it has passed all stages behind the others (GPipe, section 2.3). 2 sums a layer and the embedding's,
    each by the algorithm that is fastest then. Sums go by `link`, hidden states by `hops` where that is another one.
    """
    size, mine = DTYPE_BYTES[dtype], -(-load.sequences // layout.dp)
    groups = min(layout.pp, mine) if load.tokens == 1 else mine
    group = replace(load, sequences=-(-mine // groups))
    message = group.sequences * group.tokens * config.hidden_size * size
    one_sum = min(algorithm(layout.tp, message, link) for algorithm in ALGORITHMS.values())
    stages = [len(layout.layers(config.layers, stage)) for stage in range(layout.pp)]
    computed = [_computed_s(layout, stage, device, config, dtype, group) for stage in range(layout.pp)]
    summed = [(2 * layers + (stage == 0)) * one_sum for stage, layers in enumerate(stages)]
    busiest = max(range(layout.pp), key=lambda stage: computed[stage] + summed[stage])
    hop = (hops or link).time_s(message) if layout.pp > 1 else 0.0
    one_by_one = StepTime(sum(computed), sum(summed), layout.pp * hop)
    if load.tokens == 1:
        together = StepTime(groups * computed[busiest], groups * summed[busiest])
        found = max(one_by_one, together, key=lambda time: time.total_s)
    else:
        behind = groups - 1
        found = StepTime(
            one_by_one.computed_s + behind * computed[busiest],
            one_by_one.summed_s + behind * summed[busiest],
            (layout.pp - 1) * hop,
        )
    return replace(found, fits=fullest_bytes(layout, config, dtype, load) <= USABLE * device.memory_bytes)


def fullest_bytes(layout: Layout, config: ModelConfig, dtype: str, load: Load) -> float:
    """Weights of the fullest rank of a replica, and its part of the KV of the requests there."""
    size, mine = DTYPE_BYTES[dtype], -(-load.sequences // layout.dp)
    cached = mine * (load.context + load.tokens) * 2 * config.head_dim * size
    shards = [Shard(config, replace(layout, dp=1), rank) for rank in range(layout.pp * layout.tp)]
    return max(shard.weight_bytes(size) + cached * len(shard.layers) * len(shard.kv_heads) for shard in shards)


def _computed_s(
    layout: Layout, stage: int, device: Device, config: ModelConfig, dtype: str, group: Load
) -> float:  # fmt: skip
    """What the slowest rank of a stage computes for one group."""
    shards = [Shard(config, replace(layout, dp=1), stage * layout.tp + rank) for rank in range(layout.tp)]
    parts = {(len(shard.heads), len(shard.kv_heads), len(shard.columns), len(shard.vocabulary)) for shard in shards}
    slowest = 0.0
    for heads, kv_heads, columns, words in parts:
        mine = replace(config, heads=heads, kv_heads=kv_heads, intermediate_size=columns, vocab_size=words)
        costs = predict_costs(mine, device, dtype, group.sequences, group.tokens, group.context)
        seconds = len(shards[0].layers) * costs.layer_s
        seconds += costs.embedding_s * shards[0].first_stage + costs.head_s * shards[0].last_stage
        slowest = max(slowest, seconds)
    return slowest
