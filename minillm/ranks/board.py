"""A rank's notice board: a small ring of shared memory on which it writes every collective *before* it waits.

The launching process reads the boards of all ranks while a job runs, and still reads the board of a rank that was
killed. The board knows nothing of processes or tensors; writing one notice takes a few microseconds.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

SLOTS, SLOT_BYTES = 64, 512
CHANNELS = 256
_SLOT = struct.Struct("<QQQiB")  # number, channel, index, peer, state
_CHANNEL = struct.Struct("<QQ")  # channel, how many entered
_HEAD = struct.Struct("<QQ")  # ticks, notices written
_NUMBER = struct.Struct("<Q")
_TEXT_AT = _SLOT.size
_TEXT_BYTES = SLOT_BYTES - _SLOT.size - _NUMBER.size
_RING_AT = _HEAD.size + CHANNELS * _CHANNEL.size
BOARD_BYTES = _RING_AT + SLOTS * SLOT_BYTES
_BREAK = "\x1f"


class State(IntEnum):
    """What the rank does with the operation of a notice."""

    WAITING = 1
    ISSUED = 2  # asynchronous: started, not waited for yet
    DONE = 3


def channel_id(name: str) -> int:
    """A 64-bit name for an ordered series of operations: one group's collectives, or one direction of send/recv."""
    data = name.encode()
    return zlib.crc32(data) << 32 | zlib.crc32(b"minillm" + data)


@dataclass(frozen=True)
class Operation:
    """One communication as its caller meant it. `signature` must be equal on all members of a collective."""

    name: str  # all_reduce, send, …
    signature: str  # what all members must agree on: shape, dtype, root
    channel: str  # the series it counts in
    partner: str  # for send/recv: the series on the other side; else ""
    members: tuple[int, ...]  # global ranks of the group, or the one peer
    source: str = ""  # file:line of the caller


@dataclass(frozen=True)
class Notice:
    """An `Operation` as read from a board: the `index`-th of its channel, in a state."""

    number: int
    channel: int
    index: int
    partner: int  # channel of the other side of a send/recv, 0 for a collective
    state: State
    name: str
    signature: str
    members: tuple[int, ...]
    source: str


class Board:
    """The writer's side, held by one rank over `BOARD_BYTES` of writable memory."""

    def __init__(self, memory: memoryview | bytearray) -> None:
        self._memory = memory
        self._ticks = 0
        self._written = 0
        self._counts: dict[str, int] = {}
        self._places: dict[str, int] = {}
        self._ids: dict[str, int] = {}

    def tick(self) -> None:
        """Say that this rank is getting on, so that ranks waiting for it keep waiting."""
        self._ticks += 1
        _HEAD.pack_into(self._memory, 0, self._ticks, self._written)

    def enter(self, operation: Operation, state: State = State.WAITING) -> tuple[int, int]:
        """Publish an operation; returns (slot number, index in its channel)."""
        index = self._counts.get(operation.channel, 0)
        self._counts[operation.channel] = index + 1
        number = self._write(operation, index, state)
        self._count(operation.channel, index + 1)
        self.tick()
        return number, index

    def wait(self, operation: Operation, index: int) -> int:
        """Publish that the rank now waits for an operation issued earlier."""
        number = self._write(operation, index, State.WAITING)
        self.tick()
        return number

    def leave(self, number: int) -> None:
        """The operation of this slot is over."""
        at = self._slot(number)
        if _NUMBER.unpack_from(self._memory, at)[0] == number:
            self._memory[at + _SLOT.size - 1] = State.DONE
        self.tick()

    def _slot(self, number: int) -> int:
        return _RING_AT + (number - 1) % SLOTS * SLOT_BYTES

    def _id(self, name: str) -> int:
        if not name:
            return 0
        if name not in self._ids:
            self._ids[name] = channel_id(name)
        return self._ids[name]

    def _count(self, channel: str, count: int) -> None:
        place = self._places.setdefault(channel, len(self._places) % CHANNELS)
        _CHANNEL.pack_into(self._memory, _HEAD.size + place * _CHANNEL.size, self._id(channel), count)

    def _write(self, operation: Operation, index: int, state: State) -> int:
        self._written += 1
        at = self._slot(self._written)
        fields = (
            operation.name,
            operation.signature[:120],
            pack_ranks(operation.members),
            operation.partner and f"{self._id(operation.partner):x}",
            operation.source[-180:],
        )
        text = _BREAK.join(fields).encode()[:_TEXT_BYTES]
        _NUMBER.pack_into(self._memory, at + SLOT_BYTES - _NUMBER.size, 0)  # torn until both numbers agree
        _SLOT.pack_into(self._memory, at, self._written, self._id(operation.channel), index, len(text), state)
        self._memory[at + _TEXT_AT : at + _TEXT_AT + len(text)] = text
        _NUMBER.pack_into(self._memory, at + SLOT_BYTES - _NUMBER.size, self._written)
        return self._written


@dataclass(frozen=True)
class View:
    """What a reader saw of a board at one moment."""

    ticks: int
    written: int
    counts: dict[int, int]  # channel -> operations entered
    notices: dict[int, Notice]  # slot number -> notice, the last `SLOTS` of them

    @property
    def current(self) -> Notice | None:
        """The operation the rank waits in now, if any."""
        last = self.notices.get(self.written)
        return last if last is not None and last.state is State.WAITING else None

    @property
    def last(self) -> Notice | None:
        """The last operation the rank published."""
        return self.notices.get(self.written)


def read(memory: memoryview | bytearray | bytes, since: int = 0) -> View:
    """Read a board; notices up to slot number `since` are left out."""
    ticks, written = _HEAD.unpack_from(memory, 0)
    counts = {}
    for place in range(CHANNELS):
        channel, count = _CHANNEL.unpack_from(memory, _HEAD.size + place * _CHANNEL.size)
        if not channel:
            break
        counts[channel] = count
    notices = {}
    for number in range(max(since, written - SLOTS) + 1, written + 1):
        notice = _read_slot(memory, number)
        if notice is not None:
            notices[number] = notice
    return View(ticks, written, counts, notices)


def _read_slot(memory: memoryview | bytearray | bytes, number: int) -> Notice | None:
    at = _RING_AT + (number - 1) % SLOTS * SLOT_BYTES
    first, channel, index, length, state = _SLOT.unpack_from(memory, at)
    if first != number or _NUMBER.unpack_from(memory, at + SLOT_BYTES - _NUMBER.size)[0] != number:
        return None
    text = bytes(memory[at + _TEXT_AT : at + _TEXT_AT + length]).decode(errors="replace")
    name, signature, members, partner, source = text.split(_BREAK)
    return Notice(
        number, channel, index, int(partner or "0", 16), State(state), name, signature, unpack_ranks(members), source
    )


def pack_ranks(ranks: tuple[int, ...]) -> str:
    """(0, 1, 2, 5) -> "0-2,5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def unpack_ranks(text: str) -> tuple[int, ...]:
    """The inverse of `pack_ranks`."""
    ranks: list[int] = []
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        ranks.extend(range(int(first), int(last or first) + 1))
    return tuple(ranks)
