"""When a decode instance lets a request in whose length nobody knows: three gates, and a predictor that is right so often (TetriInfer, Hu et
al. 2024, section 3.4; vLLM's is the greedy one).

Gates are plain functions of what is free and who runs. They only say when to begin: room is taken token by token, and a request that
outgrows it is put back all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

HEAVY = 128  # a request that gives more tokens is a heavy one


@dataclass(frozen=True)
class Running:
    """A request that decodes: its tokens in the cache, and how many more it is thought to give."""

    tokens: int
    to_come: int


Gate = Callable[[int, int, int, Sequence[Running]], bool]  # (tokens, to come, free, running) -> let it in?


def greedy(tokens: int, to_come: int, free: int, running: Sequence[Running]) -> bool:
    """What it has now fits what is free now, and a token more."""
    return tokens + 1 <= free


def reserve_static(tokens: int, to_come: int, free: int, running: Sequence[Running]) -> bool:
    """All that it is thought to become fits what is free now; alone it may start in any case."""
    return tokens + (max(1, to_come) if running else 1) <= free


def reserve_dynamic(tokens: int, to_come: int, free: int, running: Sequence[Running]) -> bool:
    """All that it is thought to become fits what will be free when the first of those that run is thought to end: until then each of them
    takes a token a step, and that one then gives back all it has.
    """
    if not running:
        return tokens + 1 <= free
    first = min(running, key=lambda each: each.to_come)
    steps = max(0, first.to_come)
    then = free - steps * len(running) + first.tokens + steps
    return tokens + 1 <= free and tokens + max(1, to_come) <= then


GATES: dict[str, Gate] = {
    "greedy": greedy,
    "reserve-static": reserve_static,
    "reserve-dynamic": reserve_dynamic,
}


@dataclass(frozen=True)
class Predictor:
    """Says in which bucket of `width` tokens an answer's length lies, and is right with a probability of `accuracy`; else it names one of the
    `buckets` others, each as likely. (The paper's: 100, 200, 400 tokens wide, right in 58.9, 74.9, 85 of 100 cases.)
    """

    width: int
    accuracy: float
    buckets: int = 8

    def __post_init__(self) -> None:
        for name, least in (("width", 1), ("buckets", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give a whole number from {least}")
        if isinstance(self.accuracy, bool) or not isinstance(self.accuracy, int | float) or not 0 <= self.accuracy <= 1:
            raise ValueError(f"accuracy={self.accuracy!r}: give a share from 0 to 1")

    def lower_end(self, length: int, random: Random) -> int:
        """The lower end of the bucket that it names for an answer of this length."""
        bucket = min(length // self.width, self.buckets - 1)
        if random.random() >= self.accuracy:
            bucket = random.choice([each for each in range(self.buckets) if each != bucket])
        return bucket * self.width
