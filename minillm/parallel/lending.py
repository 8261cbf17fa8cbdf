"""Instances that borrow, on a rank: what a step does with blocks that lie elsewhere, and who carries the manager's words.

Every rank of an instance has links to the same ranks of the others (`links.py`); the first one also has the account
(`policy/lending.py`). A query that goes out comes back as three small tensors (`distkv/attention.py`) while the rank attends to what it
has itself. When a creditor is lost within a step, the rows that needed it become no numbers: these spread over sums and stages
like any others, no token is drawn from them, and the request starts again.
"""

from __future__ import annotations

from typing import Any

import torch

from minillm.kv.paged import PagedCache
from minillm.model.decoder import Decoder
from minillm.parallel.borrower import Borrower
from minillm.parallel.counter import Counter
from minillm.parallel.door import Door
from minillm.parallel.lending_step import LendingStep
from minillm.parallel.links import Links
from minillm.policy.batch import Batch
from minillm.trace.recorder import Recorder
from minillm.trace.replay import WIRE
from minillm.trace.trace import Kind, Span


class Lending:
    """A rank's ends of all links, for one engine."""

    def __init__(self, door: Door, rank: int, cache: PagedCache) -> None:
        self.door, self.rank, self.cache = door, rank, cache
        self.links = Links(door, rank, cache)
        self.borrower: Borrower | None = None  # on the rank that has the engine
        self.counter = Counter(door, rank, cache, self._hear)
        self._bad: set[int] = set()  # blocks whose content did not come home

    def begin(self, batch: Batch) -> None:
        """What comes before a step: debtors that are gone are heard no more, blocks come home, and others begin to leave."""
        self.counter.over(batch.over)
        for move in sorted(batch.moves, key=lambda move: not move.home):
            if move.home:
                if not self.links.fetch(move.away.creditor, move.blocks, move.away.blocks):
                    self._bad |= set(move.blocks)
            else:
                self.links.move(move.away.creditor, move.blocks, move.away.blocks)

    def through(
        self, model: Decoder, x: torch.Tensor, batch: Batch, cache: PagedCache, recorder: Recorder
    ) -> torch.Tensor:
        """Through all layers, as `Decoder.through`."""
        if self._bad:  # blocks that are written anew from their beginning are good again
            size = cache.block_size
            self._bad -= {
                c.block_table[at // size] for c in batch.chunks for at in range(c.start, c.end) if at % size == 0
            }
        step = LendingStep(self.links, model, batch, cache, self._bad)
        for layer in model.layers:
            x = layer(x, step, cache)
        if recorder.open is not None:
            recorder.open.sent += step.sent
        return x

    def settle(self, recorder: Recorder, step: int) -> None:
        """What comes after a step: blocks that left have arrived."""
        self.links.settle()
        moved, self.links.moved = self.links.moved, []
        for creditor, count, began_s, ended_s in moved:
            times = (began_s, ended_s) if recorder.timing else (0.0, 0.0)
            name = f"blocks to {creditor}"
            recorder.add(Span(recorder.rank, Kind.COMMUNICATION, name, *times, step, WIRE, message_bytes=count))

    def close(self) -> None:
        """Lend and borrow no more."""
        self.counter.close()
        self.links.close()

    def _hear(self, what: str, debtor: int, details: dict[str, Any]) -> Any:
        return self.borrower.hear(what, debtor, details) if self.borrower is not None else None
