"""Links between instances of one host that borrow blocks of each other's KV caches: each rank has one to the same rank of every other.

The debtor's end asks, and the creditor's end has a thread of its own that answers while its rank computes: room for blocks, their
content, and what the blocks say to queries (DistAttention). Instances are started and lost one by one, so these links are no process
groups: plain sockets in a folder that only this user can enter, opened when first needed. Messages are JSON or a tensor's bytes.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch

from minillm.distkv.attention import Partial, paged_attention, partial_attention, wide
from minillm.kv.paged import PagedCache

LINK_S = 5.0  # how long a creditor may take to answer


class LinkLost(Exception):
    """A creditor is gone, or does not answer."""


@dataclass(frozen=True)
class Door:
    """Where instance `party`, which lends and borrows, is found: by sockets in `folder`, with `key`. A party that starts anew has a
    new number.
    """

    party: int
    folder: Path
    key: bytes

    def address(self, party: int, rank: int) -> str:
        """The socket of a rank of a party."""
        return str(self.folder / f"{party}-{rank}")


class House:
    """Where instances that borrow of each other meet; it is gone with its last user."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="minillm-")  # only this user may enter
        self._key = secrets.token_bytes(32)
        self._parties = count()

    def door(self) -> Door:
        """The door of a new party."""
        return Door(next(self._parties), Path(self._folder.name), self._key)


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


class Counter:
    """The creditor's end on one rank: answers whoever connects, each in a thread of its own. `manager` hears asks and notices, on the
    rank that has one: (what, debtor, details) -> what to answer, or None.
    """

    def __init__(
        self, door: Door, rank: int, cache: PagedCache, manager: Callable[[str, int, dict[str, Any]], Any] | None = None
    ) -> None:
        self.cache, self.manager = cache, manager
        self._key = door.key
        self._writing = threading.Lock()
        self._over: set[int] = set()
        self._links: dict[Connection, int] = {}  # and whose they are
        self._listener = Listener(door.address(door.party, rank), family="AF_UNIX", backlog=16)
        threading.Thread(target=self._accept, name="minillm counter", daemon=True).start()

    def over(self, parties: Sequence[int]) -> None:
        """From now on nothing of these parties is written here any more, and they get no answers."""
        with self._writing:
            self._over |= set(parties)
        for link, party in list(self._links.items()) if parties else ():
            if party in self._over:
                _hang_up(link)

    def close(self) -> None:
        """Answer nobody any more."""
        with suppress(OSError):
            self._listener.close()
        for link in list(self._links):
            _hang_up(link)

    def _accept(self) -> None:
        while True:
            try:
                link = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(link,), name="minillm counter", daemon=True).start()

    def _serve(self, link: Connection) -> None:
        """Answer one debtor until it is gone."""
        debtor = -1
        try:
            if not _knows(link, self._key):
                return
            while True:
                message = json.loads(link.recv_bytes())
                what = message.pop("what")
                if what == "hello":
                    debtor = self._links[link] = message["party"]
                elif what == "move":
                    self._write(link, debtor, message["blocks"])
                elif what == "fetch":
                    blocks = message["blocks"]
                    send_tensor(link, torch.stack((self.cache.keys[:, blocks], self.cache.values[:, blocks])))
                elif what == "step":
                    self._attend(link, **message)
                elif self.manager is not None:
                    answer = self.manager(what, debtor, message)
                    if answer is not None:
                        say(link, "answer", value=answer)
        except (EOFError, OSError, LinkLost, ValueError, KeyError):
            pass
        finally:
            self._links.pop(link, None)
            link.close()
            if self.manager is not None and debtor >= 0:
                self.manager("lost", debtor, {})

    def _write(self, link: Connection, debtor: int, blocks: list[int]) -> None:
        keys = self.cache.keys
        shape = (2, keys.shape[0], len(blocks), *keys.shape[2:])
        came = recv_tensor(link, shape, keys.dtype, keys.device)
        with self._writing:
            if debtor in self._over:
                raise LinkLost
            self.cache.keys[:, blocks], self.cache.values[:, blocks] = came
        say(link, "answer", value=True)

    @torch.inference_mode()
    def _attend(self, link: Connection, rows: list[int], blocks: list[list[int]], heads: int, layers: int) -> None:
        """Queries of one step, layer after layer: `rows` of each sequence, to its `blocks` here, which are full."""
        keys, device = self.cache.keys, self.cache.keys.device
        head_dim, size = keys.shape[-1], self.cache.block_size
        reading = Reading.of(rows, blocks, size, device)
        for layer in range(layers):
            q = recv_tensor(link, (sum(rows), heads, head_dim), keys.dtype, device)
            send_tensor(link, reading.attend(q, self.cache.keys[layer], self.cache.values[layer]).pack())


