"""An instance: one copy of the weights over ranks, as the launching process sees it; and how instances are started.

What is on the ranks is in `member.py`, and the engine that serves there, as seen from here, in `remote.py`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import reduce
from itertools import count
from operator import add
from pathlib import Path

import torch

from minillm.model.config import ModelConfig
from minillm.model.moe import Tally
from minillm.parallel.door import House
from minillm.parallel.errands import choices
from minillm.parallel.layout import Layout
from minillm.parallel.member import close_engine, load, open_engine, unload
from minillm.parallel.messages import Loaded
from minillm.parallel.sharing import SharedWeights, share_weights
from minillm.policy.experts import Placement
from minillm.policy.options import EngineOptions
from minillm.policy.request import Order
from minillm.ranks.pool import Ranks

_numbers = count(1)  # of instances, unique in this process


class Instance:
    """The weights of a checkpoint over `ranks`, as `layout` says. They are read at once, and again after a restart.

    `shared` are the weights that replicas on this host have together. Raises `ValueError` for another number of ranks than
    the layout takes, and for ranks on another kind of `device`.
    """

    def __init__(
        self, ranks: Ranks, folder: Path, layout: Layout, device: torch.device, dtype: torch.dtype, shared: SharedWeights | None = None
    ) -> None:  # fmt: skip
        check_ranks(ranks, layout, device)
        self.ranks, self.folder, self.layout, self.dtype, self.shared = ranks, folder, layout, dtype, shared
        self.name = f"instance {next(_numbers)}"
        self.opened: dict[int, int] = {}  # engines that the ranks hold, and the blocks of each
        self.parties: dict[int, int] = {}  # who these are to those that they borrow of
        self.forgotten: list[int] = []  # engines that nobody has any more
        self._generation = -1
        self._starting = threading.RLock()
        self.loaded: list[Loaded] = []
        self.ready()

    def ready(self) -> None:
        """Have the weights on the ranks, and only the engines that somebody has."""
        with self._starting:  # its engines may have noticed the same loss
            self.ranks.start()
            if self._generation != self.ranks.generation:
                self.loaded = self.ranks.run(load, self.name, self.folder, self.layout, self.dtype, self.shared)
                self._generation = self.ranks.generation
                self.opened.clear()
            while self.forgotten:
                self.drop(self.forgotten.pop())

    def open(self, engine: int, options: EngineOptions, order: Order, house: House | None = None) -> int:
        """Have an engine on the ranks; returns how many blocks it has. In a `house` it lends and borrows, as a new party."""
        with self._starting:
            return self._open(engine, options, order, house)

    def _open(self, engine: int, options: EngineOptions, order: Order, house: House | None) -> int:
        self.ready()
        if engine not in self.opened:
            door = house.door() if house is not None else None
            self.opened[engine] = self.ranks.run(open_engine, self.name, engine, options, order, door)[0]
            self.parties[engine] = door.party if door is not None else -1
        return self.opened[engine]

    def drop(self, engine: int) -> None:
        """Let the ranks forget an engine."""
        if engine in self.opened and self.alive:
            self.ranks.run(close_engine, self.name, engine)
        self.opened.pop(engine, None)

    def close(self) -> None:
        """Let the ranks forget the weights."""
        if self.alive:
            self.ranks.run(unload, self.name)
        self._generation = -1

    @property
    def alive(self) -> bool:
        """Whether its ranks are there, with its weights."""
        return self.ranks.alive and self._generation == self.ranks.generation


def check_ranks(ranks: Ranks, layout: Layout, device: torch.device) -> None:
    """Raise `ValueError` for ranks that cannot hold one replica of this layout, or compute elsewhere."""
    size = layout.world_size // layout.instances
    if ranks.world_size != size:
        each = " for each replica" * (layout.instances > 1)
        raise ValueError(
            f"layout {str(layout)!r} takes {size} ranks{each}, but these are {ranks.world_size}: "
            f"make Ranks({size}), or leave ranks= out"
        )
    if ranks.backend.device_type != device.type:
        raise ValueError(
            f"these ranks compute on {ranks.backend.device_type}, not on {device.type}: "
            f"pass device={ranks.backend.device_type!r}"
        )


def start_pools(layout: Layout, device: str) -> list[Ranks]:
    """Ranks for each replica of a layout, or for all that share experts; together they share the GPUs of this host."""
    size = layout.world_size // layout.instances
    return [Ranks(size, device=device, beside=(n * size, layout.world_size)) for n in range(layout.instances)]


def start_replicas(
    folder: Path, layout: Layout, device: torch.device, dtype: torch.dtype, pools: Sequence[Ranks]
) -> list[Instance]:
    """An instance on each of the `pools`. On a CPU the first one reads the checkpoint, and the others take it from memory.

    Raises `ValueError` for other pools than one of its own for each replica, of the size that the layout gives it.
    """
    for pool in pools:
        check_ranks(pool, layout, device)
    if len({id(pool) for pool in pools}) != layout.instances:
        raise ValueError(
            f"layout {str(layout)!r} has {layout.instances} replicas, each on ranks of its own, but there are {len({id(pool) for pool in pools})}: "
            f"give ranks=[Ranks({layout.world_size // layout.instances}), …], or leave it out"
        )
    return start_alike(folder, replace(layout, dp=1) if layout.instances > 1 else layout, device, dtype, pools)


def start_alike(
    folder: Path, alone: Layout, device: torch.device, dtype: torch.dtype, pools: Sequence[Ranks]
) -> list[Instance]:
    """An instance of the same layout on each of the `pools`."""
    with ThreadPoolExecutor(len(pools)) as together:
        for _ in together.map(Ranks.start, pools):
            pass
        one_host = len({place.node for pool in pools for place in pool.places}) == 1
        shared = share_weights(alone.world_size) if device.type == "cpu" and len(pools) > 1 and one_host else None
        first = Instance(pools[0], folder, alone, device, dtype, shared)
        if shared is not None:
            shared = replace(shared, filled=True) if all(part.shared_bytes for part in first.loaded) else None
        others = list(together.map(lambda pool: Instance(pool, folder, alone, device, dtype, shared), pools[1:]))
    for instance in [first, *others]:
        instance.shared = shared and replace(shared, passing=())  # for ranks that start again
    return [first, *others]


def tallied(instances: Sequence[Instance], clear: bool) -> Tally:
    """What the tokens of all replicas have chosen, layer after layer over their stages."""
    each = []
    for instance in instances:
        instance.ready()
        parts = [
            part for part in instance.ranks.run(choices, instance.name, clear) if part is not None and len(part.pairs)
        ]
        each.append(Tally(*(torch.cat(counts) for counts in zip(*(vars(part).values() for part in parts)))))
    return reduce(add, each)


def check_placements(placements: Sequence[Placement], config: ModelConfig, layout: Layout) -> None:
    """Raise `ValueError` for placements that are not of this model's layers, experts and ranks; none at all are fine."""
    moe = config.moe
    if moe is None or layout.ep == 1:
        raise ValueError(
            f"layout {str(layout)!r} shares out no experts: give one such as 'dp=2,ep=2', and a model that has some"
        )
    if placements and len(placements) != len(moe.layers):
        raise ValueError(
            f"there are {len(placements)} placements, but {len(moe.layers)} layers have experts: give one for each"
        )
    for layer, each in zip(moe.layers, placements):
        if not isinstance(each, Placement) or (len(each.ranks), each.experts) != (layout.ep, moe.experts):
            raise ValueError(f"layer {layer}: {each!r} is no placement of {moe.experts} experts on {layout.ep} ranks")
