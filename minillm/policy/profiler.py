"""Notices that a load is not what a plan was made for any more (DistServe, Zhong et al. 2024, section 4.3: replanning). A plain state machine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """What a load is like: requests per second, and mean tokens in and out."""

    rate: float
    prompt: float
    new: float

    def far(self, other: Profile, factor: float) -> bool:
        """Whether one of the three is more than so many times the other's."""
        pairs = ((self.rate, other.rate), (self.prompt, other.prompt), (self.new, other.new))
        return any(max(one, two) > factor * min(one, two) for one, two in pairs)


class Profiler:
    """Looks at the last `window` requests; what it saw first is what the plan is for. Raises `ValueError` for settings that cannot be."""

    def __init__(self, window: int = 100, factor: float = 1.5) -> None:
        if not isinstance(window, int) or isinstance(window, bool) or window < 2:
            raise ValueError(f"window={window!r}: give a whole number of requests from 2")
        if not factor > 1:
            raise ValueError(f"factor={factor!r}: give a number above 1")
        self.window, self.factor = window, factor
        self.seen: deque[tuple[float, int, int]] = deque(maxlen=window)
        self.planned: Profile | None = None

    def see(self, now_s: float, prompt: int, new: int) -> bool:
        """A request came; whether it is time for a new plan. What the window holds is then what the plan is for."""
        self.seen.append((now_s, prompt, new))
        if len(self.seen) < self.window:
            return False
        now = self.profile
        if self.planned is not None and not now.far(self.planned, self.factor):
            return False
        self.planned = now
        return True

    @property
    def profile(self) -> Profile:
        """Of the requests in the window."""
        times, prompts, news = zip(*self.seen)
        return Profile(
            (len(times) - 1) / max(1e-9, times[-1] - times[0]), sum(prompts) / len(prompts), sum(news) / len(news)
        )
