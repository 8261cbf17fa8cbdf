"""All-reduce, all-gather and broadcast over memory that all ranks of a host see: no transport, and no wait for one. The
all-to-all over it is in `ranks/rows.py`.

Nothing is sent: each rank writes a slot of its own and raises a flag, and reads everybody's slots when all flags are up.
That leans on one promise of the processor: whoever sees a flag also sees what was written before it. x86 keeps it for
plain stores; Arm does not, so there gloo carries all messages.
"""

from __future__ import annotations

import mmap
import os
import platform
import select
import time
from contextlib import suppress
from zlib import crc32

import torch
import torch.distributed as dist

from minillm.hardware.machine import usable_cores

SLOT_BYTES = 1 << 21
LINE = 8  # 64-bit words in a cache line
SPINS, YIELDS = 200, 2_000  # how often to look at a flag before giving the core away, and before sleeping
NAP_S = 50e-6


class SharedMemory:
    """One rank's view of the memory that a group shares: a line of flags and two slots for each rank.

    The slots are used in turns. Whoever has seen all flags of operation n + 1 knows that all are through with operation n,
    so that the slots of n may be written again.
    """

    def __init__(self, memory: mmap.mmap, rank: int, lives: list[int], limit_s: float) -> None:
        self.rank, self.size, self.limit_s = rank, len(lives), limit_s
        self.lives = lives  # a descriptor of each rank's process
        self.flags = memoryview(memory)[: self.size * LINE * 8].cast("q")
        with torch.inference_mode(False):
            whole = torch.frombuffer(memory, dtype=torch.uint8, offset=self.size * LINE * 8)
            self.slots = whole.view(2, self.size, -1)
        self.views: dict[tuple[int, torch.dtype, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.calls: dict[tuple[str, torch.dtype, int], int] = {}
        self.number = 0
        self.spins = SPINS if self.size <= usable_cores() else 0

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum a contiguous tensor over the group, in place; every rank adds up to the same bits."""
        call = self.call("all_reduce", tensor)
        with torch.inference_mode():  # writes into every tensor, whichever mode it is from
            for part in _parts(tensor):
                slots = self.exchange(part, call)
                if self.size == 2:  # a + b is b + a, and part is at hand
                    part.add_(slots[1 - self.rank])
                else:
                    torch.sum(slots, 0, dtype=part.dtype, out=part)

    def all_gather(self, result: torch.Tensor, tensor: torch.Tensor) -> None:
        """Everybody's contiguous tensor, one after the other into `result`."""
        call, begin, rows = self.call("all_gather", tensor), 0, result.view(self.size, tensor.numel())
        for part in _parts(tensor):
            rows[:, begin : begin + len(part)] = self.exchange(part, call)
            begin += len(part)

    def broadcast(self, tensor: torch.Tensor, root: int) -> None:
        """The root's contiguous tensor into everybody's."""
        call = self.call(f"broadcast {root}", tensor)
        with torch.inference_mode():
            for part in _parts(tensor):
                part.copy_(self.exchange(part, call)[root])

    def exchange(self, part: torch.Tensor, call: int) -> torch.Tensor:
        """[n] of each rank, at most `SLOT_BYTES` -> [size, n] of all, which stands until the next call.

        `call` says what it is part of. Raises `ValueError` where the others are in another one.
        """
        self.number += 1
        turn, mine = self.number % 2, self.rank * LINE
        slots, slot = self._views(turn, part)
        slot.copy_(part)
        self.flags[mine + 1 + turn] = call
        self.flags[mine] = self.number  # last: it stands for all that was written before
        for other in range(self.size):
            self.wait_for(other)
            if (theirs := self.flags[other * LINE + 1 + turn]) != call:
                raise ValueError(
                    f"rank {other} of the group is in another collective, of {theirs >> 20:,} bytes; "
                    f"rank {self.rank}'s has {call >> 20:,}"
                )
        return slots

    def call(self, name: str, tensor: torch.Tensor) -> int:
        """A collective in one word: the message's bytes, and 20 bits of its name and dtype."""
        key = name, tensor.dtype, tensor.nbytes
        if key not in self.calls:
            self.calls[key] = tensor.nbytes << 20 | crc32(f"{name} {tensor.dtype}".encode()) & 0xFFFFF
        return self.calls[key]

    def _views(self, turn: int, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots of all ranks [size, n], as long as this message, and this rank's own [n]."""
        key = turn, part.dtype, len(part)
        if key not in self.views:
            with torch.inference_mode(False):  # views made within it could not be written outside
                slots = self.slots[turn, :, : part.nbytes].view(part.dtype)
                self.views[key] = slots, slots[self.rank]
        return self.views[key]

    def wait_for(self, other: int) -> None:
        """Until a rank's flag is up: look, then let others use the core between looks, then sleep between them."""
        looks, since_s = 0, 0.0
        while self.flags[other * LINE] < self.number:
            looks += 1
            if looks > YIELDS:
                since_s = since_s or time.monotonic()
                self._sleep(other, since_s)
            elif looks > self.spins:
                os.sched_yield()

    def _sleep(self, other: int, since_s: float) -> None:
        """Sleep for a moment. Raises `ConnectionError` when the process that is waited for has ended, `TimeoutError` when it
        takes too long.
        """
        time.sleep(NAP_S)
        if _ended(self.lives[other]):
            raise ConnectionError(f"rank {other} of the group has ended")
        if time.monotonic() - since_s > self.limit_s:
            raise TimeoutError(f"rank {other} of the group did not come within {self.limit_s:.0f} s")


def _ended(life: int) -> bool:
    """Whether a process has ended, by its descriptor."""
    poll = select.poll()
    poll.register(life, select.POLLIN)
    return bool(poll.poll(0))


def _parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A tensor's numbers in parts that fit a slot."""
    flat = tensor.view(-1)
    return (flat,) if flat.nbytes <= SLOT_BYTES else flat.split(SLOT_BYTES // flat.element_size())


def keeps_store_order() -> bool:
    """Whether others see our stores in the order in which we made them, and memory can be shared: Linux on x86."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")


def open_shared(store: dist.Store, rank: int, size: int, limit_s: float) -> SharedMemory | None:
    """The memory of a group whose ranks meet in `store`, all on one host; None, on all of them, where one cannot have it.

    It has no name, and is gone with the last of the ranks, however they end.
    """
    length = size * (LINE * 8 + 2 * SLOT_BYTES)
    if rank == 0:
        store.set("place", f"/proc/{os.getpid()}/fd/{_make(length)}")
    store.set(f"rank {rank}", str(os.getpid()))
    place, pids = store.get("place").decode(), [int(store.get(f"rank {other}")) for other in range(size)]
    memory, lives = None, []
    if keeps_store_order():
        with suppress(OSError, AttributeError):  # an old kernel, a sandbox, no descriptors left
            for pid in pids:
                lives.append(os.pidfd_open(pid))
            opened = os.open(place, os.O_RDWR)
            memory = mmap.mmap(opened, length)
            os.close(opened)
    store.set(f"has {rank}", str(int(memory is not None)))
    agreed = all(int(store.get(f"has {other}")) for other in range(size))
    if rank == 0 and (made := int(place.rsplit("/", 1)[1])) >= 0:
        os.close(made)
    if memory is not None and agreed:
        return SharedMemory(memory, rank, lives, limit_s)
    for life in lives:
        os.close(life)
    return None


def _make(length: int) -> int:
    """A descriptor of new memory; -1 where there is none to be had."""
    with suppress(OSError, AttributeError):
        made = os.memfd_create("minillm")
        os.ftruncate(made, length)
        return made
    return -1
