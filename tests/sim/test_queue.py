"""The smallest queue: against formulas, and against the simulated engine."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.sim.queue import arrivals, mean_wait, routed_waits, wait_percentile, waits

GAPS = st.lists(st.tuples(st.floats(0, 5), st.integers(1, 9)), min_size=1, max_size=30)


@given(GAPS)
def test_one_replica_is_one_server(asked: list[tuple[float, int]]) -> None:
    """Whatever the router; and the server is never idle while somebody waits."""
    times = [sum(gap for gap, _ in asked[: place + 1]) for place in range(len(asked))]
    services = [length for _, length in asked]
    expected = waits(times, services)
    for router in ("round-robin", "least-tokens", "prefix-aware"):
        assert routed_waits(times, services, router, 1) == pytest.approx(expected)
    ends = [time + wait + service for time, wait, service in zip(times, expected, services)]
    for number, wait in enumerate(expected[1:], 1):
        assert wait == pytest.approx(max(0.0, ends[number - 1] - times[number]))


@given(GAPS, st.integers(1, 4))
def test_more_replicas_never_serve_later_in_turns_of_equal_requests(asked: list[tuple[float, int]], more: int) -> None:
    times = [sum(gap for gap, _ in asked[: place + 1]) for place in range(len(asked))]
    few, many = (routed_waits(times, [3] * len(times), "round-robin", count) for count in (1, 1 + more))
    assert all(b <= a + 1e-9 for a, b in zip(few, many))


def test_a_formula_and_many_requests_agree() -> None:
    for load in (0.3, 0.6, 0.9):
        drawn = waits(arrivals(60_000, load, Random(3)), [1.0] * 60_000)
        assert sum(drawn) / len(drawn) == pytest.approx(mean_wait(load), rel=0.1)
        assert sorted(drawn)[59_400] == pytest.approx(wait_percentile(load, 99), rel=0.15)
    with pytest.raises(ValueError, match=r"load=1.0: give a share from 0 to below 1"):
        mean_wait(1.0)
