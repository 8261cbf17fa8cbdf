"""Memory that two ranks of one host share, so that the parts of a KV cache need not go through a socket: a few slots, each written by the
sender, and free again once the receiver has read it.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path

import torch

SLOTS, SLOT_BYTES = 2, 4 << 20  # one is read while the other is written


class Room:
    """The slots, in a file that is mapped by both sides. Who makes it waits for nothing; who opens it has the file forgotten, so that
    nothing is left of it when both are gone. Raises `OSError` for a file that cannot be made, or is not there.
    """

    def __init__(self, path: Path, make: bool) -> None:
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if make else 0)
        file = os.open(path, flags, 0o600)
        try:
            if make:
                _reserve(file, SLOTS * SLOT_BYTES)
            self._memory = mmap.mmap(file, SLOTS * SLOT_BYTES)
        except OSError:
            make = False  # it is of no use to anybody
            raise
        finally:
            os.close(file)
            if not make:
                with suppress(OSError):
                    path.unlink()
        self._free = list(range(SLOTS))
        self._news = threading.Condition()
        self._closed = False

    def view(self, slot: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of this shape in a slot. Raises `ValueError` when it does not fit."""
        if not 0 <= slot < SLOTS or prod(shape) * dtype.itemsize > SLOT_BYTES:
            raise ValueError(f"slot {slot} has no room for {list(shape)} {dtype}")
        flat = torch.frombuffer(self._memory, dtype=dtype, count=prod(shape), offset=slot * SLOT_BYTES)
        return flat.view(tuple(shape))

    def take(self) -> int:
        """A free slot, as soon as there is one. Raises `OSError` when the other side is gone."""
        with self._news:
            self._news.wait_for(lambda: self._free or self._closed)
            if self._closed:
                raise OSError("nobody reads these slots any more")
            return self._free.pop()

    def give(self, slot: int) -> None:
        """A slot has been read."""
        with self._news:
            self._free.append(slot)
            self._news.notify()

    def close(self) -> None:
        """The other side is gone."""
        with self._news:
            self._closed = True
            self._news.notify_all()


def _reserve(file: int, count: int) -> None:
    """Let a file have so many bytes, and the memory for them: where there is none, writing would end the process. Raises `OSError`."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, count)
    else:
        os.ftruncate(file, count)
