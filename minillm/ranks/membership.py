"""What a rank knows of itself: its number, its device, its groups. `context()` finds it from any code in the rank.

The same context stands in a process started by `Ranks`, by `torchrun` and by `accelerate launch`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minillm.ranks.backend import Backend, choose_backend, interface_towards, loopback_interface
from minillm.ranks.board import BOARD_BYTES, Board, Operation
from minillm.ranks.comm import Comm, make_group
from minillm.ranks.shared import open_shared
from minillm.ranks.watch import caller, watch_torch

FOR_EVER = timedelta(days=1)  # where the launching process watches, it ends a job, not the transport
_UNWATCHED = timedelta(minutes=10)  # under torchrun nobody watches: torch's own usual limit


@dataclass
class RankContext:
    """One rank of a job. `device` is where its tensors live; `namespace` is what `%%ranks` cells share."""

    rank: int
    world_size: int
    device: torch.device
    backend: Backend
    store: dist.Store
    board: Board
    nodes: tuple[int, ...] = ()  # the host of each rank, by number
    limit: timedelta = FOR_EVER  # of the transport's own patience
    send_event: Callable[[Any], None] = lambda event: None
    take_posts: Callable[[float], None] = lambda timeout_s: None
    posts: list[Any] = field(default_factory=list)
    namespace: dict[str, Any] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)  # what the engine keeps here between calls
    _comms: dict[str, Comm] = field(default_factory=dict)

    def comm(self, members: tuple[int, ...] | None = None, name: str | None = None, host: bool = False) -> Comm:
        """The engine's collectives over `members` (global ranks in group order; all of them by default).

        All members must ask for it, with the same name. Made on first use and kept. With `host` it carries tensors in
        host memory, by gloo, whatever the ranks compute on.
        """
        members = tuple(range(self.world_size)) if members is None else tuple(members)
        if self.rank not in members:
            raise ValueError(f"rank {self.rank} is not among the members {list(members)} of this group")
        name = name or "-".join(map(str, members)) + " host" * host
        if name not in self._comms:
            place = members.index(self.rank)
            store = dist.PrefixStore(f"comm/{name}", self.store)
            meeting = Operation("comm", f"named {name}", f"make {name}", "", members, caller())
            number, _ = self.board.enter(meeting)
            backend = Backend("gloo", "cpu", 0, self.backend.shared_memory) if host else self.backend
            local = self.on_one_host(members)
            group = make_group(store, place, len(members), backend, local, self.limit)
            shared = None
            if backend.shared_memory and backend.transport == "gloo" and local and len(members) > 1:
                shared = open_shared(dist.PrefixStore("memory", store), place, len(members), self.limit.total_seconds())
            self.board.leave(number)
            self._comms[name] = Comm(name, members, place, self.board, backend, group, shared)
        return self._comms[name]

    def on_one_host(self, members: tuple[int, ...]) -> bool:
        """Whether these ranks are on the same host."""
        return len({self.nodes[member] for member in members}) == 1

    def emit(self, event: Any) -> None:
        """Send something to the `on_event=` of the call that runs here, while it runs."""
        self.board.tick()
        self.send_event(event)

    def posted(self, timeout_s: float = 0.0) -> list[Any]:
        """What the launching process has posted to this rank and was not taken yet; waits for it at most so long."""
        self.take_posts(timeout_s)
        taken, self.posts[:] = list(self.posts), []
        return taken

    def tick(self) -> None:
        """Say that this rank is getting on with long work, so that ranks waiting for it keep waiting."""
        self.board.tick()


_current: RankContext | None = None


def context() -> RankContext:
    """The context of the rank that this code runs in.

    In a process of `torchrun` or `accelerate launch` the first call joins the job. Raises `RuntimeError` elsewhere.
    """
    if _current is None:
        if "TORCHELASTIC_RUN_ID" not in os.environ and not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= set(os.environ):
            raise RuntimeError(
                "this process is no rank: call it inside Ranks.run(…), a %%ranks cell, or under torchrun"
            )
        return _join_launched_job()
    return _current


def set_context(new: RankContext) -> RankContext:
    """Make `new` the context of this process."""
    global _current
    _current = new
    return new


def join(
    rank: int,
    nodes: tuple[int, ...],
    local_rank: int,
    backend: Backend,
    store: dist.Store,
    memory: memoryview | bytearray,
    limit: timedelta = FOR_EVER,
    leader: str = "",
) -> RankContext:
    """Set up torch's default group and the board for this process, and make its context. `nodes` has the host of each rank,
    `leader` the address of rank 0's where there are several.
    """
    world_size = len(nodes)
    device = backend.device(local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if len(set(nodes)) == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_interface())
    elif interface := interface_towards(leader):  # gloo itself takes the one that the host's name leads to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    board = Board(memory)
    bound: dict[str, Any] = {"device_id": device} if backend.transport == "nccl" else {}
    world = dist.PrefixStore("world", store)
    if not dist.is_initialized():  # a script's Accelerator may have done it
        dist.init_process_group(backend.groups, store=world, rank=rank, world_size=world_size, timeout=limit, **bound)
    watch_torch(board, rank)
    return set_context(RankContext(rank, world_size, device, backend, store, board, nodes, limit))


def _join_launched_job() -> RankContext:
    """The context from the environment that `torchrun` and `accelerate launch` set."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    store, _, _ = next(dist.rendezvous("env://", rank, world_size))
    scoped = dist.PrefixStore("minillm", store)
    scoped.set(f"node of {rank}", os.environ.get("GROUP_RANK", str(rank // local_size)))
    nodes = tuple(int(scoped.get(f"node of {number}")) for number in range(world_size))
    backend, leader = choose_backend(local_size), os.environ["MASTER_ADDR"]
    return join(rank, nodes, local_rank, backend, scoped, bytearray(BOARD_BYTES), _UNWATCHED, leader)
