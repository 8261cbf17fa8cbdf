"""Instances that borrow, on a rank: what a step does with blocks that lie elsewhere, and who carries the manager's words.

Every rank of an instance has links to the same ranks of the others (`links.py`); the first one also has the account
(`policy/lending.py`). A query that goes out comes back as three small tensors (`distkv/attention.py`) while the rank attends to what it
has itself. When a creditor is lost within a step, the rows that needed it become no numbers: these spread over sums and stages
like any others, no token is drawn from them, and the request starts again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from minillm.distkv.attention import Partial
from minillm.kv.paged import PagedCache
from minillm.model.attention import Step, attention
from minillm.model.decoder import Decoder
from minillm.parallel.links import (
    Counter,
    Door,
    Link,
    LinkLost,
    Links,
    Reading,
    answer_shape,
    answer_type,
    recv_tensor,
    say,
    send_tensor,
)
from minillm.policy.batch import Batch, Chunk
from minillm.policy.lending import Ask, CalledBack, Heartbeat, Returned, RManager, Unclaimed
from minillm.policy.options import EngineOptions
from minillm.policy.scheduler import Scheduler
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


class LendingStep:
    """What all layers of one forward pass share when some sequences have blocks elsewhere."""

    def __init__(self, links: Links, model: Decoder, batch: Batch, cache: PagedCache, bad: set[int]) -> None:
        device, size = model.device, cache.block_size
        begins = [end - len(chunk.token_ids) for chunk, end in zip(batch.chunks, batch.ends)]
        far = [n for n, chunk in enumerate(batch.chunks) if chunk.away]
        near = [n for n, chunk in enumerate(batch.chunks) if not chunk.away]
        self.cos, self.sin = model.turn(torch.tensor(batch.positions, device=device))
        self.heads, self.sent, self.device = model.config.heads, 0, device
        rows = lambda some: [begins[n] + at for n in some for at in range(len(batch.chunks[n].token_ids))]  # noqa: E731
        self.near, self.far = (torch.tensor(rows(some), dtype=torch.int64, device=device) for some in (near, far))
        self.spoiled = torch.tensor(
            rows([n for n in near if bad & set(batch.chunks[n].block_table)]), dtype=torch.int64, device=device
        )
        self.plain = None
        if near:
            only = Batch(tuple(batch.chunks[n] for n in near))
            self.plain = Step.of(only, size, self.cos[self.near], self.sin[self.near], model.reference_attention)
        chunks = [batch.chunks[n] for n in far]
        places = [(c.block_table[at // size], at % size) for c in chunks for at in range(c.start, c.end)]
        self.blocks, self.offsets = torch.tensor(places, dtype=torch.int64, device=device).view(-1, 2).unbind(1)
        self.local = _reading(chunks, size, device) if far else None
        self.asked = [
            Asked(links.to(creditor), creditor, chunks, model.config.layers, self.heads, device)
            for creditor in _creditors(chunks)
        ]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: PagedCache) -> torch.Tensor:
        """Put K and V into the cache and attend: queries go out, the rank reads what it has, and the answers are merged."""
        k, v = (
            torch.nan_to_num(k),
            torch.nan_to_num(v),
        )  # of rows that are lost; later holders of a block must find numbers there
        if self.local is None and self.plain is not None:
            return _spoil(attention(layer, q, k, v, self.plain, cache), self.spoiled)
        cache.write(layer, self.blocks, self.offsets, k[self.far], v[self.far])
        asking = q[self.far]
        for each in self.asked:
            self.sent += each.send(asking)
        out = torch.empty_like(q)
        if self.plain is not None:
            out[self.near] = attention(layer, q[self.near], k[self.near], v[self.near], self.plain, cache)
        assert self.local is not None
        total = self.local.attend(asking, cache.keys[layer], cache.values[layer])
        for each in self.asked:
            each.merge(total)
        out[self.far] = total.finish().to(q.dtype)
        return _spoil(out, self.spoiled)


class Asked:
    """What one creditor is asked in a step: all queries of the sequences that have blocks there."""

    def __init__(
        self, link: Link, creditor: int, chunks: Sequence[Chunk], layers: int, heads: int, device: torch.device
    ) -> None:
        self.link, self.heads, self.said, self.layers = link, heads, False, layers
        at = 0
        places: list[int] = []
        self.rows: list[int] = []
        self.blocks: list[list[int]] = []
        for chunk in chunks:
            count = len(chunk.token_ids)
            blocks = [block for each in chunk.away if each.creditor == creditor for block in each.blocks]
            if blocks:
                places += range(at, at + count)
                self.rows.append(count)
                self.blocks.append(blocks)
            at += count
        self.places = torch.tensor(places, dtype=torch.int64, device=device)

    def send(self, q: torch.Tensor) -> int:
        """Send the queries of a layer, before those of the first which blocks they are for; returns their bytes."""
        with suppress(LinkLost), self.link.guarded():
            wire = self.link.use()
            if not self.said:
                say(wire, "step", rows=self.rows, blocks=self.blocks, heads=self.heads, layers=self.layers)
                self.said = True
            sent = send_tensor(wire, q[self.places])
            self.link.traffic.queries += sent
            return sent
        return 0

    def merge(self, total: Partial) -> None:
        """Take the answers into what is known; without answers it is no number any more."""
        shape = answer_shape(len(self.places), self.heads, total.o.shape[-1])
        try:
            with self.link.guarded():
                came = recv_tensor(self.link.use(), shape, answer_type(total.o.dtype), total.o.device)
        except LinkLost:
            total.o[self.places] = torch.nan
            return
        self.link.traffic.answers += came.nbytes
        merged = Partial(total.o[self.places], total.m[self.places], total.l[self.places]).merge(Partial.unpack(came))
        total.o[self.places], total.m[self.places], total.l[self.places] = merged.o, merged.m, merged.l


def _spoil(out: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if len(rows):
        out[rows] = torch.nan
    return out


def _creditors(chunks: Sequence[Chunk]) -> list[int]:
    return sorted({away.creditor for chunk in chunks for away in chunk.away})


def _reading(chunks: Sequence[Chunk], block_size: int, device: torch.device) -> Reading:
    """How these chunks find what is here of their sequences."""
    away = [sum(len(each.blocks) for each in chunk.away) for chunk in chunks]
    here = [chunk.block_table[gone : -(-chunk.end // block_size)] for chunk, gone in zip(chunks, away)]
    starts = [chunk.start - gone * block_size for chunk, gone in zip(chunks, away)]
    return Reading.of([len(chunk.token_ids) for chunk in chunks], here, block_size, device, starts)


class Borrower:
    """The account of an instance, and its voice: it carries what the manager wants to say to others, and what they say to it. One lock
    is for all that touches the account and the scheduler, since others are answered while a step is computed.
    """

    def __init__(self, lending: Lending, scheduler: Scheduler, options: EngineOptions) -> None:
        self.lock = threading.RLock()
        self.lending, self.scheduler = lending, scheduler
        most = scheduler.pool.num_blocks if options.most_lent is None else options.most_lent
        self.manager = RManager(lending.door.party, scheduler, most, options.on_demand, options.move_blocks)
        lending.borrower = self

    def negotiate(self, now_s: float) -> None:
        """Before a step: ask others for room, answer what they call for, and tell them what they are to know."""
        with self.lock:
            asks = self.manager.asks(now_s)
        for ask in asks:
            blocks = self._ask(ask)
            with self.lock:
                if not self.manager.granted(ask, tuple(blocks)) and ask.firm:
                    break
        with self.lock:
            self.manager.settle()
        self.tell()

    def tell(self) -> None:
        """Tell others what they are to know."""
        with self.lock:
            notices = self.manager.notices()
        for notice in notices:
            to = (
                notice.away.creditor
                if isinstance(notice, Returned)
                else notice.debtor
                if isinstance(notice, CalledBack)
                else notice.creditor
            )
            try:
                if isinstance(notice, Returned):
                    self._to(to).ask("returned", False, blocks=notice.away.blocks)
                elif isinstance(notice, Unclaimed):
                    self._to(to).ask("unclaimed", False)
                else:
                    self._to(to).ask("called back", False, blocks=notice.blocks, age=notice.age)
            except LinkLost:
                self.lost(to)

    def lost(self, party: int) -> None:
        """An instance is gone, or has broken its word: there is nothing between the two any more."""
        with self.lock:
            self.manager.lost(party)
        self._to(party).close()

    def hear(self, what: str, party: int, details: dict[str, Any]) -> Any:
        """What another instance says, on a thread of its own."""
        with self.lock:
            if what == "lost":
                self.manager.lost(party)
            elif party in self.manager.gone:
                raise LinkLost(f"instance {party} has been given up")
            if what == "ask":
                ask = Ask(
                    self.manager.number,
                    details["request_id"],
                    details["blocks"],
                    tuple(details["age"]),
                    details["firm"],
                )
                return self.manager.try_move_kvcache(party, ask, time.monotonic())
            if what == "returned":
                self.manager.take_back(party, details["blocks"])
            elif what == "unclaimed":
                self.manager.unclaimed(party)
            elif what == "called back":
                self.manager.called_back(
                    party, CalledBack(self.manager.number, details["blocks"], tuple(details["age"]))
                )
            return None

    def follow(self, view: dict[int, int], beyond: int, moves: Sequence[tuple[int, int, int]]) -> None:
        """What the global manager says: what others would lend, all that they lend at most, and moves (request, blocks, creditor)."""
        with self.lock:
            self.manager.view = {party: room for party, room in view.items() if party != self.manager.number}
            self.scheduler.beyond = beyond
            for move in moves:
                self.manager.move_kvcache(*move)

    def attach(self, batch: Batch) -> Batch:
        """The batch, with what has to be done before it."""
        return replace(batch, moves=self.manager.moves(), over=self.manager.over())

    def landed(self, batch: Batch, unheard: Sequence[Chunk]) -> None:
        """A batch is back; of some chunks the answers of others are missing, so these are taken for lost."""
        self.manager.landed(batch.moves)
        for party in _creditors(unheard):
            self.lost(party)

    def heartbeat(self) -> Heartbeat:
        """How the instance stands."""
        with self.lock:
            return self.manager.heartbeat()

    def _ask(self, ask: Ask) -> Sequence[int]:
        try:
            return self._to(ask.creditor).ask(
                "ask", request_id=ask.request_id, blocks=ask.blocks, age=ask.age, firm=ask.firm
            )
        except LinkLost:
            self.lost(ask.creditor)
            return ()

    def _to(self, party: int) -> Link:
        return self.lending.links.to(party, "words")
