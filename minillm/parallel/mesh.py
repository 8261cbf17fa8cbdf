"""`DeviceMesh`: a layout as one of its ranks sees it, with the groups that it talks in."""

from __future__ import annotations

import torch

from minillm.parallel.layout import Layout
from minillm.ranks.comm import Comm
from minillm.ranks.membership import RankContext


class DeviceMesh:
    """Where this rank stands on each axis of the layout, and its line of ranks along each.

    `comm` must be asked for by all ranks of a line together. (torch's `DeviceMesh` is made from the default group of all
    ranks; here a line has a group of its own, so that the others may be gone.)
    """

    def __init__(self, layout: Layout, here: RankContext) -> None:
        self.layout, self.rank = layout, here.rank
        self._here, self._place = here, layout.coordinates(here.rank)

    @property
    def device(self) -> torch.device:
        """Where the rank's tensors live."""
        return self._here.device

    def place(self, axis: str) -> int:
        """Which one of its line this rank is."""
        return self._place[axis]

    def size(self, axis: str) -> int:
        """How many ranks a line along the axis has."""
        return getattr(self.layout, axis)

    def all(self) -> Comm:
        """All ranks of the layout, for what the hosts tell each other."""
        return self._here.comm(tuple(range(self.layout.world_size)), "instance", host=True)

    def comm(self, axis: str, host: bool = False) -> Comm:
        """The collectives of this rank's line along an axis; with `host` they carry tensors in host memory."""
        line = self.layout.along(axis, self.rank)
        return self._here.comm(line, f"{axis} {'-'.join(map(str, line))}{' host' * host}", host=host)
