"""Messages under way: started without waiting, followed by a thread that notes when each is over.

Gloo does not say that a message has arrived until somebody waits for it, so somebody does: one thread for each peer and
direction, which sleeps in the transport and holds no interpreter lock there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch

from minillm.ranks.board import Board, Operation


@dataclass(eq=False)
class Transfer:
    """One message under way. Until it is over, `buffer` belongs to the transport.

    `began_s` and `ended_s` are on the monotonic clock; `ended_s` is None while it is under way.
    """

    operation: Operation
    index: int
    board: Board
    buffer: torch.Tensor
    work: Any
    finish: Callable[[], torch.Tensor]
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float | None = None
    error: BaseException | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""
        return self._over.is_set()

    def wait(self) -> torch.Tensor:
        """Wait until it is over, on the board too; returns the tensor. Raises what the transport raised."""
        if not self.done:
            number = self.board.wait(self.operation, self.index)
            self._over.wait()
            if self.error is None:
                self.board.leave(number)
            else:
                self.board.fail(number)
        if self.error is not None:
            raise self.error
        return self.finish()

    def follow(self) -> None:
        """Sleep until the transport is through with it."""
        try:
            self.work.wait()
            if self.buffer.is_cuda:
                torch.cuda.current_stream().synchronize()
        except BaseException as error:
            self.error = error
        self.ended_s = time.monotonic()
        self._over.set()


class Follower:
    """The thread behind the messages of one peer in one direction, which are over in the order in which they began."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._transfers: SimpleQueue[Transfer] = SimpleQueue()
        threading.Thread(target=self._run, name="minillm messages", daemon=True).start()

    def take(self, transfer: Transfer) -> Transfer:
        """Follow it from now on."""
        self._transfers.put(transfer)
        return transfer

    def _run(self) -> None:
        if (
            self._device.type == "cuda"
        ):  # a stream of its own, so that it waits for messages and not for what is computed
            torch.cuda.set_stream(torch.cuda.Stream(self._device))
        while True:
            self._transfers.get().follow()
