"""A request in a simulation: what it wants, where it stands, and when things happened to it."""

from __future__ import annotations

from dataclasses import dataclass

from minillm.trace.workload import Arrival

NEVER = float("nan")


@dataclass(slots=True, eq=False)
class Task:
    """One request: `prompt` tokens in, `new` tokens out; `given` of them so far. `read` of its sequence is in the cache of the machine that
    has it. Times are seconds of the simulation.
    """

    request_id: int
    arrival_s: float
    prompt: int
    new: int
    given: int = 0
    read: int = 0
    handed: bool = False  # it goes on at another machine after its first token
    predicted: int = 0  # tokens that it is thought to give
    started_s: float = NEVER
    first_s: float = NEVER
    came_s: float = NEVER  # its cache was where it goes on
    finished_s: float = NEVER
    longest_gap_s: float = 0.0
    preemptions: int = 0
    token_s: float = NEVER  # its last token, when its prompt was read, or it was put back

    @classmethod
    def of(cls, request_id: int, arrival: Arrival) -> Task:
        """The request that an arrival stands for."""
        return cls(request_id, arrival.time_s, arrival.prompt_tokens, arrival.new_tokens, predicted=arrival.new_tokens)

    @property
    def tokens(self) -> int:
        """Its sequence so far: what must be in a cache for it to go on."""
        return self.prompt + self.given

    @property
    def longest(self) -> int:
        """Tokens of it that will be in the cache where its prompt is read, at most: the last one is not put there."""
        return self.prompt if self.handed else self.goes_on

    @property
    def goes_on(self) -> int:
        """And where it decodes."""
        return self.prompt + self.new - 1

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token."""
        return self.first_s - self.arrival_s

    @property
    def e2e_s(self) -> float:
        """From arrival to the last token."""
        return self.finished_s - self.arrival_s

    @property
    def queue_s(self) -> float:
        """From arrival to the step that reads its prompt."""
        return self.started_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first; 0 for a single one (DistServe, section 2)."""
        return (self.finished_s - self.first_s) / (self.new - 1) if self.new > 1 else 0.0
