"""Splitwise's cluster-level scheduler: a pool of machines for prompts, one for tokens, and one for both that grows and shrinks (Patel et al.
2024, section IV.A; thresholds as in the released simulator).

A plain state machine. Who reads a prompt and who goes on with it is chosen together, so that the cache can leave while it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from minillm.policy.handing import Role

MOST_PENDING = 8192  # prompt tokens that may wait at a machine before others are asked


@dataclass(frozen=True)
class Placed:
    """A request: who reads its prompt, who goes on, its prompt's tokens, and room for all of it."""

    prompt_at: int
    token_at: int
    prompt: int
    room: int


class Pools:
    """Machines with a home in one of two pools, and room for so many tokens of KV cache each. Raises `ValueError` when a pool is empty."""

    def __init__(self, homes: Sequence[Role], cache_tokens: Sequence[int], most_pending: int = MOST_PENDING) -> None:
        for role in Role:
            if role not in homes:
                raise ValueError(f"there is no machine for {role.value}: give at least one")
        self.homes, self.cache_tokens, self.most_pending = list(homes), list(cache_tokens), most_pending
        self.mixed: set[int] = set()
        self.pending = [0] * len(self.homes)  # prompt tokens not read yet, and one for each request that decodes
        self.taken = [0] * len(self.homes)  # room for requests
        self.placed: dict[int, Placed] = {}
        self._members = {role: [number for number, home in enumerate(self.homes) if home is role] for role in Role}

    def pool(self, role: Role) -> list[int]:
        """The machines of a pool that are not in the mixed one."""
        return (
            [number for number in self._members[role] if number not in self.mixed]
            if self.mixed
            else self._members[role]
        )

    def place(self, request_id: int, prompt: int, new: int) -> tuple[int, int]:
        """A request is there: who reads its prompt, and who goes on."""
        room = prompt + new
        prompt_at = self._for_prompt(prompt)
        token_at = self._for_tokens(room)
        if prompt_at is None:
            prompt_at = self._borrow(Role.DECODE, self.pending)
        if token_at is None:
            token_at = self._borrow(Role.PREFILL, self.taken)
        if prompt_at is None or token_at is None:
            prompt_at = token_at = min(range(len(self.homes)), key=self.pending.__getitem__)
        self.placed[request_id] = Placed(prompt_at, token_at, prompt, room)
        self.pending[prompt_at] += prompt
        self.pending[token_at] += 1
        self.taken[token_at] += room
        if prompt_at != token_at:
            self.taken[prompt_at] += prompt
        return prompt_at, token_at

    def read(self, request_id: int) -> None:
        """Its prompt has been read."""
        self.pending[self.placed[request_id].prompt_at] -= self.placed[request_id].prompt

    def moved(self, request_id: int) -> None:
        """Its cache is where it goes on."""
        self.taken[self.placed[request_id].prompt_at] -= self.placed[request_id].prompt

    def ended(self, request_id: int) -> None:
        """It has all its tokens."""
        placed = self.placed.pop(request_id)
        self.pending[placed.token_at] -= 1
        self.taken[placed.token_at] -= placed.room

    def idle(self, machine: int) -> None:
        """A machine has nothing to do: it goes home."""
        self.mixed.discard(machine)

    def _for_prompt(self, prompt: int) -> int | None:
        """Where the fewest tokens wait, if that is not too many."""
        fits = lambda number: not self.pending[number] or self.pending[number] + prompt <= self.most_pending  # noqa: E731
        return self._least((self.pool(Role.PREFILL), self.mixed), self.pending, fits)

    def _for_tokens(self, room: int) -> int | None:
        """Where the least is taken, if there is room."""
        fits = lambda number: self.taken[number] + room < self.cache_tokens[number]  # noqa: E731
        return self._least((self.pool(Role.DECODE), self.mixed), self.taken, fits)

    def _least(self, pools: Sequence[Collection[int]], by: Sequence[int], fits: Callable[[int], bool]) -> int | None:
        """The least busy one of the first pool, or else of the next, if it fits."""
        for pool in pools:
            least = min(pool, key=by.__getitem__, default=None)
            if least is not None and fits(least):
                return least
        return None

    def _borrow(self, role: Role, by: Sequence[int]) -> int | None:
        """Take a machine of the other pool into the mixed one."""
        borrowed = min(self.pool(role), key=by.__getitem__, default=None)
        if borrowed is not None:
            self.mixed.add(borrowed)
        return borrowed
