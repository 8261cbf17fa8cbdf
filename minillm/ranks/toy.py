"""Ranks in one process, for learning: threads that take turns, so that a run is always the same and a debugger works.

`ToyComm` has `send`, `recv`, `all_reduce`, `broadcast`, `all_gather`, `all_to_all` and `barrier` of `minillm.ranks.comm.Comm`. A toy
`send` returns only when its message was received, as between GPUs; when nobody can go on, the run ends at once and says
who waits for what. It knows nothing of exercises.
"""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from minillm.ranks.comm import check_splits
from minillm.ranks.places import line_of_error, line_of_frame
from minillm.ranks.toy_world import Letter, Message, Stuck, ToyRun, World
from minillm.ranks.watch import shape_of


class ToyComm:
    """The communicator of one toy rank: `rank`, `size`, and the calls of `Comm`."""

    def __init__(self, world: World, rank: int) -> None:
        self._world, self.rank, self.size = world, rank, world.size

    def send(self, tensor: torch.Tensor, to: int, tag: int = 0) -> None:
        """Send `tensor` to a rank; returns when it was received. Raises `ValueError` for a rank that there is not."""
        self._post(tensor, to, _checked(tag), f"waits for rank {to} to receive")

    def recv(self, tensor: torch.Tensor, source: int, tag: int = 0) -> torch.Tensor:
        """Receive into `tensor`, in place."""
        return self._take(tensor, source, _checked(tag), f"waits to receive from rank {source}")

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place: everything goes to rank 0 and comes back."""
        parts = self._gather(tensor, "all_reduce")
        if parts is not None:
            tensor.copy_(torch.stack(parts).sum(0))
        return self._tell(tensor, "all_reduce")

    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Copy the root's tensor to every rank, in place."""
        return self._tell(tensor, "broadcast", root)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[n, …] on each rank -> [size · n, …] on every rank, in rank order."""
        parts = self._gather(tensor, "all_gather")
        whole = torch.cat(parts) if parts is not None else tensor.new_empty(self.size * len(tensor), *tensor.shape[1:])
        return self._tell(whole, "all_gather")

    def all_to_all(self, tensor: torch.Tensor, send_rows: list[int], recv_rows: list[int]) -> torch.Tensor:
        """Send `send_rows[i]` rows of `tensor` to rank i, receive `recv_rows[i]` from it; rows arrive in rank order."""
        check_splits(self.size, tensor, send_rows, recv_rows)
        going = tensor.split(send_rows)
        coming = [tensor.new_empty(rows, *tensor.shape[1:]) for rows in recv_rows]
        coming[self.rank].copy_(going[self.rank])
        for other in range(self.size):
            what = f"waits in all_to_all for rank {other}"
            if self.rank < other:  # of two ranks the lower one sends first
                self._post(going[other], other, "all_to_all", what)
            if self.rank != other:
                self._take(coming[other], other, "all_to_all", what)
            if self.rank > other:
                self._post(going[other], other, "all_to_all", what)
        return torch.cat(coming)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce(torch.zeros(0))

    def _gather(self, tensor: torch.Tensor, name: str) -> list[torch.Tensor] | None:
        """Every rank's tensor, on rank 0."""
        if self.rank:
            self._post(tensor, 0, name, f"waits in {name} for rank 0")
            return None
        rest = [self._take(torch.empty_like(tensor), other, name, f"waits in {name} for rank {other}") for other in range(1, self.size)]  # fmt: skip
        return [tensor.clone(), *rest]

    def _tell(self, tensor: torch.Tensor, name: str, root: int = 0) -> torch.Tensor:
        """The root's tensor, on every rank."""
        if self.rank != root:
            return self._take(tensor, root, name, f"waits in {name} for rank {root}")
        for other in range(self.size):
            if other != root:
                self._post(tensor, other, name, f"waits in {name} for rank {other}")
        return tensor

    def _post(self, tensor: torch.Tensor, to: int, tag: int | str, what: str) -> None:
        self._check(to, "to")
        letter = Letter(tensor.detach().clone(), self._world.tick())
        self._world.boxes.setdefault((self.rank, to, tag), []).append(letter)
        self._world.woke(to)
        self._world.wait(self.rank, lambda: letter.taken, what, to)

    def _take(self, tensor: torch.Tensor, source: int, tag: int | str, what: str) -> torch.Tensor:
        self._check(source, "source")
        box = self._world.boxes.setdefault((source, self.rank, tag), [])
        self._world.tick()
        self._world.wait(self.rank, lambda: bool(box), what, source)
        letter = box.pop(0)
        letter.taken = True
        self._world.woke(source)
        sent, wanted = shape_of(letter.tensor), shape_of(tensor)
        if letter.tensor.numel() != tensor.numel() or letter.tensor.dtype != tensor.dtype:
            raise ValueError(f"rank {source} sent {sent}, but rank {self.rank} receives into {wanted}")
        name = tag if isinstance(tag, str) else "send"
        message = Message(source, self.rank, letter.tensor.nbytes, letter.sent_at, self._world.tick(), name)
        self._world.run.messages.append(message)
        with torch.no_grad():
            return tensor.copy_(letter.tensor.view(tensor.shape))

    def _check(self, other: int, name: str) -> None:
        if not 0 <= other < self.size:
            raise ValueError(f"{name}={other}: there are ranks 0 to {self.size - 1}")
        if other == self.rank:
            raise ValueError(f"{name}={other}: rank {self.rank} cannot exchange messages with itself")


def _checked(tag: int) -> int:
    if tag < 0:
        raise ValueError(f"tag={tag}: give a number from 0")
    return tag


def run_toy(function: Callable[..., Any], inputs: Sequence[Any], limit_s: float | None = None) -> ToyRun:
    """Call `function(comm, input)` as one rank per input. With `limit_s`, a rank that still runs then is named.

    Such a rank's thread cannot be ended: do that in a process that can.
    """
    world = World(len(inputs))
    threads = [
        threading.Thread(
            target=contextvars.copy_context().run,
            args=(_live, world, rank, function, given),
            daemon=True,
            name=f"rank {rank}",
        )
        for rank, given in enumerate(inputs)
    ]
    for thread in threads:
        thread.start()
    end = None if limit_s is None else time.monotonic() + limit_s
    for thread in threads:
        thread.join(None if end is None else max(0.0, end - time.monotonic()))
    busy = world.turn
    if any(thread.is_alive() for thread in threads) and busy >= 0:
        frame = sys._current_frames().get(threads[busy].ident or 0)
        world.run.endless[busy] = line_of_frame(frame)
    return world.run


def _live(world: World, rank: int, function: Callable[..., Any], given: Any) -> None:
    """A rank's life: wait for the baton, work, leave."""
    with world.baton:
        world.baton.wait_for(lambda: world.turn == rank or world.stuck)
    try:
        world.run.results[rank] = function(ToyComm(world, rank), given)
    except Stuck:
        pass
    except BaseException as error:  # sys.exit too ends this rank, and nothing else
        message = " ".join(f"{type(error).__name__}: {error}".split())
        world.run.errors[rank] = f"{message[:100]} ({line_of_error(error)})"
    finally:
        world.leave(rank)
