"""Which part of a KV cache goes from which rank to which when it moves between instances of different layouts. Numbers only.

A rank holds the K and V of its stage's layers and of its slice's heads, and with cp of some of the blocks. What a rank of the one
side and a rank of the other have in common goes from the first to the second. It is worked out once for two layouts; only which blocks
a request has changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.model.config import ModelConfig
from minillm.parallel.layout import Layout
from minillm.parallel.shards import Shard


@dataclass(frozen=True)
class Route:
    """What rank `source` sends to rank `target`: `layers` and KV `heads` that both hold. Of a
    sequence's blocks those that lie at the source's place of its context parallel line,
    (place, ranks), and come to lie at the target's.
    """

    source: int
    target: int
    layers: range
    heads: range
    source_place: tuple[int, int] = (0, 1)
    target_place: tuple[int, int] = (0, 1)

    def pairs(self, sources: Sequence[int], targets: Sequence[int]) -> list[tuple[int, int]]:
        """Which of the source rank's own blocks go to which of the target rank's, of a
        sequence with these block tables.
        """
        (here, ranks_here), (there, ranks_there) = self.source_place, self.target_place
        return [
            (old // ranks_here, new // ranks_there)
            for old, new in zip(sources, targets, strict=True)
            if old % ranks_here == here and new % ranks_there == there
        ]

    def bytes_of(self, blocks: int, block_size: int, head_dim: int, element_bytes: int) -> int:
        """What so many blocks take on this route: K and V of its layers and heads."""
        numbers = len(self.layers) * len(self.heads) * blocks * block_size * head_dim
        return 2 * numbers * element_bytes


def routes_between(config: ModelConfig, source: Layout, target: Layout) -> list[Route]:
    """All routes from an instance of one layout to one of another, target by target. Where several ranks of the source hold the same
    heads, each of them sends to some of the targets. Every target gets all that it holds, exactly once.
    """
    here = [Shard(config, source, rank) for rank in range(source.world_size)]
    found: list[Route] = []
    for rank in range(target.world_size):
        there = Shard(config, target, rank)
        place = (target.coordinates(rank)["cp"], target.cp)
        for layers, heads, holders in _holdings(here):
            common = _common(layers, there.layers), _common(heads, there.kv_heads)
            if not all(common):
                continue
            for cp in range(source.cp):
                line = [each for each in holders if source.coordinates(each)["cp"] == cp]
                found.append(Route(line[rank % len(line)], rank, *common, (cp, source.cp), place))
    return found


def _holdings(shards: Sequence[Shard]) -> list[tuple[range, range, list[int]]]:
    """What is held, layers and heads, each with the ranks that hold the same."""
    found: dict[tuple[range, range], list[int]] = {}
    for shard in shards:
        found.setdefault((shard.layers, shard.kv_heads), []).append(shard.rank)
    return [(layers, heads, ranks) for (layers, heads), ranks in found.items()]


def _common(one: range, other: range) -> range:
    return range(max(one.start, other.start), max(one.start, other.start, min(one.stop, other.stop)))
