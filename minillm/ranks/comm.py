"""The collectives that the engine uses, over one group of ranks, each counted and published before it waits.

A `Comm` owns a process group of its own, made under a prefix of the job's store: it never touches torch's global
world, so the ranks of one instance can die and come back while other instances go on.
It does not know what the tensors mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from minillm.ranks.backend import Backend
from minillm.ranks.board import Board, Operation, State
from minillm.ranks.rows import all_to_all
from minillm.ranks.shared import SharedMemory
from minillm.ranks.transfers import Follower, Transfer
from minillm.ranks.watch import caller, p2p_channels, shape_of, wait_for_device


@dataclass
class Count:
    """How often an operation ran, and the bytes of message this rank put in."""

    calls: int = 0
    bytes: int = 0


class _Over:
    """The work of a collective in a group of one."""

    def wait(self) -> None:
        """Nothing is left to do."""


@dataclass
class Comm:
    """A group of ranks that communicate. `members` are global ranks, in group order; tensors are on `device`.

    `isend`, `irecv`, `iall_reduce` and `iall_to_all` return at once, all others wait. All members must call alike, but for the
    four that go from one rank to another. Peers and roots are numbered within the group. `counts` maps the operation's name to its `Count`.
    """

    name: str
    members: tuple[int, ...]
    rank: int  # within the group
    board: Board
    backend: Backend
    group: Any = None  # torch process group; None for a group of one
    shared: SharedMemory | None = None  # carries all that is waited for but reduce_scatter, where it is there
    counts: dict[str, Count] = field(default_factory=dict)
    collectives: int = 0  # how many have begun, the same on all members
    _followers: dict[tuple[str, int], Follower] = field(default_factory=dict)
    _operations: dict[Any, Operation] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The number of ranks in the group."""
        return len(self.members)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over the group, in place; every rank gets the same sum. Message: the tensor's bytes."""
        buffer = self._stage(tensor)
        by_memory = lambda memory: memory.all_reduce(buffer)  # noqa: E731
        self._run("all_reduce", tensor, tensor, lambda: self.group.allreduce([buffer]), by_memory)
        return self._unstage(buffer, tensor)

    def iall_reduce(self, tensor: torch.Tensor) -> Transfer:
        """Start to sum `tensor` over the group in place, by the transport, and return at once; leave it unchanged until the
        transfer is over.
        """
        operation = Operation("iall_reduce", shape_of(tensor), f"comm {self.name}", "", self.members, caller())
        self._count("all_reduce", tensor)
        self.collectives += 1
        buffer = self._stage(tensor)
        _, index = self.board.enter(operation, State.ISSUED)
        work = self.group.allreduce([buffer]) if self.group else _Over()
        finish = lambda: self._unstage(buffer, tensor)  # noqa: E731
        return self._follow(Transfer(operation, index, self.board, buffer, work, finish), "all_reduce", self.rank)

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Copy the root's `tensor` to every rank, in place. Message: the tensor's bytes at the root, 0 elsewhere."""
        options = dist.BroadcastOptions()
        options.rootRank = root
        buffer = self._stage(tensor)
        sent = tensor if self.rank == root else None
        by_memory = lambda memory: memory.broadcast(buffer, root)  # noqa: E731
        start = lambda: self.group.broadcast([buffer], options)  # noqa: E731
        self._run("broadcast", tensor, sent, start, by_memory, f" root={root}")
        return self._unstage(buffer, tensor)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n, …] on each rank -> [size · n, …] on every rank, in group order. All ranks give the same shape."""
        buffer = self._stage(tensor.contiguous())
        result = buffer.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        by_memory = lambda memory: memory.all_gather(result, buffer)  # noqa: E731
        self._run("all_gather", tensor, tensor, lambda: self.group._allgather_base(result, buffer), by_memory)
        return (result if self.size > 1 else buffer.clone()).to(tensor.device)

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """[size · n, …] on each rank -> this rank's [n, …] slice of the sum over ranks.

        Raises `ValueError` when the first dimension is no multiple of the group's size.
        """
        if tensor.shape[0] % self.size:
            raise ValueError(
                f"reduce_scatter of {tensor.shape[0]} rows over {self.size} ranks: give a multiple of {self.size}"
            )
        buffer = self._stage(tensor.contiguous())
        result = buffer.new_empty(tensor.shape[0] // self.size, *tensor.shape[1:])
        self._run("reduce_scatter", tensor, tensor, lambda: self.group._reduce_scatter_base(result, buffer))
        return (result if self.size > 1 else buffer.clone()).to(tensor.device)

    def all_to_all(self, tensor: torch.Tensor, send_rows: list[int], recv_rows: list[int]) -> torch.Tensor:
        """Send `send_rows[i]` rows of `tensor` to rank i, receive `recv_rows[i]` from it; rows arrive in rank order.

        Raises `ValueError` when the splits do not cover the tensor.
        """
        check_splits(self.size, tensor, send_rows, recv_rows)
        buffer = self._stage(tensor.contiguous())
        result = buffer.new_empty(sum(recv_rows), *tensor.shape[1:])
        by_memory = lambda memory: all_to_all(memory, result, buffer, send_rows, recv_rows)  # noqa: E731
        start = lambda: self.group.alltoall_base(result, buffer, recv_rows, send_rows)  # noqa: E731
        self._run("all_to_all", None, tensor, start, by_memory)
        return (result if self.size > 1 else buffer.clone()).to(tensor.device)

    def iall_to_all(self, tensor: torch.Tensor, send_rows: list[int], recv_rows: list[int]) -> Transfer:
        """Start an `all_to_all`, and return at once; leave the tensor unchanged until the transfer is over, whose `wait` returns
        the rows that came.
        """
        check_splits(self.size, tensor, send_rows, recv_rows)
        operation = Operation("iall_to_all", "", f"comm {self.name}", "", self.members, caller())
        self._count("all_to_all", tensor)
        self.collectives += 1
        buffer = self._stage(tensor.contiguous())
        result = buffer.new_empty(sum(recv_rows), *tensor.shape[1:])
        _, index = self.board.enter(operation, State.ISSUED)
        if self.group is None:
            result, work = buffer.clone(), _Over()
        else:
            work = self.group.alltoall_base(result, buffer, recv_rows, send_rows)
        transfer = Transfer(operation, index, self.board, buffer, work, lambda: result.to(tensor.device))
        return self._follow(transfer, "all_to_all", self.rank)

    def barrier(self) -> None:
        """Wait until every rank of the group is here."""
        self._run("barrier", None, None, lambda: self.group.barrier())

    def send(self, tensor: torch.Tensor, to: int, tag: int = 0) -> None:
        """Send `tensor` to a rank of the group; returns when the buffer may be reused. Raises `ValueError` for no such rank."""
        self._check_peer(to, "to")
        mine, theirs = p2p_channels(self.name, self.members[self.rank], self.members[to], tag)
        operation = Operation("send", shape_of(tensor), mine, theirs, (self.members[to],), caller())
        self._count("send", tensor)
        number, _ = self.board.enter(operation)
        self.group.send([self._stage(tensor.contiguous())], to, tag).wait()
        wait_for_device()
        self.board.leave(number)

    def recv(self, tensor: torch.Tensor, source: int, tag: int = 0) -> torch.Tensor:
        """Receive into `tensor`, in place, from a rank of the group. Raises `ValueError` for no such rank."""
        self._check_peer(source, "source")
        theirs, mine = p2p_channels(self.name, self.members[source], self.members[self.rank], tag)
        self._count("recv", None)
        operation = Operation("recv", shape_of(tensor), mine, theirs, (self.members[source],), caller())
        buffer = self._stage(tensor)
        number, _ = self.board.enter(operation)
        self.group.recv([buffer], source, tag).wait()
        wait_for_device()
        self.board.leave(number)
        return self._unstage(buffer, tensor)

    def isend(self, tensor: torch.Tensor, to: int, tag: int = 0) -> Transfer:
        """Start to send `tensor`, and return at once; leave it unchanged until the transfer is over."""
        self._check_peer(to, "to")
        mine, theirs = p2p_channels(self.name, self.members[self.rank], self.members[to], tag)
        operation = Operation("isend", shape_of(tensor), mine, theirs, (self.members[to],), caller())
        self._count("send", tensor)
        buffer = self._stage(tensor)
        _, index = self.board.enter(operation, State.ISSUED)
        work = self.group.send([buffer], to, tag)
        return self._follow(Transfer(operation, index, self.board, buffer, work, lambda: tensor), "send", to)

    def irecv(self, tensor: torch.Tensor, source: int, tag: int = 0) -> Transfer:
        """Start to receive into `tensor`, and return at once; the transfer's `wait` returns it filled."""
        self._check_peer(source, "source")
        theirs, mine = p2p_channels(self.name, self.members[source], self.members[self.rank], tag)
        operation = Operation("irecv", shape_of(tensor), mine, theirs, (self.members[source],), caller())
        self._count("recv", None)
        buffer = self._stage(tensor)
        _, index = self.board.enter(operation, State.ISSUED)
        work = self.group.recv([buffer], source, tag)
        finish = lambda: self._unstage(buffer, tensor)  # noqa: E731
        return self._follow(Transfer(operation, index, self.board, buffer, work, finish), "recv", source)

    def _follow(self, transfer: Transfer, direction: str, peer: int) -> Transfer:
        """Have it followed by the thread of this direction and peer."""
        if (direction, peer) not in self._followers:
            self._followers[direction, peer] = Follower(transfer.buffer.device)
        return self._followers[direction, peer].take(transfer)

    def _run(
        self,
        name: str,
        agreed: torch.Tensor | None,
        sent: torch.Tensor | None,
        start: Callable[[], Any],
        by_memory: Callable[[SharedMemory], None] | None = None,
        extra: str = "",
    ) -> None:
        """Count, publish, wait: for the transport, or for the shared memory where there is one. A group of one has nothing
        to do.
        """
        self._count(name, sent)
        self.collectives += 1
        if self.group is None:
            return
        number, _ = self.board.enter(self._operation(name, agreed, extra))
        if by_memory is not None and self.shared is not None:
            by_memory(self.shared)
        else:
            start().wait()
            wait_for_device()
        self.board.leave(number)

    def _operation(self, name: str, agreed: torch.Tensor | None, extra: str) -> Operation:
        """The notice of a collective; the same call is noted the same way, layer after layer."""
        key = (
            name,
            agreed.shape if agreed is not None else None,
            agreed.dtype if agreed is not None else None,
            extra,
            caller(),
        )
        if key not in self._operations:
            if len(self._operations) > 1000:
                self._operations.clear()
            signature = (shape_of(agreed) if agreed is not None else "") + extra
            self._operations[key] = Operation(name, signature, f"comm {self.name}", "", self.members, key[-1])
        return self._operations[key]

    def _check_peer(self, other: int, name: str) -> None:
        if not 0 <= other < self.size:
            raise ValueError(f"{name}={other}: this group has ranks 0 to {self.size - 1}")
        if other == self.rank:
            raise ValueError(f"{name}={other}: rank {self.rank} cannot exchange messages with itself")

    def _count(self, name: str, sent: torch.Tensor | None) -> None:
        count = self.counts.setdefault(name, Count())
        count.calls += 1
        count.bytes += sent.numel() * sent.element_size() if sent is not None else 0

    def _stage(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor that the transport sees: itself, or a copy where it is not: gloo wants host memory, NCCL the GPU's."""
        if self.backend.transport == "nccl":
            return tensor.cuda().contiguous()
        return tensor.cpu().contiguous() if self.backend.staged else tensor.contiguous()

    def _unstage(self, buffer: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(buffer) if buffer is not tensor else tensor


def check_splits(size: int, tensor: torch.Tensor, send_rows: list[int], recv_rows: list[int]) -> None:
    """Raise `ValueError` for splits of an all-to-all that do not cover the tensor, or are not one for each rank."""
    if sum(send_rows) != tensor.shape[0]:
        raise ValueError(f"all_to_all: send_rows={send_rows} for {tensor.shape[0]} rows")
    for name, rows in (("send_rows", send_rows), ("recv_rows", recv_rows)):
        if len(rows) != size:
            raise ValueError(f"all_to_all: {name}={rows} needs {size} numbers, one for each rank")


def make_group(store: dist.Store, rank: int, size: int, backend: Backend, local: bool, limit: timedelta) -> Any:
    """A raw torch process group that meets in `store`; `local` binds it to the loopback interface. None for one rank."""
    if size == 1:
        return None
    if backend.transport == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        return dist.ProcessGroupNCCL(store, rank, size, options)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = limit
    if local:
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
    elif interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        options._devices = [gloo.create_device(interface=interface)]
    else:
        options._devices = [gloo.create_default_device()]
    return gloo(store, rank, size, options)
