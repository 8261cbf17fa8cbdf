"""A rank's notice board: a small ring of shared memory on which it writes every collective *before* it waits.

The launching process reads the boards of all ranks while a job runs, and still reads the board of a rank that was
killed. The board knows nothing of processes or tensors; writing one notice takes a few microseconds.
"""

from __future__ import annotations

import struct
import threading
import zlib
from dataclasses import dataclass
from enum import IntEnum

SLOTS, SLOT_BYTES = 64, 512
CHANNELS = 512
_SLOT = struct.Struct("<QQQiB")  # number, channel, index, peer, state
_CHANNEL = struct.Struct("<QQ")  # channel, how many entered
_HEAD = struct.Struct("<QQQ")  # ticks, notices written, channels forgotten
_WORD = 8
_NUMBER = struct.Struct("<Q")
_TEXT_AT = _SLOT.size
_RING_AT = _HEAD.size + CHANNELS * _CHANNEL.size
BOARD_BYTES = _RING_AT + SLOTS * SLOT_BYTES
_BREAK = "\x1f"


class State(IntEnum):
    """What the rank does with the operation of a notice."""

    WAITING = 1
    ISSUED = 2  # asynchronous: started, not waited for yet
    DONE = 3
    FAILED = 4  # the transport raised in it: nobody waits there any more
    REFUSED = 5  # its arguments were refused before anything was sent


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
        self._memory = memoryview(memory)
        self._words = self._memory.cast("Q")  # head and counts are written as whole words, so that no reader sees half
        self._lock = threading.RLock()
        self._written = 0
        self._counts: dict[str, int] = {}
        self._places: dict[str, int] = {}
        self._ids: dict[str, int] = {}
        self._texts: dict[Operation, bytes] = {}  # the last ones written

    def tick(self) -> None:
        """Say that this rank is getting on, so that ranks waiting for it keep waiting."""
        with self._lock:
            self._words[1] = self._written
            self._words[0] += 1

    def enter(self, operation: Operation, state: State = State.WAITING) -> tuple[int, int]:
        """Publish an operation; returns (slot number, index in its channel)."""
        with self._lock:
            index = self.advance(operation.channel, 0)
            number = self._write(operation, index, state)
            self.advance(operation.channel)
            return number, index

    def advance(self, channel: str, by: int = 1) -> int:
        """Count operations of a channel that need no notice; returns the count."""
        with self._lock:
            count = self._counts[channel] = self._counts.get(channel, 0) + by
            if by:
                self._count(channel, count)
                self.tick()
            return count

    def fail(self, number: int, channel: str = "") -> None:
        """The operation of this slot raised; with `channel`, it never began, and does not count there."""
        self.leave(number, State.REFUSED if channel else State.FAILED)
        if channel:
            self.advance(channel, -1)

    def wait(self, operation: Operation, index: int) -> int:
        """Publish that the rank now waits for an operation issued earlier."""
        with self._lock:
            number = self._write(operation, index, State.WAITING)
            self.tick()
            return number

    def leave(self, number: int, state: State = State.DONE) -> None:
        """The operation of this slot is over."""
        with self._lock:
            at = self._slot(number)
            if self._words[at // _WORD] == number:
                self._memory[at + _SLOT.size - 1] = state
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
        place = self._places.pop(channel, None)
        if place is None:
            place = len(self._places)
            if place == CHANNELS:  # forget the one that was not used for longest, and say so
                place = self._places.pop(next(iter(self._places)))
                self._words[2] += 1
        self._places[channel] = place
        word = (_HEAD.size + place * _CHANNEL.size) // _WORD
        if self._words[word] != self._id(channel):
            self._words[word + 1] = 0
            self._words[word] = self._id(channel)
        self._words[word + 1] = count

    def _write(self, operation: Operation, index: int, state: State) -> int:
        self._written += 1
        at = self._slot(self._written)
        text = self._text(operation)
        closing = (at + SLOT_BYTES - _NUMBER.size) // _WORD
        self._words[closing] = 0  # torn until both numbers agree
        _SLOT.pack_into(self._memory, at, self._written, self._id(operation.channel), index, len(text), state)
        self._memory[at + _TEXT_AT : at + _TEXT_AT + len(text)] = text
        self._words[closing] = self._written
        return self._written

    def _text(self, operation: Operation) -> bytes:
        """The five fields, each within its own share of a slot: name, signature, partner, source, members."""
        if operation in self._texts:
            return self._texts[operation]
        members = pack_ranks(operation.members).encode()
        fields = [
            operation.name.encode()[:24],
            operation.signature.encode()[:110],
            f"{self._id(operation.partner):x}".encode() if operation.partner else b"",
            operation.source.encode()[-180:],
            members if len(members) <= 110 else b"",  # too scattered to write down: the group is then not diagnosed
        ]
        if len(self._texts) > 1000:
            self._texts.clear()
        text = self._texts[operation] = _BREAK.encode().join(fields)
        return text


@dataclass(frozen=True)
class View:
    """What a reader saw of a board at one moment."""

    ticks: int
    written: int
    forgotten: int  # channels whose count is not known any more
    counts: dict[int, int]  # channel -> operations entered
    notices: dict[int, Notice]  # slot number -> notice, the last `SLOTS` of them

    def entered(self, channel: int, index: int) -> bool:
        """Whether the rank has entered the `index`-th operation of a channel; in doubt, yes."""
        if channel in self.counts:
            return self.counts[channel] > index
        return self.forgotten > 0

    @property
    def current(self) -> Notice | None:
        """The operation the rank waits in now, if any."""
        waiting = [number for number, notice in self.notices.items() if notice.state is State.WAITING]
        return self.notices[max(waiting)] if waiting else None

    @property
    def last(self) -> Notice | None:
        """The last operation the rank published."""
        return self.notices.get(self.written)


def read(memory: memoryview | bytearray | bytes, since: int = 0) -> View:
    """Read a board; notices up to slot number `since` are left out."""
    ticks, written, forgotten = memoryview(memory)[: _HEAD.size].cast("Q")
    table = bytes(memory[_HEAD.size : _RING_AT])
    counts = {}
    for channel, count in _CHANNEL.iter_unpack(table):
        if not channel:
            break
        counts[channel] = count
    notices = {}
    for number in range(max(since, written - SLOTS) + 1, written + 1):
        notice = _read_slot(memory, number)
        if notice is not None:
            notices[number] = notice
    return View(ticks, written, forgotten, counts, notices)


def _read_slot(memory: memoryview | bytearray | bytes, number: int) -> Notice | None:
    """A notice, if it stands whole: its number at both ends of the copy, and still there after copying."""
    at = _RING_AT + (number - 1) % SLOTS * SLOT_BYTES
    copy = bytes(memory[at : at + SLOT_BYTES])
    first, channel, index, length, state = _SLOT.unpack_from(copy, 0)
    closings = {
        _NUMBER.unpack_from(place, start)[0] for place, start in ((copy, SLOT_BYTES - 8), (memory, at + SLOT_BYTES - 8))
    }
    if first != number or closings != {number}:
        return None
    fields = copy[_TEXT_AT : _TEXT_AT + length].decode(errors="replace").split(_BREAK)
    if len(fields) != 5:
        return None
    name, signature, partner, source, members = fields
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
