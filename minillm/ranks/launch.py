"""Ranks on several hosts, where `torchrun` or `accelerate launch` has started a process for each.

The process of global rank 0 leads: it runs the user's program. The others keep places: each starts a rank process on its
host when the leader asks, ends it, and tells how it stands, so that ranks are called, watched and started anew there as
they are here. Calls go straight from the leader to the rank, by TCP, with a key that the launcher's store hands out.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from queue import Empty, Queue
from typing import Any

import torch.distributed as dist

from minillm.ranks.backend import choose_backend
from minillm.ranks.board import BOARD_BYTES
from minillm.ranks.errors import Fault, RankError, Verdict
from minillm.ranks.pool import Place, Ranks
from minillm.ranks.process import Here, LocalProcess, RankProcess, start_rank, warm_up
from minillm.ranks.worker import Seat

JOIN_S = 60.0  # how long all processes of a launcher may take to come
TELL_S = 0.1  # how often a keeper tells how its rank stands
ANSWER_S = 2.0  # how long it may take to tell when it is asked
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a host without power is missed in 25 s,
KEEPALIVE |= {"TCP_USER_TIMEOUT": 25_000}  # also while something is on its way to it
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Card:
    """Who a launched process is: `node` counts hosts, `local_rank` the `local_size` processes on one."""

    rank: int
    node: int
    local_rank: int
    local_size: int
    host: str

    @classmethod
    def mine(cls) -> Card:
        """From the environment that the launcher has set."""
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        node = int(os.environ.get("GROUP_RANK", rank // local_size))
        local_rank = int(os.environ.get("LOCAL_RANK", rank % local_size))
        return cls(rank, node, local_rank, local_size, socket.gethostname())


@dataclass(frozen=True)
class Standing:
    """How a rank process stands, as its keeper tells: its board when that has changed, and what only its host can see.

    `ticket` says which of its processes it is, `answers` how often the leader had asked.
    """

    ticket: int
    answers: int
    board: bytes | None
    pid: int
    exit_code: int | None
    stopped: bool
    cpu_s: float


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return all(name in os.environ for name in LAUNCHER) and int(os.environ["WORLD_SIZE"]) > 1


@contextmanager
def lead() -> Iterator[Launch | None]:
    """`with lead() as launch:` — under a launcher only rank 0 enters; the other processes keep places until it leaves, then
    exit. `LLM(…, ranks=launch)` runs on all of them. Elsewhere `launch` is None.

    Raises `RuntimeError` when some processes do not come.
    """
    if not launched():
        yield None
        return
    warm_up()
    card = Card.mine()
    common, _, _ = next(dist.rendezvous("env://", card.rank, int(os.environ["WORLD_SIZE"])))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a launcher may start all of them again
    store = dist.PrefixStore(f"minillm lead {attempt}", common)
    if card.rank:
        sys.exit(keep(card, store))
    launch = Launch(card, int(os.environ["WORLD_SIZE"]), store)
    try:
        yield launch
    finally:
        launch.close()


class Launch:
    """All processes of a launcher, as the leader has them. `ranks=` of an `LLM` takes it.

    `cards` says who they are, by rank.
    """

    def __init__(self, card: Card, size: int, store: dist.Store) -> None:
        self.address = "127.0.0.1" if card.local_size == size else os.environ["MASTER_ADDR"]
        self._key = secrets.token_bytes(32)
        here = self.address if card.local_size == size else ""  # every interface: the others know one of its names
        self._listener = Listener((here, 0), backlog=4 * size)
        self._closed = False
        self._keepers: Queue[tuple[Card, Connection]] = Queue()
        self._pipes: list[Queue[Pipe]] = [Queue() for _ in range(size)]  # that lead to each rank
        threading.Thread(target=self._accept, name="minillm launch", daemon=True).start()
        store.set("leader", json.dumps([self.address, self._listener.address[1], self._key.hex()]))
        self.cards = [card]
        places: dict[int, Place] = {card.rank: Here(card.local_rank, card.node)}
        while len(places) < size:
            try:
                other, link = self._keepers.get(timeout=JOIN_S)
            except Empty:
                missing = ", ".join(str(rank) for rank in range(size) if rank not in places)
                raise RuntimeError(f"these ranks did not come within {JOIN_S:g} s: {missing}") from None
            self.cards.append(other)
            places[other.rank] = Keeper(other, link, self._pipes[other.rank])
        self.cards.sort(key=lambda each: each.rank)
        self.places = [places[rank] for rank in range(size)]

    def split(self, parts: int, device: str | None = None) -> list[Ranks]:
        """All processes in `parts` equal pools of ranks, in order; each can be lost without the others."""
        size, pools = len(self.places) // parts, []
        for first in range(0, len(self.places), size):
            places = self.places[first : first + size]
            pool = Ranks(size, device=device, places=places, address=self.address)
            together = max(sum(other.node == place.node for other in places) for place in places)
            beside = max(sum(other.node == place.node for other in self.places) for place in places)
            pool.backend = choose_backend(together, device, beside=(0, beside))
            pools.append(pool)
        return pools

    def close(self) -> None:
        """Send everyone home."""
        for place in self.places:
            if isinstance(place, Keeper):
                place.say("leave")
                place.link.close()
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        """Take who connects, until closed; a stranger who says nothing holds up nobody."""
        while not self._closed:
            with suppress(OSError):
                link = self._listener.accept()
                threading.Thread(target=self._greet, args=(link,), name="minillm guest", daemon=True).start()

    def _greet(self, link: Connection) -> None:
        """Somebody who knows the key is a keeper, or the pipe of a rank that a keeper starts."""
        try:
            _tune(link)
            deliver_challenge(link, self._key)
            answer_challenge(link, self._key)
            what, *details = link.recv()
        except (AuthenticationError, EOFError, OSError):
            link.close()
            return
        if what == "keeper":
            self._keepers.put((details[0], link))
        else:
            rank, ticket = details
            self._pipes[rank].put(Pipe(what, ticket, link))


@dataclass(frozen=True)
class Pipe:
    """A connection to a rank: its "calls" or its "control", of the process with this ticket."""

    what: str
    ticket: int
    link: Connection


class Keeper:
    """The leader's side of a launched process: a place where a rank can be started."""

    def __init__(self, card: Card, link: Connection, pipes: Queue[Pipe]) -> None:
        self.card, self.link, self._pipes = card, link, pipes
        self.node, self.local_rank = card.node, card.local_rank
        self.gone = False
        self.process: RemoteProcess | None = None
        self._tickets = 0
        threading.Thread(target=self._hear, name=f"minillm rank {card.rank}", daemon=True).start()

    def start(self, seat: Seat) -> RankProcess:
        """Start a rank process there. Raises `RankError` when that does not happen."""
        self._tickets += 1
        self.process = RemoteProcess(self, self._tickets)
        self.say("start", self._tickets, replace(seat, environment={}))
        found: dict[str, Connection] = {}
        try:
            while len(found) < 2:
                if self.gone:
                    raise Empty
                pipe = self._pipes.get(timeout=JOIN_S)
                if pipe.ticket == self._tickets:
                    found[pipe.what] = pipe.link
                else:
                    pipe.link.close()  # of a start that took too long
        except Empty:
            what = "is gone" if self.gone else f"started none within {JOIN_S:g} s"
            text = f"no process for rank {self.card.rank}: {self.describe()} {what}"
            raise RankError(Verdict(Fault.DIED, [seat.rank], text)) from None
        self.process.calls, self.process.control = found["calls"], found["control"]
        return self.process

    def describe(self) -> str:
        """ "node 1 (hostname)"."""
        return f"node {self.card.node} ({self.card.host})"

    def say(self, *message: Any) -> None:
        """Tell the keeper something; one that is gone does not hear it."""
        with suppress(OSError, ValueError):
            self.link.send(message)

    def _hear(self) -> None:
        try:
            while True:
                standing = self.link.recv()
                if self.process is not None:
                    self.process.take(standing)
        except (EOFError, OSError):
            self.gone = True
            if self.process is not None:
                self.process.lost()


