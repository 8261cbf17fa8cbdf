"""A launched process that keeps a place for a rank: it starts and ends rank processes here, and tells the leader how they stand."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass, replace
from multiprocessing.connection import Client, Connection
from typing import Any

import torch.distributed as dist

from minillm.ranks.process import LocalProcess, start_rank

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what its launcher tells a process
TELL_S = 0.1  # how often a keeper tells how its rank stands
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}  # a host without power is missed in 25 s,
KEEPALIVE |= {"TCP_USER_TIMEOUT": 25_000}  # also while something is on its way to it


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


def keep(card: Card, store: dist.Store) -> int:
    """Keep a place: start and end rank processes here as the leader says, and tell how they stand. Returns the exit status."""
    address, port, key = json.loads(store.get("leader"))

    def connect(*first: Any) -> Connection:
        link = Client((address, port), authkey=bytes.fromhex(key))
        tune(link)
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


def tune(link: Connection) -> None:
    """Send small messages at once, and notice when the other host is gone."""
    with socket.socket(fileno=os.dup(link.fileno())) as plain:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # macOS has others
                plain.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
