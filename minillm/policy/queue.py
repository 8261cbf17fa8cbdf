"""Who waits, and whose turn it is: by a scheduler's order, first come, or sorted by length a window at a time (TetriInfer, Hu et al. 2024,
section 3.3.1).

Plain state machines. What waits is anything; the key says how it is sorted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

Waiting = TypeVar("Waiting")
PROMPT_ORDERS = {
    "fcfs": 0,
    "sjf": 1,
    "ljf": -1,
}  # first come, shortest first, longest first: the sign of a prompt's length


class Queue(Generic[Waiting]):
    """First come, first served, but for those that were put back: they go first."""

    def __init__(self) -> None:
        self._waiting: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def __bool__(self) -> bool:
        return len(self) > 0

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting)

    def push(self, one: Waiting) -> None:
        """One more waits."""
        self._waiting.append(one)

    def put_back(self, one: Waiting) -> None:
        """It has been served in part, and waits again."""
        self._waiting.appendleft(one)

    def look(self, now_s: float) -> None:
        """Time has passed: whose turn it is may be another."""

    @property
    def first(self) -> Waiting:
        """Whose turn it is."""
        return self._waiting[0]

    def pop(self) -> Waiting:
        """Serve it."""
        return self._waiting.popleft()

    def remove(self, one: Waiting) -> None:
        """It waits no longer. Raises `ValueError` for one that does not wait."""
        self._waiting.remove(one)


class Ordered(Queue[Waiting]):
    """The lowest by `key(one, now_s)` first, as of the last `look`; also of those that were put back."""

    def __init__(self, key: Callable[[Waiting, float], Any]) -> None:
        super().__init__()
        self.key = key

    def look(self, now_s: float) -> None:
        self._waiting = deque(sorted(self._waiting, key=lambda one: self.key(one, now_s)))


class Windowed(Queue[Waiting]):
    """Up to `size` of those that wait are sorted by `key` at a time, and all of them are served before the next ones are looked at: nobody
    waits for ever. (TetriInfer's prefill scheduler: by length the shortest first, or the longest.)
    """

    def __init__(self, key: Callable[[Waiting], Any], size: int = 16) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"size={size!r}: give a whole number from 1")
        super().__init__()
        self.key, self.size = key, size
        self._window: deque[Waiting] = deque()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._window)

    def __iter__(self) -> Iterator[Waiting]:
        yield from self._window
        yield from self._waiting

    def put_back(self, one: Waiting) -> None:
        self._window.appendleft(one)

    @property
    def first(self) -> Waiting:
        if not self._window:
            some = [self._waiting.popleft() for _ in range(min(self.size, len(self._waiting)))]
            self._window.extend(sorted(some, key=self.key))
        return self._window[0]

    def pop(self) -> Waiting:
        assert self.first is self._window[0]
        return self._window.popleft()

    def remove(self, one: Waiting) -> None:
        (self._window if one in self._window else self._waiting).remove(one)


def by_length(
    order: str, size: int, length: Callable[[Waiting], int], before: Callable[[Waiting], Any] = lambda one: ()
) -> Windowed[Waiting]:
    """Windows sorted by `before`, and then by length as one of `PROMPT_ORDERS` says."""
    sign = PROMPT_ORDERS[order]
    return Windowed(lambda one: (before(one), sign * length(one)), size)