class RemoteProcess(RankProcess):
    """A rank on another host, or of another launched process on this one, as its keeper tells of it."""

    def __init__(self, keeper: Keeper, ticket: int) -> None:
        nowhere, _ = multiprocessing.Pipe()  # until the rank's own come
        self._board = bytearray(BOARD_BYTES)
        super().__init__(nowhere, nowhere, memoryview(self._board))
        self._keeper, self._standing = keeper, Standing(ticket, 0, None, 0, None, False, 0.0)
        self._asked = 0
        self._told = threading.Condition()
        self._end, self._end_there = multiprocessing.Pipe(duplex=False)

    def take(self, standing: Standing) -> None:
        """What the keeper tells; of a process before this one it does not matter."""
        if standing.ticket != self._standing.ticket or self._standing.exit_code is not None:
            return
        if standing.board is not None:
            self._board[:] = standing.board
        with self._told:
            self._standing = standing
            self._told.notify_all()
        if standing.exit_code is not None:
            self._end_there.close()

    def lost(self) -> None:
        """Its keeper is gone, and with it the process."""
        self.take(replace(self._standing, board=None, exit_code=1))

    @property
    def pid(self) -> int:
        return self._standing.pid

    @property
    def exit_code(self) -> int | None:
        return self._standing.exit_code

    @property
    def exit_text(self) -> str:
        return f"with {self._keeper.describe()}, which is gone" if self._keeper.gone else super().exit_text

    @property
    def sentinel(self) -> Any:
        return self._end

    @property
    def stopped(self) -> bool:
        return self._standing.stopped

    @property
    def cpu_s(self) -> float:
        return self._standing.cpu_s

    def join(self, timeout_s: float) -> None:
        with self._told:
            self._told.wait_for(lambda: self.exit_code is not None, timeout_s)

    def refresh(self) -> None:
        self._asked += 1
        self._keeper.say("tell", self._asked)
        with self._told:
            self._told.wait_for(lambda: self._standing.answers >= self._asked or self.exit_code is not None, ANSWER_S)

    def end(self) -> None:
        self._keeper.say("end")

    def close_pipes(self) -> None:
        super().close_pipes()
        self._end.close()


