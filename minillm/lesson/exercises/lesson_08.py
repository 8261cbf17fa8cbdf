"""Exercises of lesson 08: waits in a queue, replicas that keep the wait short, and a router that beats round-robin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from minillm.lesson.exercise import Case, Exercise, Outcome, RuleError
from minillm.policy.router import Router
from minillm.sim.queue import arrivals, mean_wait, routed_waits, waits

TOKEN_MS = 1.0
SLACK = 1.1  # times the course's own P99


def replicas_spec(case: Case) -> list[int]:
    """By trying: one more, until the wait is short enough."""
    rate, service_s, limit_s = case.inputs
    count = 1
    while rate / count * service_s >= 1 or mean_wait(rate / count * service_s) * service_s > limit_s:
        count += 1
    return [count]


def router_of(made: Callable[[int], Any]) -> type[Router]:
    """A learner's router as one of the engine's. Raises `RuleError` for a replica that is not there."""

    class Adapted(Router):
        def __init__(self, replicas: int) -> None:
            super().__init__(replicas)
            self.mine = made(replicas)

        def route(self, request_id: int, prompt: Sequence[int], most_new: int, read: int = 0) -> int:
            self.chosen = self.mine.arrived(request_id, len(prompt) + most_new)
            if type(self.chosen) is not int or not 0 <= self.chosen < self.replicas:
                raise RuleError(
                    f"request {request_id}: arrived returned {self.chosen!r}; return a replica, 0 … {self.replicas - 1}"
                )
            return super().route(request_id, prompt, most_new, read)

        def prefer(self, present: Sequence[int], prompt: Sequence[int]) -> int:
            return self.chosen if self.chosen in present else present[0]

        def ended(self, request_id: int) -> None:
            if request_id in self.under_way:
                self.mine.ended(request_id)
            super().ended(request_id)

    return Adapted


def heavy_tail(count: int, load: float, replicas: int, seed: int) -> tuple[list[float], list[int]]:
    """Times and tokens of Poisson arrivals: 16 to 64 tokens, and one in twelve has 800."""
    random = Random(seed)
    tokens = [800 if random.random() < 1 / 12 else random.randint(16, 64) for _ in range(count)]
    mean = 800 / 12 + 40 * 11 / 12
    return arrivals(count, load * replicas / mean / TOKEN_MS, random), tokens


def longest_waits(case: Case, router: str | type[Router]) -> int:
    """What 99 of 100 requests of a case wait at most, in ms; of a few requests, the longest wait of any."""
    replicas, times, tokens = case.inputs
    found = sorted(routed_waits(times, tokens, router, replicas, TOKEN_MS))
    return round(found[-1 - len(found) // 100])


def _drive_router(made: Callable[[int], Any], case: Case) -> Outcome:
    """Everybody is served; the work is how long they wait."""
    return Outcome([len(case.inputs[1])], longest_waits(case, router_of(made)))


WAITS = Exercise(
    name="08.waits",
    function="waits",
    minutes=5,
    spec=lambda case: list(waits(*case.inputs)),
    drive=lambda function, case: Outcome(list(function(*map(list, case.inputs)))),
    names=tuple(f"request {number} waits" for number in range(9)),
    cases=(
        Case("one request", ([3.0], [2.0])),
        Case("two at once", ([0.0, 0.0], [2.0, 1.0])),
        Case("a long one before two short ones", ([0.0, 1.0, 2.0], [5.0, 1.0, 1.0])),
        Case("a gap in which nobody is there", ([0.0, 1.0, 9.0, 9.5], [3.0, 2.0, 1.0, 1.0])),
    ),
    starter='''\
def waits(times, services):
    """How long each request waits, in the order of arrival, when one server serves them one at a time.

    times[i] is when request i comes, services[i] how long it is served.
    """
    return [0.0 for time in times]  # MEND (about 6 lines)
''',
    solution='''\
def waits(times, services):
    """The server is free when the one before is done, or has been free for a while."""
    result, free = [], 0.0
    for time, service in zip(times, services):
        begin = max(time, free)
        result.append(begin - time)
        free = begin + service
    return result
''',
    hints=(
        "When is the server free for request i? Keep that moment while you go through the list.",
        "begin = max(time, free); the request waits begin - time; then free = begin + service.",
    ),
)

REPLICAS = Exercise(
    name="08.replicas",
    function="replicas",
    minutes=10,
    spec=replicas_spec,
    cases=(
        Case("1 request/s of 0.5 s each, 0.3 s of waiting are fine", (1.0, 0.5, 0.3)),
        Case("10 requests/s of 0.5 s, 1 s", (10.0, 0.5, 1.0)),
        Case("10 requests/s of 0.5 s, 0.05 s", (10.0, 0.5, 0.05)),
        Case("300 requests/s of 0.04 s, 0.02 s", (300.0, 0.04, 0.02)),
    ),
    starter='''\
def replicas(rate, service_s, limit_s):
    """The fewest replicas with which a request waits limit_s at most, on average.

    rate requests come in a second, each is served for service_s seconds, and every replica gets an equal
    share of them at random. The mean wait of M/D/1 is service_s · ρ / (2 (1 − ρ)), and ρ is the share of
    time in which a replica is busy.
    """
    return max(1, round(rate * service_s))  # MEND (about 6 lines)
''',
    solution='''\
def replicas(rate, service_s, limit_s):
    """One more, until the wait is short enough."""
    count = 1
    while True:
        busy = rate / count * service_s
        if busy < 1 and service_s * busy / (2 * (1 - busy)) <= limit_s:
            return count
        count += 1
''',
    hints=(
        "rate * service_s replicas would be busy all the time. What is the wait then? Take one more, and look again.",
        "busy = rate / count * service_s for count = 1, 2, 3 …; stop at the first with busy < 1 and a wait within the limit.",
    ),
)

ROUTER = Exercise(
    name="08.router",
    function="MyRouter",
    minutes=25,
    spec=lambda case: [len(case.inputs[1])],
    drive=_drive_router,
    plain=False,
    target=lambda case: round(SLACK * longest_waits(case, "least-tokens")),
    unit="ms of waiting (99 of 100 requests wait less)",
    names=("requests served",),
    cases=(
        Case("a long request, then three short ones, 2 replicas", (2, (0.0, 1.0, 2.0, 3.0), (100, 10, 10, 10))),
        Case("long and short in turns, 2 replicas", (2, tuple(30.0 * n for n in range(8)), (90, 10) * 4)),
        Case(
            "a long request of long ago, then three at once, 2 replicas",
            (2, (0.0, 1.0, 900.0, 900.0, 900.0), (100, 10, 40, 40, 40)),
        ),
        Case("3,000 requests with a heavy tail, 2 replicas at 70 %", (2, *heavy_tail(3000, 0.7, 2, 1))),
        Case("3,000 requests with a heavy tail, 4 replicas at 80 %", (4, *heavy_tail(3000, 0.8, 4, 2))),
    ),
    starter='''\
class MyRouter:
    """Which replica gets a request. It hears of every arrival and every end, and of nothing else."""

    def __init__(self, replicas):
        self.replicas = replicas
        self.last = -1

    def arrived(self, number, tokens):
        """Request `number` comes, with so many tokens of work. Return its replica: 0 … replicas - 1."""
        self.last = (self.last + 1) % self.replicas  # round-robin. MEND (about 6 lines in all)
        return self.last

    def ended(self, number):
        """Request `number` has been served."""
''',
    solution='''\
class MyRouter:
    """Where the fewest tokens are outstanding."""

    def __init__(self, replicas):
        self.outstanding = [0] * replicas
        self.where = {}

    def arrived(self, number, tokens):
        replica = self.outstanding.index(min(self.outstanding))
        self.outstanding[replica] += tokens
        self.where[number] = replica, tokens
        return replica

    def ended(self, number):
        replica, tokens = self.where.pop(number)
        self.outstanding[replica] -= tokens
''',
    hints=(
        "What would you like to know of each replica when a request comes? Keep it yourself: add at an arrival, subtract at an end.",
        "A long request is worth many short ones: count outstanding tokens, not requests. Remember for each number its replica and tokens.",
    ),
)

EXERCISES = (WAITS, REPLICAS, ROUTER)
