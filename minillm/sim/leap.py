"""Decode steps that are taken in one go, because nothing can happen in them but that contexts grow."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Leap:
    """Decode steps that are taken in one go: so many, from a second on; the first takes `base_s` and `slope_s` a token of context."""

    began_s: float
    steps: int
    base_s: float
    slope_s: float
    batch: int
    context: int

    def run_s(self, steps: int) -> float:
        """Seconds of its first steps, each reading a token more of every request."""
        read = steps * (self.context + self.batch) + self.batch * steps * (steps - 1) // 2
        return steps * self.base_s + self.slope_s * read

    def step_under_way(self, now_s: float) -> int:
        """The number of its step that ends at `now_s` or next."""
        low, high = 1, self.steps
        while low < high:
            middle = (low + high) // 2
            if self.began_s + self.run_s(middle) >= now_s:
                high = middle
            else:
                low = middle + 1
        return low
