"""Where instances that work together meet, and how they speak: JSON or a tensor's bytes over a socket of this host."""

from __future__ import annotations

import json
import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


class LinkLost(Exception):
    """Another instance is gone, or does not answer."""


@dataclass(frozen=True)
class Door:
    """Where instance `party`, which works with others, is found: by sockets in `folder`, with `key`. A party that starts anew has a new
    number. `equip(seat, member, rank, door)` is called on each of its ranks.
    """

    party: int
    folder: Path
    key: bytes
    equip: Callable[[Any, Any, int, Door], None]

    def address(self, party: int, rank: int) -> str:
        """The socket of a rank of a party."""
        return str(self.folder / f"{party}-{rank}")


class House:
    """Where instances that work together meet, each equipped so; it is gone with its last user."""

    def __init__(self, equip: Callable[[Any, Any, int, Door], None]) -> None:
        self._equip = equip
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where files take no disk
        self._folder = tempfile.TemporaryDirectory(prefix="minillm-", dir=memory)  # only this user may enter
        self._key = secrets.token_bytes(32)
        self._parties = count()

    def door(self) -> Door:
        """The door of a new party."""
        return Door(next(self._parties), Path(self._folder.name), self._key, self._equip)


def send_tensor(link: Connection, tensor: torch.Tensor) -> int:
    """Send a tensor's bytes; returns how many."""
    plain = tensor.detach().contiguous().cpu()
    link.send_bytes(plain.view(torch.uint8).numpy().data.cast("B") if plain.numel() else b"")
    return plain.nbytes


def recv_tensor(link: Connection, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Receive a tensor of this shape. Raises `LinkLost` when something else comes."""
    room = torch.empty(tuple(shape), dtype=dtype)
    data = link.recv_bytes()
    if len(data) != room.nbytes:
        raise LinkLost(f"{len(data)} bytes came for {list(shape)} {dtype}")
    if data:
        room = torch.frombuffer(bytearray(data), dtype=dtype).view(tuple(shape))
    return room.to(device)


def say(link: Connection, what: str, **details: Any) -> None:
    """Send a message that is no tensor."""
    link.send_bytes(json.dumps({"what": what, **details}).encode())
