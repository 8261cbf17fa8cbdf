"""Which ranks hold which experts: even shares, or by load with copies of the hottest (EPLB, DeepSeek 2025).

An expert's load is how many tokens chose it. Copies of an expert take its tokens in turns. No tensors here, and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Placement:
    """The experts of one layer that each rank holds; a rank that stands in for two copies of an expert has it twice here, and
    once in memory.

    Raises `ValueError` for an expert of `experts` that no rank holds, and for a number that is no expert's.
    """

    ranks: tuple[tuple[int, ...], ...]
    experts: int

    def __post_init__(self) -> None:
        held = {expert for rank in self.ranks for expert in rank}
        if missing := sorted(set(range(self.experts)) - held):
            raise ValueError(
                f"the placement misses expert {missing[0]}: every one of the {self.experts} experts needs a rank"
            )
        if strange := sorted(held - set(range(self.experts))):
            raise ValueError(f"the placement names expert {strange[0]}: there are experts 0 to {self.experts - 1}")

    @cached_property
    def copies(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that hold each expert, one entry for each copy."""
        return tuple(
            tuple(rank for rank, held in enumerate(self.ranks) for each in held if each == expert)
            for expert in range(self.experts)
        )

    def held(self, rank: int) -> tuple[int, ...]:
        """The experts in a rank's memory."""
        return tuple(sorted(set(self.ranks[rank])))

    def rank_loads(self, loads: Sequence[float]) -> list[float]:
        """What each rank has to compute when each expert has this load."""
        return [sum(loads[expert] / len(self.copies[expert]) for expert in rank) for rank in self.ranks]

    def imbalance(self, loads: Sequence[float]) -> float:
        """The fullest rank's load over the mean: by so much a layer takes longer than it must. 1 where there is no load."""
        ranks = self.rank_loads(loads)
        return max(ranks) * len(ranks) / sum(ranks) if sum(ranks) else 1.0


def even(experts: int, ranks: int) -> Placement:
    """Consecutive shares, whatever the loads; the first ranks take the remainder."""
    base, rest = divmod(experts, ranks)
    begins = [rank * base + min(rank, rest) for rank in range(ranks + 1)]
    return Placement(tuple(tuple(range(*share)) for share in zip(begins, begins[1:])), experts)


def balanced_packing(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Put items into packs of as many items each (or one less): the heaviest first, each into the lightest pack with room."""
    room = -(-len(weights) // packs)
    held: list[list[int]] = [[] for _ in range(packs)]
    filled = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda each: -weights[each]):
        pack = min((pack for pack in range(packs) if len(held[pack]) < room), key=lambda each: filled[each])
        held[pack].append(item)
        filled[pack] += weights[item]
    return held


def replicate(loads: Sequence[float], slots: int) -> list[int]:
    """How many copies each expert gets when there are so many `slots`: one each, then one more for whoever's copies have most
    to do.
    """
    copies = [1] * len(loads)
    for _ in range(slots - len(loads)):
        busiest = max(range(len(loads)), key=lambda expert: loads[expert] / copies[expert])
        copies[busiest] += 1
    return copies


def place(loads: Sequence[float], ranks: int, slots: int, nodes: int = 1, groups: int = 1) -> Placement:
    """A placement of experts with these loads in `slots` slots, shared out over the ranks.

    Hierarchical where `groups` of consecutive experts can be shared out over `nodes` of consecutive ranks: groups are packed
    to nodes, so that a token whose experts are of few groups goes to few nodes; copies and ranks are then chosen within each
    node. Global otherwise. Raises `ValueError` for fewer slots than experts, and for sizes that do not divide.
    """
    experts = len(loads)
    if slots < experts:
        raise ValueError(f"{slots} slots do not hold {experts} experts: give {experts} or more")
    if groups % nodes or experts % groups or ranks % nodes or slots % nodes:
        nodes = groups = 1
    size = experts // groups
    weights = [sum(loads[group * size : (group + 1) * size]) for group in range(groups)]
    placed: list[tuple[int, ...]] = []
    for node in balanced_packing(weights, nodes):
        mine = [group * size + place for group in sorted(node) for place in range(size)]
        copies = replicate([loads[expert] for expert in mine], slots // nodes)
        items = [expert for expert, count in zip(mine, copies) for _ in range(count)]
        each = [loads[expert] / count for expert, count in zip(mine, copies) for _ in range(count)]
        packs = balanced_packing(each, ranks // nodes)
        placed += [tuple(sorted(items[item] for item in pack)) for pack in packs]
    return Placement(tuple(placed), experts)
