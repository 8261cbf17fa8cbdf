"""Links between instances of one host that borrow blocks of each other's KV caches: each rank has one to the same rank of every other.

This is the debtor's end; the creditor's (`counter.py`) has threads of its own that answer while its rank computes: room for blocks,
their content, and what the blocks say to queries (DistAttention). Instances are started and lost one by one, so these links are no
process groups: plain sockets in a folder that only this user can enter, opened when first needed.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from queue import Empty, SimpleQueue
from typing import Any

import torch

from minillm.kv.paged import PagedCache
from minillm.parallel.door import Door, LinkLost, recv_tensor, say, send_tensor

LINK_S = 5.0  # how long a creditor may take to answer


def connect(door: Door, party: int, rank: int, patient: bool = False) -> Connection:
    """A wire to a rank of a party, which waits for nothing longer than `LINK_S`, unless it is `patient`. Raises `OSError`."""
    box: SimpleQueue[Connection | BaseException] = SimpleQueue()

    def call() -> None:
        try:
            box.put(Client(door.address(party, rank), "AF_UNIX", authkey=door.key))
        except BaseException as error:
            box.put(error)

    threading.Thread(
        target=call, name="minillm link", daemon=True
    ).start()  # a stopped process accepts, and says nothing
    try:
        link = box.get(timeout=LINK_S)
    except Empty:
        raise TimeoutError from None
    if isinstance(link, BaseException):
        raise OSError(str(link)) from link
    with socket.socket(fileno=os.dup(link.fileno())) as plain:
        if patient:
            say(link, "hello", party=door.party)
            return link
        limit = struct.pack("ll", int(LINK_S), 0)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    say(link, "hello", party=door.party)
    return link


@dataclass
class Traffic:
    """What went over a link: queries and answers, blocks, and all else, in bytes and without the frame."""

    queries: int = 0
    answers: int = 0
    blocks: int = 0


@dataclass
class Link:
    """The debtor's end of a link to the same rank of a creditor. Once lost it stays lost."""

    door: Door
    creditor: int
    rank: int
    traffic: Traffic = field(default_factory=Traffic)
    lost: bool = False
    _wire: Connection | None = None

    def use(self) -> Connection:
        """The connection, made when first used. Raises `LinkLost`."""
        if self.lost:
            raise LinkLost(f"instance {self.creditor} is gone")
        if self._wire is None:
            with self.guarded():
                self._wire = connect(self.door, self.creditor, self.rank)
        assert self._wire is not None
        return self._wire

    def guarded(self) -> Guard:
        """What goes wrong inside is that the link is lost."""
        return Guard(self)

    def ask(self, what: str, answered: bool = True, **details: Any) -> Any:
        """Say something to the creditor's manager; returns its answer. Raises `LinkLost`."""
        with self.guarded():
            say(self.use(), what, **details)
            return json.loads(self.use().recv_bytes())["value"] if answered else None

    def close(self) -> None:
        """Have nothing more to do with it."""
        self.lost = True
        if self._wire is not None:
            self._wire.close()


class Guard:
    """Turns what a broken connection raises into `LinkLost`."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (EOFError, OSError, AuthenticationError, ValueError)):
            self.link.close()
            raise LinkLost(f"instance {self.link.creditor}: {type(error).__name__}") from error


class Links:
    """All links of one rank, as a debtor: one wire for queries, and one for blocks, so that they move while queries go on."""

    def __init__(self, door: Door, rank: int, cache: PagedCache) -> None:
        self.door, self.rank, self.cache = door, rank, cache
        self._links: dict[tuple[str, int], Link] = {}
        self._movers = ThreadPoolExecutor(1, "minillm mover")  # one after the other, on one wire
        self._moving: list[Future[None]] = []
        self.moved: list[tuple[int, int, float, float]] = []  # (creditor, bytes, begin, end), until somebody takes them

    def to(self, creditor: int, purpose: str = "queries") -> Link:
        """The link to a creditor."""
        if (purpose, creditor) not in self._links:
            self._links[purpose, creditor] = Link(self.door, creditor, self.rank)
        return self._links[purpose, creditor]

    def move(self, creditor: int, mine: Sequence[int], theirs: Sequence[int]) -> None:
        """Begin to send blocks."""
        self._moving.append(self._movers.submit(self._move, self.to(creditor, "blocks"), list(mine), list(theirs)))

    def settle(self) -> None:
        """Wait until all blocks have arrived, or their creditors are gone."""
        moving, self._moving = self._moving, []
        for each in moving:
            with suppress(LinkLost):
                each.result()

    def fetch(self, creditor: int, mine: Sequence[int], theirs: Sequence[int]) -> bool:
        """Bring blocks home; whether they came."""
        link, keys = self.to(creditor, "blocks"), self.cache.keys
        with suppress(LinkLost), link.guarded():
            say(link.use(), "fetch", blocks=list(theirs))
            came = recv_tensor(link.use(), (2, keys.shape[0], len(theirs), *keys.shape[2:]), keys.dtype, keys.device)
            self.cache.keys[:, list(mine)], self.cache.values[:, list(mine)] = came
            link.traffic.blocks += came.nbytes
            return True
        return False

    def _move(self, link: Link, mine: list[int], theirs: list[int]) -> None:
        began_s = time.monotonic()
        with link.guarded():
            say(link.use(), "move", blocks=theirs)
            count = send_tensor(link.use(), torch.stack((self.cache.keys[:, mine], self.cache.values[:, mine])))
            link.use().recv_bytes()
            link.traffic.blocks += count
        self.moved.append((link.creditor, count, began_s, time.monotonic()))

    def close(self) -> None:
        """Give all links up."""
        self._movers.shutdown(wait=False)
        for link in self._links.values():
            link.close()
