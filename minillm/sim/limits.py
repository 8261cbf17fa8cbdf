"""What a simulated machine may take, and who hears what happens on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from minillm.sim.task import Task

if TYPE_CHECKING:
    from minillm.sim.machine import Machine


@dataclass(frozen=True)
class Limits:
    """`cache_tokens` fit its KV cache; a step takes at most `max_running` requests and `max_step_tokens` tokens.

    Switches: `chunked` cuts prompts to the step's budget; `apart` reads prompts in steps of their own, first of all (vLLM before
    chunked prefill; off: decodes go along); `reserve` keeps room for a request's longest length before it starts (off: for what it has, and
    the last one is put back when room runs out).
    """

    cache_tokens: int
    max_running: int = 256
    max_step_tokens: int = 2048
    chunked: bool = False
    apart: bool = False
    reserve: bool = False

    def __post_init__(self) -> None:
        for name in ("cache_tokens", "max_running", "max_step_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number from 1")


class Owner(Protocol):
    """Who hears what happens on a machine."""

    def started(self, machine: Machine, task: Task) -> None: ...

    def first(self, machine: Machine, task: Task) -> None: ...

    def finished(self, machine: Machine, task: Task) -> None: ...

    def has_room(self, machine: Machine, task: Task) -> None: ...

    def idle(self, machine: Machine) -> None: ...

    def lendable(self, machine: Machine) -> int: ...

    def short(self, machine: Machine, tokens: int) -> None: ...

    def away_s(self, machine: Machine) -> float: ...
