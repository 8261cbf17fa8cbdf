"""Replicas that serve one request at a time, in the order of arrival: the smallest model of a queue. No torch.

The routers are those of the engine. Times are in any unit, as long as it is one.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import cache
from random import Random

import numpy as np

from minillm.policy.router import Router, make_router


def waits(times: Sequence[float], services: Sequence[float]) -> list[float]:
    """How long each request waits for one server: max(0, wait before + service before - gap) (Lindley 1952)."""
    found, wait = [], 0.0
    for number, now in enumerate(times):
        if number:
            wait = max(0.0, wait + services[number - 1] - (now - times[number - 1]))
        found.append(wait)
    return found


def mean_wait(load: float) -> float:
    """The mean wait in service times, Poisson arrivals and one service time for all: M/D/1, ρ / 2 (1 - ρ).

    `load` is ρ, the share of time in which the server is busy (Pollaczek 1930). Raises `ValueError` from 1 on: the queue
    grows for ever.
    """
    if not 0 <= load < 1:
        raise ValueError(f"load={load!r}: give a share from 0 to below 1")
    return load / 2 / (1 - load)


@cache
def wait_percentile(load: float, percent: float, draws: int = 400_000, seed: int = 0) -> float:
    """What `percent` of requests wait at most in such a queue, in service times, from as many that are drawn."""
    mean_wait(load)
    steps = 1.0 - np.random.default_rng(seed).exponential(1 / load, draws)
    sums = np.cumsum(steps)
    waited = sums - np.minimum(np.minimum.accumulate(sums), 0.0)  # Lindley's recursion, all at once
    return float(np.percentile(waited, percent))


def arrivals(count: int, rate: float, random: Random) -> list[float]:
    """Times of `count` Poisson arrivals, `rate` of them in a unit of time."""
    times, now = [], 0.0
    for _ in range(count):
        now += random.expovariate(rate)
        times.append(now)
    return times


def routed_waits(
    times: Sequence[float], tokens: Sequence[int], router: str | type[Router], replicas: int, token_time: float = 1.0
) -> list[float]:
    """How long each request waits at the replica where the router sends it; its service is its tokens' time."""
    routes, free = make_router(router, replicas), [0.0] * replicas
    ends: list[tuple[float, int]] = []
    found = []
    for number, (now, length) in enumerate(zip(times, tokens)):
        while ends and ends[0][0] <= now:
            routes.ended(heapq.heappop(ends)[1])
        replica = routes.route(number, range(length), 0)
        found.append(max(0.0, free[replica] - now))
        free[replica] = max(free[replica], now) + length * token_time
        heapq.heappush(ends, (free[replica], number))
    return found
