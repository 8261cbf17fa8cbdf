"""The sending end of a KV transfer, on one rank: it knows how far the K and V of each prompt are computed, and sends them to whoever
asked, in threads of its own while the rank computes.

Whoever asks for all of it late gets the whole cache; whoever asks early gets what is there and then, layer by layer or chunk by chunk,
what comes. A block is sent once, when nothing more is written to it.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from minillm.disagg.pair import Pair
from minillm.disagg.room import SLOT_BYTES, Room
from minillm.kv.paged import PagedCache
from minillm.parallel.desk import hang_up
from minillm.parallel.door import say, send_tensor
from minillm.policy.batch import Batch, Chunk

PART_BYTES = SLOT_BYTES  # at most in one message, unless a layer takes more


@dataclass
class Progress:
    """A prompt on this rank: its blocks, and how many of its tokens are in the cache, layer by layer; its `length`, once the last chunk
    has come.
    """

    blocks: tuple[int, ...]
    done: list[int]
    length: int | None

    def ready(self, layer: int, block_size: int) -> int:
        """How many blocks of a layer are written for good."""
        return -(-self.done[layer] // block_size) if self.done[layer] == self.length else self.done[layer] // block_size


@dataclass
class Wanted:
    """What a rank elsewhere wants of the `reading`-th prompt here: K and V of `layers` and `heads` (this rank's numbers), of the `places` of its sequence
    whose block, of this rank's line of context, is at `line` (place, ranks). `sent` counts places, layer by layer.
    """

    transfer: int
    request_id: int
    reading: int
    layers: tuple[int, int]
    heads: tuple[int, int]
    places: list[int]
    line: tuple[int, int]
    sent: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """What goes into one message: layers `begin` to `end` of some places, in these blocks."""

    wanted: Wanted
    begin: int
    end: int
    places: list[int]
    blocks: list[int]
    reaches: int  # of the wanted places, those that are sent with it


@dataclass(frozen=True)
class Sent:
    """A part that has left: of which request, how many bytes, when."""

    request_id: int
    bytes: int
    begin_s: float
    end_s: float


class Sender:
    """What one rank sends. `layerwise`: each layer as it is computed (off: when a step is over). Links go no faster than `gbits` (None:
    as fast as they are).
    """

    def __init__(self, cache: PagedCache, layerwise: bool, gbits: float | None) -> None:
        self.cache, self.layerwise, self.gbits = cache, layerwise, gbits
        self.prompts: dict[int, Progress] = {}  # by reading
        self.sent: deque[Sent] = deque()  # until somebody takes them
        self.rooms: dict[Connection, Room] = {}  # memory that is shared with who is at a link
        self.pairs: dict[Connection, Pair] = {}  # or a process group with it
        self._wanted: dict[Connection, list[Wanted]] = {}
        self._news = threading.Condition()
        self._card = threading.Lock()  # all links of a rank share its network card,
        self._free_s = 0.0  # which is free from then on
        self._chunks: tuple[Chunk, ...] = ()

    def begin(self, batch: Batch) -> None:
        """A step begins: its chunks will be computed, and some requests are there no more."""
        with self._news:
            for reading in batch.gone:
                self.prompts.pop(reading, None)
            self._chunks = tuple(chunk for chunk in batch.chunks if chunk.reading)
            for chunk in self._chunks:
                done = [chunk.start] * self.cache.keys.shape[0]
                self.prompts[chunk.reading] = Progress(chunk.block_table, done, chunk.end if chunk.samples else None)

    def layer_done(self, layer: int) -> None:
        """The step's K and V of this layer are in the cache."""
        if self.layerwise and self._chunks:
            self._advance(range(layer, layer + 1))

    def settle(self) -> None:
        """The step is over."""
        if self._chunks:
            self._advance(range(self.cache.keys.shape[0]))
        self._chunks = ()

    def want(self, link: Connection, wanted: Wanted) -> None:
        """Somebody wants a cache, by this link."""
        with self._news:
            if link not in self._wanted:
                self._wanted[link] = []
                threading.Thread(target=self._send, args=(link,), name="minillm sender", daemon=True).start()
            self._wanted[link].append(wanted)
            self._news.notify_all()

    def share(self, link: Connection, path: Path) -> None:
        """Whoever is at this link has made a room, here; where that cannot be opened parts go through the link."""
        with suppress(OSError):
            self.rooms[link] = Room(path, make=False)

    def forget(self, link: Connection, transfer: int | None = None) -> None:
        """It is not wanted any more, or whoever is at this link wants nothing."""
        if transfer is None:
            self.pairs.pop(link, None)
            if link in self.rooms:
                self.rooms.pop(link).close()
        with self._news:
            if transfer is None:
                self._wanted.pop(link, None)
            elif link in self._wanted:
                self._wanted[link] = [each for each in self._wanted[link] if each.transfer != transfer]
            self._news.notify_all()

    def _advance(self, layers: range) -> None:
        with self._news:
            for chunk in self._chunks:
                if (progress := self.prompts.get(chunk.reading)) is not None:
                    for layer in layers:
                        progress.done[layer] = chunk.end
            self._news.notify_all()

    def _send(self, link: Connection) -> None:
        """Send what one link wants, as it becomes ready, until nobody is there any more."""
        while True:
            with self._news:
                while link in self._wanted and (part := self._next(link)) is None:
                    self._news.wait()
                if link not in self._wanted:
                    return None
            assert part is not None
            try:
                begin_s = time.monotonic()
                if count := self._send_part(link, part):
                    self.sent.append(Sent(part.wanted.request_id, count, begin_s, time.monotonic()))
            except Exception:  # whoever wants it is gone, or learns so now
                self.forget(link)
                return hang_up(link)

    def _next(self, link: Connection) -> Part | None:
        """The next part that can go, of who has asked first; it counts as sent."""
        for wanted in self._wanted[link]:
            progress = self.prompts.get(wanted.reading)
            if progress is None:
                continue
            for layer in range(*wanted.layers):
                if part := self._part(wanted, progress, layer):
                    for each in range(part.begin, part.end):
                        wanted.sent[each] = part.reaches
                    if all(wanted.sent.get(each, 0) == len(wanted.places) for each in range(*wanted.layers)):
                        self._wanted[link] = [each for each in self._wanted[link] if each is not wanted]
                    return part
        return None

    def _part(self, wanted: Wanted, progress: Progress, first: int) -> Part | None:
        """What can go of a request from a layer on: that layer, and the next ones that are as far."""
        stands = self._stands(wanted, progress, first)
        sent, ready = stands
        if ready <= sent:
            return None
        end = first + sum(
            1
            for _ in takewhile(
                lambda each: self._stands(wanted, progress, each) == stands, range(first, wanted.layers[1])
            )
        )
        (place, ranks), coming = wanted.line, wanted.places[sent:ready]
        places = [each for each in coming if progress.blocks[each] % ranks == place]
        keys = self.cache.keys
        layer_bytes = (
            2 * len(places) * (wanted.heads[1] - wanted.heads[0]) * keys.shape[3] * keys.shape[4] * keys.itemsize
        )
        end = min(end, first + max(1, PART_BYTES // max(1, layer_bytes)))
        return Part(wanted, first, end, places, [progress.blocks[each] // ranks for each in places], ready)

    def _stands(self, wanted: Wanted, progress: Progress, layer: int) -> tuple[int, int]:
        """How many of the wanted places are sent of a layer, and how many can be."""
        ready = progress.ready(layer, self.cache.block_size)
        return wanted.sent.get(layer, 0), bisect_left(wanted.places, ready)

    def _send_part(self, link: Connection, part: Part) -> int:
        """Send a part, no faster than the link is meant to be; returns its bytes."""
        if not part.blocks:
            return 0
        layers, heads = slice(part.begin, part.end), slice(*part.wanted.heads)
        with torch.inference_mode():
            both = [each[layers, part.blocks, heads] for each in (self.cache.keys, self.cache.values)]
        count = 2 * both[0].nbytes
        if self.gbits is not None:
            self._take_turn(count)
        about: dict[str, Any] = {"layers": [part.begin, part.end], "places": part.places}
        about |= {"transfer": part.wanted.transfer}
        room, pair = self.rooms.get(link), self.pairs.get(link)
        if pair is not None:
            say(link, "part", numbers=2 * both[0].numel(), **about)
            pair.send(torch.stack(both))
        elif room is None or count > SLOT_BYTES:
            say(link, "part", **about)
            send_tensor(link, torch.stack(both))
        else:
            slot = room.take()
            for mine, there in zip(both, room.view(slot, (2, *both[0].shape), both[0].dtype)):
                there.copy_(mine)
            say(link, "part", slot=slot, **about)
        return count

    def _take_turn(self, count: int) -> None:
        """Wait as long as the rank's network card, if it were as slow as `gbits`, would take for this and what came before."""
        assert self.gbits is not None
        with self._card:
            self._free_s = max(self._free_s, time.monotonic()) + count * 8 / (self.gbits * 1e9)
            until_s = self._free_s
        time.sleep(max(0.0, until_s - time.monotonic()))
