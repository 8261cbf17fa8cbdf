"""What a rank of a prefill or decode instance has besides its part of the model: a sender, a receiver, and a desk where others ask.

The rank that leads an instance tells the others which caches to pull, and hears from them when all has come. No step is needed for
that: everything moves between desks, in threads, while the ranks compute.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from minillm.disagg.pair import SENDER, Pair
from minillm.disagg.receiver import Receiver, Stub
from minillm.disagg.routes import Route, routes_between
from minillm.disagg.sender import Sender, Wanted
from minillm.engine.handing import Handing, guard
from minillm.kv.paged import PagedCache
from minillm.model.config import ModelConfig
from minillm.model.decoder import Decoder
from minillm.parallel.desk import Desk
from minillm.parallel.door import Door, LinkLost, say
from minillm.parallel.layout import Layout
from minillm.parallel.links import Link
from minillm.parallel.member import Member, Seat
from minillm.parallel.messages import Source
from minillm.parallel.pipeline import Elsewhere
from minillm.parallel.shards import Shard
from minillm.policy.admission import GATES
from minillm.policy.batch import Batch
from minillm.policy.options import EngineOptions
from minillm.ranks.membership import context
from minillm.trace.recorder import Recorder
from minillm.trace.replay import WIRE
from minillm.trace.trace import Kind, Span

TRIES = 3  # to tell the first rank something


class Handover(Desk):
    """One rank's share in handing requests over, of an instance with this `layout`."""

    def __init__(
        self, door: Door, rank: int, layout: Layout, config: ModelConfig, cache: PagedCache, options: EngineOptions
    ) -> None:
        shard = Shard(config, layout, rank)
        line = (layout.coordinates(rank)["cp"], layout.cp)
        self.door, self.rank, self.layout, self.config = door, rank, layout, config
        self.sender = Sender(cache, options.kv_transfer == "layer", options.link_gbits)
        self.backend = context().backend
        stub = Stub(shard.layers.start, shard.kv_heads.start, line)
        self.receiver = Receiver(door, cache, stub, self._over, self.backend if options.kv_wire == "group" else None)
        self.leader: Leader | None = None
        self._routes: dict[
            str, tuple[list[Route], list[tuple[int, int]]]
        ] = {}  # to this rank, and where their sources begin
        self._hooks: list[Any] = []
        self._first = Link(door, door.party, 0)
        self._speaking = threading.Lock()
        super().__init__(door, rank)

    def begin(self, batch: Batch) -> None:
        """A step begins."""
        self.sender.begin(batch)

    def settle(self, recorder: Recorder, step: int) -> None:
        """A step is over: what left meanwhile is recorded."""
        self.sender.settle()
        self.record(recorder, step)

    def record(self, recorder: Recorder, step: int = 0) -> None:
        """Record what has left since the last time."""
        while self.sender.sent:
            each = self.sender.sent.popleft()
            times = (each.begin_s, each.end_s) if recorder.timing else (0.0, 0.0)
            about: dict[str, Any] = {"message_bytes": each.bytes, "request_ids": (each.request_id,)}
            recorder.add(Span(recorder.rank, Kind.COMMUNICATION, "KV cache", *times, step, WIRE, **about))

    def handle(self, link: Connection, what: str, message: dict[str, Any]) -> None:
        if what == "want":
            places = {name: tuple(message.pop(name)) for name in ("layers", "heads", "line")}
            self.sender.want(link, Wanted(**message, **places))  # type: ignore[arg-type]
        elif what == "room":
            self.sender.share(link, self.door.folder / Path(message["name"]).name)
        elif what == "pair":
            path = self.door.folder / Path(message["name"]).name
            self.sender.pairs[link] = Pair(path, SENDER, self.backend, self.sender.cache.keys.device)
        elif what == "free":
            self.sender.rooms[link].give(message["slot"])
        elif what == "unwant":
            self.sender.forget(link, message["transfer"])
        elif what == "pull":
            self.pull(**message)
        elif what == "stop":
            self.receiver.stop(message["transfer"])
            say(link, "answer", value=True)
        elif what == "over" and self.leader is not None:
            self.leader.over(message["rank"], message["transfer"], message["came"])

    def left(self, link: Connection, party: int) -> None:
        self.sender.forget(link)

    def pull(
        self, transfer: int, request_id: int, reading: int, party: int, layout: str, blocks: Sequence[int]
    ) -> None:
        """Get this rank's part of a cache that a party with this layout has."""
        if layout not in self._routes:
            source = Layout.parse(layout)
            routes = [each for each in routes_between(self.config, source, self.layout) if each.target == self.rank]
            shards = [Shard(self.config, source, route.source) for route in routes]
            self._routes[layout] = routes, [(shard.layers.start, shard.kv_heads.start) for shard in shards]
        self.receiver.pull(transfer, request_id, reading, party, *self._routes[layout], blocks)

    def watch(self, model: Decoder) -> None:
        """Hear of each layer that is computed."""
        layers = [layer for layer in model.layers if not isinstance(layer, Elsewhere)]
        for number, layer in enumerate(layers):
            hook = layer.register_forward_hook(lambda *_, number=number: self.sender.layer_done(number))
            self._hooks.append(hook)

    def close(self) -> None:
        super().close()
        for hook in self._hooks:
            hook.remove()
        self.receiver.close()
        self._first.close()

    def _over(self, transfer: int, came: bool) -> None:
        """A transfer to this rank is over: the first one is told."""
        if self.leader is not None:
            self.leader.over(self.rank, transfer, came)
            return
        with self._speaking:
            for _ in range(TRIES):
                try:
                    self._first.ask("over", False, rank=self.rank, transfer=transfer, came=came)
                    return
                except LinkLost:
                    self._first = Link(self.door, self.door.party, 0)


