"""Splitwise's cluster-level scheduler: a pool of machines for prompts, one for tokens, and one for both that grows and shrinks (Patel et al.
2024, section IV.A; thresholds as in the released simulator).

A plain state machine. Who reads a prompt and who goes on with it is chosen together, so that the cache can leave while it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from minillm.policy.handing import Role

MOST_PENDING = 8192  # prompt tokens that may wait at a machine before others are asked


@dataclass
class Placed:
    """A request: who reads its prompt, who goes on, and room for all of it; tokens of its prompt that are `unread`, and that are to be
    `kept` by who reads it until they are where it goes on.
    """

    prompt_at: int
    token_at: int
    room: int
    unread: int
    kept: int


class Pools:
    """Machines with a home in one of two pools, and room for so many tokens of KV cache each, in blocks of `block`. Raises `ValueError`
    when a pool is empty.
    """

    def __init__(
        self, homes: Sequence[Role], cache_tokens: Sequence[int], most_pending: int = MOST_PENDING, block: int = 1
    ) -> None:
        for role in Role:
            if role not in homes:
                raise ValueError(f"there is no machine for {role.value}: give at least one")
        self.homes, self.cache_tokens, self.most_pending, self.block = (
            list(homes),
            list(cache_tokens),
            most_pending,
            block,
        )
        self.mixed: set[int] = set()
        self.lost: set[int] = set()
        self.pending = [0] * len(self.homes)  # prompt tokens not read yet, and one for each request that decodes
        self.taken = [0] * len(self.homes)  # room for requests
        self.placed: dict[int, Placed] = {}
        self._members = {role: [number for number, home in enumerate(self.homes) if home is role] for role in Role}

    def pool(self, role: Role) -> list[int]:
        """The machines of a pool that are there, and not in the mixed one."""
        away = self.mixed | self.lost
        return [number for number in self._members[role] if number not in away] if away else self._members[role]

    def place(self, request_id: int, prompt: int, new: int) -> tuple[int, int]:
        """A request is there: who reads its prompt, and who goes on. Raises `LookupError` when all machines are lost."""
        room, whole = self._in_blocks(prompt + new), self._in_blocks(prompt)
        prompt_at = self._for_prompt(prompt)
        token_at = self._for_tokens(room) if new > 1 else prompt_at
        if prompt_at is None:
            prompt_at = self._borrow(Role.DECODE, self.pending)
        if token_at is None:
            token_at = self._borrow(Role.PREFILL, self.taken) if new > 1 else prompt_at
        if prompt_at is None or token_at is None:
            prompt_at = token_at = self._least_pending()
        crowded = prompt_at in self.mixed and not self._has_room(prompt_at, whole)
        if crowded or not self._has_room(token_at, room):
            token_at, borrowed = prompt_at, token_at  # caches that wait for room on both sides would wait for ever
            self._home(borrowed)
        kept = whole if prompt_at != token_at else 0
        self._put(request_id, Placed(prompt_at, token_at, room, prompt, kept))
        return prompt_at, token_at

    def join(self, request_id: int, other_id: int) -> None:
        """One more sample of a request that is not read yet: it goes on where that one does."""
        self._put(request_id, replace(self.placed[other_id], unread=0, kept=0))

    def stay(self, request_id: int) -> None:
        """A request that is not read yet goes on where its prompt is read."""
        placed = self.placed[request_id]
        self.moved(request_id)
        self._leave(placed)
        placed.token_at = placed.prompt_at
        self._enter(placed)

    def read(self, request_id: int) -> None:
        """Its prompt has been read, or never will be there."""
        placed = self.placed[request_id]
        self.pending[placed.prompt_at] -= placed.unread
        placed.unread = 0
        self._home(placed.prompt_at)

    def moved(self, request_id: int) -> None:
        """Its cache is where it goes on, or never will be."""
        placed = self.placed[request_id]
        self.taken[placed.prompt_at] -= placed.kept
        placed.kept = 0
        self._home(placed.prompt_at)

    def ended(self, request_id: int) -> None:
        """Nothing more comes of it."""
        self.read(request_id)
        self.moved(request_id)
        self._leave(self.placed.pop(request_id))

    def lose(self, machine: int) -> None:
        """A machine is gone until `regain`. Of its requests others speak."""
        self.lost.add(machine)

    def regain(self, machine: int) -> None:
        """It is there again."""
        self.lost.discard(machine)

    def rehome(self, machine: int, role: Role) -> None:
        """Give a machine another home for good (re-purposing, section IV.A). Raises `ValueError` for the last one of its pool."""
        if self.homes[machine] is not role and self.homes.count(self.homes[machine]) == 1:
            raise ValueError(f"machine {machine} is the last one for {self.homes[machine].value}: let it be")
        self.homes[machine] = role
        self._members = {each: [n for n, home in enumerate(self.homes) if home is each] for each in Role}

    def _put(self, request_id: int, placed: Placed) -> None:
        self.placed[request_id] = placed
        self.pending[placed.prompt_at] += placed.unread
        self.taken[placed.prompt_at] += placed.kept
        self._enter(placed)

    def _enter(self, placed: Placed) -> None:
        """It is to decode somewhere."""
        self.pending[placed.token_at] += 1
        self.taken[placed.token_at] += placed.room

    def _leave(self, placed: Placed) -> None:
        """And not any more."""
        self.pending[placed.token_at] -= 1
        self.taken[placed.token_at] -= placed.room
        self._home(placed.token_at)

    def _home(self, machine: int) -> None:
        """A machine with nothing to do leaves the mixed pool."""
        if self.mixed and not self.pending[machine] and not self.taken[machine]:
            self.mixed.discard(machine)

    def _in_blocks(self, tokens: int) -> int:
        """Tokens that whole blocks for these would hold."""
        return -(-tokens // self.block) * self.block

    def _least_pending(self) -> int:
        """Where the fewest wait, in whichever pool."""
        present = [number for number in range(len(self.homes)) if number not in self.lost]
        if not present:
            raise LookupError("every machine is lost")
        return min(present, key=self.pending.__getitem__)

    def _for_prompt(self, prompt: int) -> int | None:
        """Where the fewest tokens wait, if that is not too many."""
        fits = lambda number: not self.pending[number] or self.pending[number] + prompt <= self.most_pending  # noqa: E731
        return self._least((self.pool(Role.PREFILL), self.mixed - self.lost), self.pending, fits)

    def _for_tokens(self, room: int) -> int | None:
        """Where the least is taken, if there is room."""
        fits = lambda number: self._has_room(number, room)  # noqa: E731
        return self._least((self.pool(Role.DECODE), self.mixed - self.lost), self.taken, fits)

    def _has_room(self, machine: int, tokens: int) -> bool:
        """Whether so much more would fit beside all that is meant to be there."""
        return self.taken[machine] + tokens < self.cache_tokens[machine]

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