def keep(card: Card, store: dist.Store) -> int:
    """Keep a place: start and end rank processes here as the leader says, and tell how they stand. Returns the exit status."""
    address, port, key = json.loads(store.get("leader"))

    def connect(*first: Any) -> Connection:
        link = Client((address, port), authkey=bytes.fromhex(key))
        _tune(link)
        link.send(first)
        return link

    process: LocalProcess | None = None
    ticket, answers, shown = 0, 0, b""
    try:
        link = connect("keeper", card)
        while True:
            if link.poll(TELL_S):
                what, *details = link.recv()
                if what == "leave":
                    return 0
                if what == "tell":
                    (answers,) = details
                elif process is not None:
                    process.kill()
                if what == "start":
                    ticket, seat = details
                    answers = 0
                    calls, control = (connect(name, card.rank, ticket) for name in ("calls", "control"))
                    seat = replace(seat, environment=_environment())
                    process, shown = start_rank(seat, (calls, calls), (control, control)), b""
            if process is not None:
                board = bytes(process.board)
                code, stopped, cpu_s = process.exit_code, process.stopped, process.cpu_s
                changed = board if board != shown else None
                link.send(Standing(ticket, answers, changed, process.pid, code, stopped, cpu_s))
                shown = board
                if code is not None:
                    process.kill()
                    process = None
    except (EOFError, OSError) as error:
        print(f"minillm: rank {card.rank} leaves: rank 0 at {address} is gone ({error})", file=sys.stderr)
        return 1
    finally:
        if process is not None:
            process.kill()


def _environment() -> dict[str, str]:
    """This host's, without what would make a rank take itself for a launched process."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER and "TORCHELASTIC" not in name}


def _tune(link: Connection) -> None:
    """Send small messages at once, and notice when the other host is gone."""
    with socket.socket(fileno=os.dup(link.fileno())) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # macOS has others
                plain.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
