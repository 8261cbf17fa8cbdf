"""How fast messages go between these ranks: a `Link` for the replay clock and for plans."""

from __future__ import annotations

import statistics
import time

import torch

from minillm.hardware.devices import Link
from minillm.ranks.membership import context
from minillm.ranks.pool import Ranks

ROUNDS = 50
LARGE_BYTES = 4 * 2**20


def measure_link(ranks: Ranks) -> Link:
    """Latency and bandwidth from rank 0 to rank 1, by messages that go there and back. Raises `ValueError` for one rank."""
    if ranks.world_size < 2:
        raise ValueError("a link has two ends: make Ranks(2) or more")
    latency_s, bytes_per_s = ranks.run(_ping)[0]
    return Link(f"{ranks.backend.describe()}, measured", bytes_per_s, latency_s, "messages there and back")


def _ping() -> tuple[float, float] | None:
    """On ranks 0 and 1: half the time of the median message there and back, small and large."""
    comm = context().comm()
    if comm.rank > 1:
        return None
    small = _one_way_s(torch.zeros(1, device=context().device))
    large = _one_way_s(torch.zeros(LARGE_BYTES // 4, device=context().device))
    return small, LARGE_BYTES / max(large - small, 1e-9)


def _one_way_s(message: torch.Tensor) -> float:
    comm, seconds = context().comm(), []
    for _ in range(ROUNDS):
        began = time.monotonic()
        for turn in (0, 1):
            if comm.rank == turn:
                comm.send(message, 1 - turn)
            else:
                comm.recv(message, 1 - comm.rank)
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds) / 2