@dataclass(frozen=True)
class Reading:
    """How the queries of a step find the blocks of their sequences on this rank: single tokens all at once, the `singles`, and parts
    of prompts one by one.
    """

    singles: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    prompts: list[tuple[slice, torch.Tensor, torch.Tensor | None]]

    @classmethod
    def of(
        cls,
        rows: Sequence[int],
        blocks: Sequence[Sequence[int]],
        block_size: int,
        device: torch.device,
        starts: Sequence[int | None] = (),
    ) -> Reading:
        """`rows` of each sequence and its blocks, in order. With `starts`, the first query's place among the keys; else all are seen."""
        begins = [sum(rows[:n]) for n in range(len(rows))]
        alone = [n for n, asking in enumerate(rows) if asking == 1]
        most = max((len(blocks[n]) for n in alone), default=0)
        tables = [[*blocks[n], *[0] * (most - len(blocks[n]))] for n in alone]
        lengths = [starts[n] + 1 if starts else len(blocks[n]) * block_size for n in alone]  # type: ignore[operator]
        prompts = []
        for n, asking in enumerate(rows):
            if asking == 1:
                continue
            seen = None
            if starts:
                places = torch.arange(len(blocks[n]) * block_size, device=device)
                seen = places <= torch.arange(starts[n], starts[n] + asking, device=device)[:, None]  # type: ignore[arg-type,operator]
            prompts.append((slice(begins[n], begins[n] + asking), torch.tensor(blocks[n], device=device), seen))
        return cls(
            torch.tensor([begins[n] for n in alone], dtype=torch.int64, device=device),
            torch.tensor(tables, dtype=torch.int64, device=device).view(len(alone), most),
            torch.tensor(lengths, dtype=torch.int64, device=device), prompts,
        )  # fmt: skip

    def attend(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Partial:
        """What the blocks of a layer say to the queries [rows, heads, head_dim]."""
        total = Partial.nothing(q)
        if len(self.singles):
            part = paged_attention(q[self.singles], keys, values, self.tables, self.lengths)
            total.o[self.singles], total.m[self.singles], total.l[self.singles] = part.o, part.m, part.l
        for rows, blocks, seen in self.prompts:
            flat = [pool[blocks].transpose(0, 1).flatten(1, 2) for pool in (keys, values)]
            part = partial_attention(q[rows], flat[0], flat[1], seen)
            total.o[rows], total.m[rows], total.l[rows] = part.o, part.m, part.l
        return total


def _hang_up(link: Connection) -> None:
    """End a connection that another thread may be reading: it then reads the end."""
    with suppress(OSError), socket.socket(fileno=os.dup(link.fileno())) as plain:
        plain.shutdown(socket.SHUT_RDWR)


def _knows(link: Connection, key: bytes) -> bool:
    """Whether who connects has the key."""
    try:
        deliver_challenge(link, key)
        answer_challenge(link, key)
        return True
    except (AuthenticationError, EOFError, OSError):
        link.close()
        return False


def connect(door: Door, party: int, rank: int) -> Connection:
    """A wire to a rank of a party, which waits for nothing longer than `LINK_S`. Raises `OSError`."""
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


def answer_shape(rows: int, heads: int, head_dim: int) -> tuple[int, int, int]:
    """Of what comes back for so many queries: o, m and l of each head."""
    return rows, heads, head_dim + 2


def answer_type(dtype: torch.dtype) -> torch.dtype:
    """What it is in."""
    return wide(dtype)
