"""How the messages within a step are recorded: as bytes of the step, or each as a span of its own that cuts the step in pieces.

While a rank waits for a message it gives the baton away, so that where one rank computes at a time another one can.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from minillm.ranks.comm import Comm
from minillm.ranks.transfers import Transfer
from minillm.trace.recorder import Recorder
from minillm.trace.replay import WIRE
from minillm.trace.trace import Kind, Span


class Wire:
    """What a rank's groups send through. `recorder` has the step that is computed, if one is; `baton` is held meanwhile."""

    def __init__(self) -> None:
        self.recorder = Recorder()
        self.baton: AbstractContextManager[Any] = nullcontext()

    def message(self, name: str, message_bytes: int, comm: Comm) -> AbstractContextManager[None]:
        """What stands inside is spent on a message that is waited for."""
        span = self.recorder.open
        if span is None:
            return nullcontext()
        if not self.recorder.details:
            span.sent += message_bytes
            return nullcontext()
        return self._cut(name, message_bytes, comm)

    @contextmanager
    def _cut(self, name: str, message_bytes: int, comm: Comm) -> Iterator[None]:
        span = self.recorder.open
        assert span is not None
        with span.message(name, group=comm.name, sequence=comm.collectives, message_bytes=message_bytes):
            self.baton.__exit__(None, None, None)
            yield
            self.baton.__enter__()

    def begun(self, message_bytes: int) -> None:
        """A message has begun to leave, and the step goes on."""
        if self.recorder.open is not None:
            self.recorder.open.send(message_bytes)

    def finish(self, name: str, transfer: Transfer, comm: Comm, sequence: int, message_bytes: int) -> torch.Tensor:
        """Wait for a collective that has begun, the group's `sequence`-th; it is recorded on the lane of messages."""
        span = self.recorder.open
        if span is None:
            return transfer.wait()
        with span.waiting(name, group=comm.name, sequence=sequence):
            self.baton.__exit__(None, None, None)
            x = transfer.wait()
            self.baton.__enter__()
        if self.recorder.details:
            times = (transfer.began_s, transfer.ended_s or 0.0) if self.recorder.timing else (0.0, 0.0)
            about = {
                "step": span.step,
                "lane": WIRE,
                "group": comm.name,
                "sequence": sequence,
                "message_bytes": message_bytes,
            }
            self.recorder.add(Span(self.recorder.rank, Kind.COMMUNICATION, name, *times, **about))  # type: ignore[arg-type]
        return x
