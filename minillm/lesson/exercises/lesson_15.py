"""Exercises of lesson 15: machines for the fewest watts, percentiles over an idle machine's, and a router that beats the shortest queue."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random
from typing import Any

from minillm.lesson.exercise import Case, Exercise, Outcome, RuleError
from minillm.policy.router import Router, ShortestQueue
from minillm.sim.cluster import Kind, Together
from minillm.sim.costs import Measured
from minillm.sim.machine import Limits
from minillm.sim.splitwise import BLOOM, MAX_BATCH, MAX_TOKENS
from minillm.trace.workload import PUBLISHED, Arrival

SPEEDS = {"A100": 1.0, "H100": 2.1}  # of prompts of 2,048 tokens, BLOOM-176B
BETTER = 0.85  # of the shortest queue's P90
LOADS = 6  # of a case, each of its own seed


def provision_spec(case: Case) -> list[int]:
    """Whole machines that keep up; of kinds for tokens the one that draws least."""
    rate, reads, kinds = case.inputs
    counts = [math.ceil(rate / gives) for gives, _ in kinds]
    kind = min(range(len(kinds)), key=lambda n: counts[n] * kinds[n][1])
    return [math.ceil(rate / reads), kind, counts[kind]]


def missed_spec(case: Case) -> list[Any]:
    """Nearest rank: the smallest value that so many of a hundred lie at or below."""
    times, alone, limits = case.inputs
    slow = sorted(time / one for time, one in zip(times, alone))
    return [percent for percent, limit in limits.items() if slow[math.ceil(percent / 100 * len(slow)) - 1] > limit]


def load(seed: int, rate: float, seconds: float = 40.0) -> tuple[Arrival, ...]:
    """Conversations of half a minute and more, with the published lengths."""
    random, now_s, arrivals = Random(seed), 0.0, []
    while (now_s := now_s + random.expovariate(rate)) < seconds:
        arrivals.append(Arrival(now_s, *PUBLISHED["azure-conversation"].draw(random)))
    return tuple(arrivals)


def loads(seed: int, rate: float) -> tuple[tuple[Arrival, ...], ...]:
    """Several of them."""
    return tuple(load(100 * seed + number, rate) for number in range(LOADS))


def router_of(made: Callable[[list[float]], Any], speeds: list[float]) -> Router:
    """A learner's router as one of the engine's. Raises `RuleError` for a machine that is not there."""

    class Adapted(Router):
        def __init__(self) -> None:
            super().__init__(len(speeds))
            self.mine = made(list(speeds))
            self.reading: set[int] = set()

        def route(self, request_id: int, prompt: Sequence[int], most_new: int, read: int = 0) -> int:
            self.chosen = self.mine.arrived(request_id, len(prompt))
            if type(self.chosen) is not int or not 0 <= self.chosen < self.replicas:
                raise RuleError(
                    f"request {request_id}: arrived returned {self.chosen!r}; return a machine, 0 … {self.replicas - 1}"
                )
            self.reading.add(request_id)
            return super().route(request_id, prompt, most_new, read)

        def prefer(self, present: Sequence[int], prompt: Sequence[int]) -> int:
            return self.chosen

        def gave(self, request_id: int) -> None:
            if request_id in self.reading:
                self.reading.remove(request_id)
                self.mine.read(request_id)
            super().gave(request_id)

        def ended(self, request_id: int) -> None:
            if request_id in self.reading:
                self.gave(request_id)
            super().ended(request_id)

    return Adapted()


def longest_ttft(case: Case, make: Callable[[], Router]) -> int:
    """What 90 of 100 requests wait for their first token at most, in ms, mean over the case's loads; of a few requests, the longest."""
    gpus, loads = case.inputs
    limits = Limits(BLOOM.cache_tokens, MAX_BATCH, MAX_TOKENS)
    kinds = [Kind(Measured.published(BLOOM.name, gpu), limits, 8) for gpu in gpus]
    each = [sorted(task.ttft_s for task in Together(kinds, make()).serve(arrivals)) for arrivals in loads]
    return round(1e3 * sum(found[-1 - len(found) // 10] for found in each) / len(each))


@lru_cache(32)
def _shortest(gpus: tuple[str, ...], loads: tuple[tuple[Arrival, ...], ...]) -> int:
    return longest_ttft(Case("", (gpus, loads)), lambda: ShortestQueue(len(gpus)))


def _target(case: Case) -> int:
    shortest = _shortest(*case.inputs)
    return round(BETTER * shortest) if len(case.inputs[1]) > 1 else shortest


def _drive_router(made: Callable[..., Any], case: Case) -> Outcome:
    """Everybody is served; the work is how long they wait."""
    speeds = [SPEEDS[gpu] for gpu in case.inputs[0]]
    return Outcome(_served(case), longest_ttft(case, lambda: router_of(made, speeds)))


def _served(case: Case) -> list[int]:
    return [sum(map(len, case.inputs[1]))]


PROVISION = Exercise(
    name="15.provision",
    function="provision",
    minutes=5,
    spec=provision_spec,
    drive=lambda function, case: Outcome(list(function(*case.inputs))),
    names=("machines that read", "kind of those that decode", "machines that decode"),
    cases=(
        Case("one kind", (10, 5, [(5, 44)])),
        Case("whole machines", (11, 5, [(4, 44)])),
        Case("the slower kind draws less", (20, 5, [(10, 44), (8, 24)])),
        Case("the faster kind draws less", (20, 5, [(10, 44), (3, 24)])),
        Case("rounding decides", (8, 2, [(8, 44), (7, 24)])),
        Case("as many watts", (10, 5, [(10, 40), (5, 20)])),
        Case("fractions of a request", (0.5, 0.2, [(0.3, 44), (0.2, 25)])),
        Case("the third kind draws least", (20, 5, [(10, 44), (3, 24), (9, 20)])),
        Case("as many watts, fewer machines", (10, 5, [(5, 20), (10, 40)])),
    ),
    starter='''\
def provision(rate, reads, kinds):
    """[machines that read, kind of those that decode, machines that decode], for the fewest watts.

    rate requests/s come; a machine that reads takes `reads` of them in a second. kinds[n] =
    (requests/s that one machine of kind n decodes, its watts). Only whole machines; of equals the
    first kind.
    """
    return [round(rate / reads), 0, round(rate / kinds[0][0])]  # MEND (about 3 lines)
''',
    solution='''\
def provision(rate, reads, kinds):
    """As many as keep up, of the kind that draws least then."""
    counts = [math.ceil(rate / gives) for gives, _ in kinds]
    kind = min(range(len(kinds)), key=lambda n: counts[n] * kinds[n][1])
    return [math.ceil(rate / reads), kind, counts[kind]]
''',
    hints=(
        "Half a machine serves nobody: round up. Then compare watts, not machines.",
        "counts = [math.ceil(rate / gives) for gives, _ in kinds]; take the n with the least counts[n] * kinds[n][1].",
    ),
)

MISSED = Exercise(
    name="15.missed",
    function="missed",
    minutes=10,
    spec=missed_spec,
    drive=lambda function, case: Outcome(list(function(*case.inputs))),
    names=tuple(f"entry {n} of your list" for n in range(1, 4)),
    cases=(
        Case("one request, in time", ([1.0], [1.0], {50: 2})),
        Case("one request, late", ([3.0], [1.0], {50: 2})),
        Case("at the limit is kept", ([2.0], [1.0], {50: 2})),
        Case("one in ten is late", ([1.0] * 9 + [9.0], [1.0] * 10, {50: 2, 90: 3, 99: 6})),
        Case("two in ten are late", ([1.0] * 8 + [9.0] * 2, [1.0] * 10, {50: 2, 90: 3, 99: 6})),
        Case("long prompts may take long", ([8.0, 1.0], [8.0, 1.0], {50: 2, 90: 3})),
        Case("a short one waits behind a long one", ([8.0, 8.5], [8.0, 0.5], {50: 2, 90: 3})),
        Case("unsorted", ([5.0, 1.0, 1.0, 1.0], [1.0] * 4, {50: 2, 90: 3, 99: 6})),
        Case("an even half", ([1.0, 1.0, 4.0, 4.0], [1.0] * 4, {50: 2})),
        Case("the long one is quick, the short one is not", ([8.0, 1.0], [1.0, 8.0], {50: 2, 90: 3})),
        Case("three requests, half of them", ([1.0, 4.0, 4.0], [1.0] * 3, {50: 2, 90: 5})),
        Case("six requests, 90 of 100", ([1.0] * 5 + [4.0], [1.0] * 6, {90: 3})),
        Case("one in 200 is late", ([1.0] * 199 + [9.0], [1.0] * 200, {99: 6})),
        Case("limits in another order", ([9.0, 9.0], [1.0, 1.0], {99: 6, 50: 2})),
    ),
    starter='''\
def missed(times, alone, limits):
    """Which percentiles are missed, in the order of `limits`, such as {50: 2, 90: 3, 99: 6}.

    times[i] is request i's time, alone[i] what an idle machine takes for it. At percentile 90 the
    slow-down (time over alone) that 90 of 100 requests lie at or below (nearest rank) may be 3 at
    most.
    """
    return [percent for percent, limit in limits.items() if max(times) > limit]  # MEND (about 4 lines)
''',
    solution='''\
def missed(times, alone, limits):
    """Sort slow-downs, and look at the ranks."""
    slow = sorted(time / one for time, one in zip(times, alone))
    return [p for p, limit in limits.items() if slow[math.ceil(p / 100 * len(slow)) - 1] > limit]
''',
    hints=(
        "A request's slow-down is its time over its own `alone`. Only then sort.",
        "Of n sorted slow-downs the p-th percentile by nearest rank is number ceil(p / 100 · n), counted from 1.",
    ),
)

ROUTER = Exercise(
    name="15.router",
    function="MyRouter",
    minutes=25,
    spec=_served,
    drive=_drive_router,
    target=_target,
    unit="ms until the first token (90 of 100 requests)",
    plain=False,
    names=("requests served",),
    cases=(
        Case("one prompt, an idle A100 and an idle H100", (("A100", "H100"), ((Arrival(0.0, 2000, 2),),))),
        Case("three at once, A100 and H100", (("A100", "H100"), ((Arrival(0.0, 2000, 2),) * 3,))),
        Case("conversations, 2 A100 and 2 H100", (("A100", "A100", "H100", "H100"), loads(1, 2.5))),
        Case("conversations, 3 A100 and 1 H100", (("A100", "A100", "A100", "H100"), loads(2, 2.0))),
        Case("a crowd at once, A100 and H100", (("A100", "H100"), tuple((Arrival(0.0, tokens, 2),) * 16 for tokens in (1500, 2000)))),
        Case("a quiet hour, 2 A100 and 2 H100", (("H100", "A100", "H100", "A100"), loads(3, 1.5))),
    ),
    starter='''\
class MyRouter:
    """Which machine gets a request: this one has the shortest queue, in prompt tokens (Splitwise's
    JSQ).
    """

    def __init__(self, speeds):
        """speeds[n]: how fast machine n reads prompts, an A100 being 1."""
        self.speeds = speeds
        self.pending = [0] * len(speeds)  # prompt tokens that are not read yet
        self.where = {}

    def arrived(self, number, prompt):
        """Request `number` comes, with so many prompt tokens. Return its machine."""
        machine = self.pending.index(min(self.pending))  # MEND (about 3 lines)
        self.pending[machine] += prompt
        self.where[number] = machine, prompt
        return machine

    def read(self, number):
        """Its prompt has been read."""
        machine, prompt = self.where.pop(number)
        self.pending[machine] -= prompt
''',
    solution='''\
class MyRouter:
    """Where the prompt would be read soonest: what waits there and the prompt itself, over the
    machine's speed.
    """

    def __init__(self, speeds):
        self.speeds = speeds
        self.pending = [0] * len(speeds)
        self.where = {}

    def arrived(self, number, prompt):
        soon = [(waits + prompt) / speed for waits, speed in zip(self.pending, self.speeds)]
        machine = soon.index(min(soon))
        self.pending[machine] += prompt
        self.where[number] = machine, prompt
        return machine

    def read(self, number):
        machine, prompt = self.where.pop(number)
        self.pending[machine] -= prompt
''',
    hints=(
        "A queue twice as long before a machine twice as fast is not longer. What is it that users wait for: tokens, or seconds?",
        "Estimate when the prompt would be read on each machine: (pending + prompt) / speed, and take the least.",
    ),
)  # fmt: skip

EXERCISES = (PROVISION, MISSED, ROUTER)