@dataclass
class Expected:
    """A transfer under way to an instance: of which request, and which ranks have not told that they have all."""

    request_id: int
    ranks: set[int]


class Leader:
    """What the rank that has the engine does besides: it starts and stops transfers on all ranks of the instance, and knows which
    requests have come.
    """

    def __init__(self, handover: Handover) -> None:
        self.handover = handover
        self.sources: dict[int, Source] = {}  # of requests that are to come
        self._links = [Link(handover.door, handover.door.party, rank) for rank in range(handover.layout.world_size)]
        self._numbers = count()
        self._expected: dict[int, Expected] = {}  # by transfer
        self._transfers: dict[int, int] = {}  # of each request the one that counts
        self._news: deque[tuple[int, int, bool]] = deque()  # (transfer, request, whether it came)
        self._lock = threading.Lock()
        handover.leader = self

    def expect(self, request_id: int, blocks: Sequence[int]) -> None:
        """Blocks are free for a request: let all ranks get what they hold of it. Raises `LinkLost` when one does not listen."""
        source, transfer = self.sources[request_id], next(self._numbers)
        with self._lock:
            self._expected[transfer] = Expected(request_id, set(range(len(self._links))))
            self._transfers[request_id] = transfer
        about: dict[str, Any] = {"transfer": transfer, "request_id": request_id}
        about |= {"party": source.party, "layout": source.layout, "reading": source.reading, "blocks": list(blocks)}
        for link in self._links[1:]:
            link.ask("pull", False, **about)
        self.handover.pull(**about)

    def over(self, rank: int, transfer: int, came: bool) -> None:
        """A rank has what it wanted, or will not get it."""
        with self._lock:
            expected = self._expected.get(transfer)
            if expected is None:
                return
            expected.ranks.discard(rank)
            if not (expected.ranks and came):
                del self._expected[transfer]
                self._news.append((transfer, expected.request_id, came))

    def news(self) -> list[tuple[int, bool]]:
        """The requests whose caches have come since the last time, or have not."""
        with self._lock:
            told, self._news = self._news, deque()
            found = [(request, came) for transfer, request, came in told if self._transfers.get(request) == transfer]
            for request_id, came in found:
                if came:
                    del self._transfers[request_id]
                    self.sources.pop(request_id, None)
        return found

    def stop(self, request_id: int) -> None:
        """A request is not to come any more: when this returns nothing more is written. Raises `LinkLost` when that is not sure."""
        self.sources.pop(request_id, None)
        with self._lock:
            transfer = self._transfers.pop(request_id, None)
            self._expected.pop(transfer if transfer is not None else -1, None)
        if transfer is None:
            return
        for link in self._links[1:]:
            link.ask("stop", transfer=transfer)
        self.handover.receiver.stop(transfer)


def equip(seat: Seat, member: Member, rank: int, door: Door) -> None:
    """Let an engine of a rank hand requests over, and take some."""
    config, cache = member.intake.config, seat.stage.cache
    handover = Handover(door, rank, member.layout, config, cache, seat.options)
    seat.stage.handover, seat.outfit = handover, handover
    handover.watch(seat.stage.model)
    if seat.engine is not None:
        engine, early = seat.engine, seat.options.kv_transfer != "whole"
        if seat.options.gate != "greedy":
            guard(engine.scheduler, GATES[seat.options.gate])
        engine.handing = Handing(engine.scheduler, engine.requests, Leader(handover), early)
