"""Machines that lend: all is given back, nothing is taken twice, and it pays where requests are unlike."""

from __future__ import annotations

from random import Random

import pytest
from helpers import EXAMPLES
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.hardware.devices import Link
from minillm.hardware.profiles import Fit
from minillm.policy.router import LeastTokens, RoundRobin
from minillm.sim.cluster import Cluster, Kind, Together
from minillm.sim.costs import Fitted
from minillm.sim.lending import Lending
from minillm.sim.machine import Limits, Machine
from minillm.trace.workload import Arrival

COSTS = Fitted(Fit((5.0, 0.1, 0.0), (10.0, 0.001, 0.1), (10.0, 0.001, 0.1)))
WIRE = Link("wire", 1e9, 1e-5, "")
WORK = st.lists(
    st.builds(Arrival, st.floats(0, 2).map(lambda at: round(at, 3)), st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=20
)  # fmt: skip


class Checked(Lending):
    """Looks at every loan that nobody gives what it does not have."""

    def _lend(self, creditor: Machine, debtor: Machine, tokens: int) -> None:
        super()._lend(creditor, debtor, tokens)
        assert creditor.idle_tokens >= 0 and creditor is not debtor and tokens > 0
        assert sum(machine.borrowed for machine in self.machines) == sum(machine.lent for machine in self.machines)


@settings(deadline=None, max_examples=EXAMPLES)
@given(WORK, st.integers(2, 4), st.sampled_from([125, 200, 400]), st.integers(2, 8), st.booleans())
def test_all_is_served_and_given_back(work: list, count: int, room: int, running: int, chunked: bool) -> None:
    kind = Kind(COSTS, Limits(room, running, 64, chunked=chunked))
    cluster = Checked([kind] * count, LeastTokens(count), WIRE, 4, 1e3)
    for task in cluster.serve(work):
        assert task.given == task.new
    for machine in cluster.machines:
        assert machine.drained and machine.used == machine.borrowed == machine.lent == 0
    assert not cluster.debts


def test_a_request_longer_than_a_machine_is_served() -> None:
    kind = Kind(COSTS, Limits(500, 8, 2048))
    long = [Arrival(0.0, 700, 40)]
    (task,) = Lending([kind] * 2, RoundRobin(2), WIRE, 4, 1e3).serve(long)
    assert task.given == 40
    with pytest.raises(ValueError, match="needs 739 tokens of KV cache, but machine 0 has room for 500"):
        Together([kind] * 2, RoundRobin(2)).serve(long)


def rate(cluster: Cluster, spread: float) -> float:
    """Tokens per second of two kinds of requests, each for its own machine: answers differ by `spread` from their mean."""
    random = Random(1)
    work = [
        Arrival(0.0, 100, round(300 * (1 + spread if n % 2 else 1 - spread)) + random.randrange(5)) for n in range(48)
    ]
    tasks = cluster.serve(work)
    return sum(task.new for task in tasks) / max(task.finished_s for task in tasks)


def test_it_gains_more_the_more_unlike_requests_are() -> None:
    kind = Kind(COSTS, Limits(2600, 64, 2048))
    gains = [
        rate(Lending([kind] * 2, RoundRobin(2), WIRE, 4, 1e3), spread)
        / rate(Together([kind] * 2, RoundRobin(2)), spread)
        for spread in (0.0, 0.8)
    ]
    assert gains[1] > 1.1 and gains[1] > gains[0], gains
