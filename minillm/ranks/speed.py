"""How fast messages go between these ranks: a `Link` for the replay clock and for plans."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from minillm.hardware.devices import Link
from minillm.ranks.membership import context
from minillm.ranks.pool import Ranks

ROUNDS = 50
LARGE_BYTES = 4 * 2**20
RING_SIZES = (1024, 2304, 36_864, 147_456)


def measure_link(ranks: Ranks) -> Link:
    """Latency and bandwidth from rank 0 to rank 1, by messages that go there and back. Raises `ValueError` for one rank."""
    if ranks.world_size < 2:
        raise ValueError("a link has two ends: make Ranks(2) or more")
    latency_s, bytes_per_s = ranks.run(_ping)[0]
    return Link(f"{ranks.backend.describe()}, measured", bytes_per_s, latency_s, "messages there and back")


def measure_all_reduce(ranks: Ranks, sizes: Sequence[int], rounds: int = 40) -> dict[int, float]:
    """Median seconds of all-reduces of so many bytes (multiples of 4), over all ranks."""
    return ranks.run(_all_reduces, list(sizes), rounds)[0]


def fit_link(name: str, seconds: Mapping[int, float]) -> Link:
    """The straight line α + β · bytes through measured seconds by bytes, with the least relative errors; none below 0.

    Raises `ValueError` for fewer than two sizes.
    """
    if len(seconds) < 2:
        raise ValueError(f"a line needs two points, and there are {len(seconds)} sizes")
    rows = torch.tensor([[1.0, size] for size in seconds], dtype=torch.float64)
    values = torch.tensor(list(seconds.values()), dtype=torch.float64)
    alpha, beta = (
        torch.linalg.lstsq(rows / values[:, None], torch.ones(len(values), 1, dtype=torch.float64))
        .solution[:, 0]
        .tolist()
    )
    return Link(name, 1 / max(beta, 1e-15), max(alpha, 0.0), "fitted to measured collectives")


def measure_ring(ranks: Ranks) -> Link:
    """The link over which a ring's all-reduce takes what theirs takes, whatever carries it: for `replay`, which knows rings.

    Raises `ValueError` for one rank.
    """
    count = ranks.world_size
    if count < 2:
        raise ValueError("a ring has two ranks at least: make Ranks(2) or more")
    fit = fit_link("all-reduces as measured here", measure_all_reduce(ranks, RING_SIZES))
    steps = 2 * (count - 1)
    return replace(fit, latency_s=fit.latency_s / steps, bytes_per_s=fit.bytes_per_s * steps / count)


def _all_reduces(sizes: list[int], rounds: int) -> dict[int, float]:
    """On every rank: the median of some rounds for each size, after a few that are not counted."""
    here, comm = context(), context().comm()
    messages = {size: torch.zeros(size // 4, device=here.device) for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds + 5):
        for size, message in messages.items():  # in turns: a slow moment hits all sizes alike
            began = time.monotonic()
            comm.all_reduce(message)
            seconds[size].append(time.monotonic() - began)
    return {size: statistics.median(each[5:]) for size, each in seconds.items()}


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
